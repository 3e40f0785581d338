"""The server's half of a run at several sites: Flower's ServerApp. It has neither model nor data.

Every method and seed of the configuration in turn, on Flower's Grid; what comes out is a run's folder like that of
`flex train`, made from the sites' replies alone. Stopped at any moment, the next Flower run goes on from that folder.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from flex.deploy.folder import Deployment, read_deployment
from flex.deploy.grid import QUERY_S, SiteGrid, wait_for
from flex.deploy.job import JobName, job_record
from flex.deploy.progress import DONE, ENDED, PROGRESS, Teller
from flex.deploy.superlink import nodes
from flex.errors import FlexError, first_line
from flex.federation.agreement import settings_digest
from flex.federation.flower import Context, Grid, ServerApp
from flex.federation.messages import SiteAbout
from flex.federation.rounds import ClientFailed, ask_clients
from flex.runs.job import Job
from flex.runs.progress import Bar
from flex.runs.run import RUN, alone_in, check_free, check_growth, claim, collect, is_finished_job, run_events, started
from flex.runs.track import tracked
from flex.runs.workers import job_folder
from flex.store.events import write_events

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One Flower run: what is left of every job.

    Of the run's configuration `folder` is the coordinator's, `wait` how many seconds to wait for sites, and `sites`, in
    Flower's simulation alone, a configuration with paths (`simulated.py`).
    """
    folder = Path(str(context.run_config["folder"]))
    teller = Teller(folder / PROGRESS, context.run_id)
    try:
        deployment = read_deployment(folder)
        simulated = bool(context.run_config["sites"])
        clients = numbered(grid, deployment) if simulated else nodes(deployment)
        serve(deployment, grid, clients, float(context.run_config["wait"]), teller)
        teller.tell(**{ENDED: DONE})
    except (FlexError, ClientFailed) as error:
        teller.tell(**{ENDED: str(error)})
        raise
    except Exception as error:
        teller.tell(**{ENDED: f"{type(error).__name__}: {first_line(error)}"})
        raise


def numbered(grid: Grid, deployment: Deployment) -> dict[int, str]:
    """node id -> site, of nodes that say which number they are (Flower's simulation); in order."""
    return {node: deployment.sites[int(index)] for node, index in ask_clients(grid, QUERY_S).items()}


def serve(deployment: Deployment, grid: Grid, clients: dict[int, str], wait: float, teller: Teller) -> None:
    """Runs every job that is not done.

    Raises:
        FlexError, ClientFailed: a site is not there, is refused, or fails; what is done is kept.
    """
    config, folder = deployment.config, deployment.run
    check_free(folder, config)
    jobs = [JobName(method, seed) for seed in config.train.seeds for method in config.train.methods]
    check_growth(folder, config, [(name.seed, name.method) for name in jobs], list(deployment.sites))
    claim(folder, config)
    with alone_in(folder, Console(stderr=True)):
        sites = list(deployment.sites)
        left = [name for name in jobs if not is_finished_job(folder, (name.seed, name.method), config, sites)]
        for name in set(jobs) - set(left):
            teller.line(title(name))(total=1, advance=1, what="done before", ended=True)
        if left:
            wait_for(lambda: set(grid.get_node_ids()), clients, wait, lambda what: teller.tell(what=what))
        for name in left:
            run_job(deployment, grid, clients, name, teller)
            collect(folder)
        collect(folder)


def title(name: JobName) -> str:
    return f"{name.method} seed {name.seed}"


def run_job(deployment: Deployment, grid: Grid, clients: dict[int, str], name: JobName, teller: Teller) -> None:
    """One method and seed."""
    config, folder = deployment.config, deployment.run
    job = job_folder(folder, (name.seed, name.method))
    bar = Bar(tracked(teller.line(title(name)), job, config.train.track))
    settings = settings_digest(config)
    sites = SiteGrid(
        grid,
        clients,
        job_record(name, deployment.run_name, settings),
        bar.say,
        lambda: bar.step(config.train.steps),
    )

    def admit(told: Sequence[SiteAbout]) -> Mapping[str, str]:
        base = told[0].fingerprint
        client_data = check_resumed(folder, name.seed, told)
        sites.job = job_record(name, deployment.run_name, settings, base)
        write_events(folder / RUN, run_events(config, told, {}, deployment.folder.name, {}, client_data))
        return {"base": base}

    Job(config, name.method, name.seed, job, sites, admit, bar).run()


def check_resumed(folder: Path, seed: int, told: Sequence[SiteAbout]) -> dict[str, dict[str, str]]:
    """The fingerprints of the sites' data by seed, of this run's earlier parts too.

    Raises:
        FlexError: a site has another base or other data than when the run began.
    """
    old = started(folder)
    if old.fingerprint and told[0].fingerprint != old.fingerprint:
        raise FlexError(
            f"the sites have base {told[0].fingerprint}, this run began with {old.fingerprint}; expected that one, or "
            "`flex deploy update` for another run"
        )
    known = dict(old.client_data.get(str(seed), {}))
    for site in told:
        if (before := known.setdefault(site.client_id, site.data)) != site.data:
            raise FlexError(
                f"site {site.client_id!r} has other data than when this run began ({site.data}, not {before}); "
                "expected the same files, or `flex deploy update` for another run"
            )
    return {**old.client_data, str(seed): known}
