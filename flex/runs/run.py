"""A whole run: every method and seed of a configuration on the same data, resumable at any moment.

RUN/config.toml                          the resolved configuration
RUN/metrics.jsonl, RUN/report.html       what came out
RUN/<method>-seed<N>/                    one job, see `job.py`
"""

import dataclasses
import fcntl
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from rich.console import Console

from flex.config import TASKS, RunConfig, read_config, write_config
from flex.errors import FlexError
from flex.federation.agreement import comparable
from flex.federation.client import about
from flex.federation.messages import SiteAbout
from flex.methods import METHODS
from flex.model.adapters import unwrap
from flex.runs.demands import check_data, check_methods, pinned
from flex.runs.history import is_finished, plan_of
from flex.runs.job import is_done
from flex.runs.progress import job_lines
from flex.runs.tally import split_table
from flex.runs.track import check_track
from flex.runs.workers import JobName, job_folder, make_job, run_apart
from flex.runs.world import World, Worlds
from flex.store.events import FORMAT, METRICS, Event, RunStarted, Truncated, read_events, write_events
from flex.store.files import LOCK, rounds_in

CONFIG = "config.toml"
RUN = "run.jsonl"  # what the whole run has in common
# Settings that base or tokenizer may decide, and how they say so; a run's file has what was decided.
DECIDED = {"data.template": "auto", "lora.targets": ("auto",)}


def run(config: RunConfig, console: Console, title: str = "", descriptions: dict[str, str] | None = None) -> Path:
    """Trains and scores every job that is not finished; returns the run's folder.

    Args:
        title, descriptions: of the run, and of each client in one line; for the report.

    Raises:
        FlexError: bad input (nothing has been written then), or the folder holds a run with other settings.
    """
    folder, descriptions = Path(config.output), descriptions or {}
    config, worlds, world = prepared(config, console)
    contents = check_contents(folder, world, config.train.seeds[0])
    jobs = [(seed, method) for seed in config.train.seeds for method in config.train.methods]
    clients = [client.client_id for client in world.clients]
    check_growth(folder, config, jobs, clients)
    _tell_growth(folder, clients, console)
    claim(folder, config)
    with alone_in(folder, console), job_lines(console) as line:
        sites = [about(world.base, client, config, world.anchor) for client in world.clients]
        write_events(folder / RUN, run_events(config, sites, contents.data, title, descriptions, contents.client_data))
        lines = {(seed, method): line(f"{method} seed {seed}") for seed, method in jobs}
        left = [job for job in jobs if not is_finished_job(folder, job, config, clients)]
        for job in (job for job in jobs if job not in left):
            lines[job](total=1, advance=1, what="done before", ended=True)
        if config.workers > 1 and left:
            for _ in run_apart(config, left, lines):
                collect(folder)
        else:
            for job in left:
                make_job(config, job, worlds, lines[job]).run()
                collect(folder)
            unwrap(worlds.world.base)
        collect(folder)
    return folder


def prepared(config: RunConfig, console: Console) -> tuple[RunConfig, Worlds, World]:
    """Everything that can be wrong before a method trains, looked at; data and base of the first seed, loaded.

    Raises:
        FlexError: see `run`; nothing has been written.
    """
    folder = Path(config.output)
    config = _with_full_paths(config)
    check_track(config.train.track)
    check_free(folder, config)
    if config.threads:
        torch.set_num_threads(config.threads)
    console.print(f"[dim]loading {config.model.path} ...[/dim]")
    check_data(config)
    worlds = Worlds(config)
    world = worlds.of(config.train.seeds[0])
    for note in world.notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False)
    console.print(split_table(world.tally))
    config = pinned(config, world)
    check_free(folder, config)
    check_methods(config, world)
    return config, worlds, world


def is_finished_job(folder: Path, job: JobName, config: RunConfig, clients: list[str]) -> bool:
    """Whether a job of the run in `folder` has nothing left to do with this configuration and these clients."""
    events = read_events(job_folder(folder, job) / METRICS)
    return is_finished(events, METHODS[job[1]].trains, config.train.rounds, clients)


def check_growth(folder: Path, config: RunConfig, jobs: list[JobName], clients: list[str]) -> None:
    """Clients may join a run and leave it, between two rounds of each of its jobs.

    Raises:
        FlexError: a job has no round left that another set of clients could train in, or the clients that stay stand in
            another order, which would change the bits of every sum over them.
    """
    for job in jobs:
        path = job_folder(folder, job)
        was = plan_of(read_events(path / METRICS)).clients
        rounds = rounds_in(path / "server")
        if not was or not rounds:
            continue
        stay = [name for name in clients if name in was]
        if not stay:
            raise FlexError(f"{folder} holds a run of other clients ({', '.join(was)}); expected another --output")
        if stay != [name for name in was if name in clients]:
            raise FlexError(
                f"{folder} holds a run with its clients in another order ({', '.join(was)}); expected that one"
            )
        changed = [f"client {name!r} joins" for name in clients if name not in was]
        changed += [f"client {name!r} leaves" for name in was if name not in clients]
        if changed and rounds[-1] >= config.train.rounds:
            raise FlexError(
                f"{changed[0]}, but {path.name} has done its {rounds[-1]} rounds; expected more of them, e.g. --rounds "
                f"{rounds[-1] + max(1, rounds[-1] // 2)}"
            )


def _tell_growth(folder: Path, clients: list[str], console: Console) -> None:
    was = [str(client["client_id"]) for client in started(folder).clients] if (folder / CONFIG).exists() else []
    notes = [f"client {name!r} joins: it takes part from the next round on" for name in clients if name not in was]
    notes += [
        f"client {name!r} has left: its files and its rounds stay as they are" for name in was if name not in clients
    ]
    for note in notes if was and _has_results(folder) else []:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False)


def collect(folder: Path) -> None:
    """RUN/metrics.jsonl once more from the files of the jobs that the run's configuration names."""
    files = [folder / RUN, *(path / METRICS for path in job_folders(folder))]
    write_events(folder / METRICS, [event for file in files for event in read_events(file)])


def _with_full_paths(config: RunConfig) -> RunConfig:
    """What the run's own file says of files must be true from every folder."""

    def full(name: str) -> str:
        path = Path(name).expanduser()
        return str(path.absolute()) if name and (path.exists() or "{seed}" in name) else name

    tasks = {name: full(getattr(config.evaluate, name)) for name in TASKS.values() if name}
    return dataclasses.replace(
        config,
        data=config.data.with_paths(full),
        model=dataclasses.replace(config.model, path=full(config.model.path)),
        anchor=dataclasses.replace(config.anchor, text=full(config.anchor.text)),
        evaluate=dataclasses.replace(config.evaluate, **tasks),
    )


def check_free(folder: Path, config: RunConfig) -> None:
    """`folder` is empty, holds a run with these settings, or one without results."""
    path = folder / CONFIG
    if path.exists() and _has_results(folder):
        there = read_config(path)
        if different := changes(there, config):
            key = different[0]
            here, there = comparable(config), comparable(there)
            raise FlexError(
                f"{folder} holds a run with other settings ({key} = {there[key]!r} there, {here[key]!r} here); "
                "expected the same settings to resume it, another --output, or that folder gone"
            )


def changes(before: RunConfig, now: RunConfig) -> list[str]:
    """The settings in which `now` is another run than `before`, and not the same one that goes on."""
    there, here = comparable(before), comparable(now)
    return [
        key
        for key in here
        if here[key] not in (there[key], DECIDED.get(key)) and not _may_grow(key, there[key], here[key])
    ]


def _may_grow(key: str, before: Any, now: Any) -> bool:
    """What a run may change in its life: more rounds, and who takes part (`check_growth`)."""
    return key == "data.clients" or (key == "train.rounds" and now > before)


def job_folders(folder: Path) -> list[Path]:
    """The jobs that the configuration in `folder` names; whatever else lies there (a copy, a backup) is no job."""
    train = read_config(folder / CONFIG).train
    return sorted(job_folder(folder, (seed, method)) for seed in train.seeds for method in train.methods)


def _has_results(folder: Path) -> bool:
    """Whether a job there is finished, or has left more than its events."""
    return any(is_done(job) or any(job.glob("**/*.safetensors")) for job in job_folders(folder))


def started(folder: Path) -> RunStarted:
    """What a run says of itself; empty where it says nothing."""
    return next((event for event in read_events(folder / RUN) if isinstance(event, RunStarted)), RunStarted())


def check_contents(folder: Path, world: World, seed: int | None) -> RunStarted:
    """The fingerprints of the data by seed, of this call and of earlier ones; the base must be what it was, and the
    data of every client that was there before.

    Args:
        seed: whose data `world` holds; None: nobody's, and the base alone is looked at.
    """
    old = started(folder) if (folder / CONFIG).exists() and _has_results(folder) else RunStarted()
    if old.fingerprint and old.fingerprint != world.base.fingerprint:
        raise FlexError(f"{folder} holds a run on another base; expected the same base, or another --output")
    if seed is None:
        return old
    own, name = world.client_fingerprints, str(seed)
    known = old.client_data.get(name, {})
    changed = [client for client in own if known.get(client, own[client]) != own[client]]
    # A run of an earlier version has one fingerprint for all clients together.
    if changed or (not known and old.data.get(name, world.data_fingerprint) != world.data_fingerprint):
        whose = f"client {changed[0]!r}: " if changed else ""
        raise FlexError(
            f"{folder} holds a run on other data ({whose}a file has changed); expected the same data, or another "
            "--output"
        )
    return dataclasses.replace(
        old,
        data={**old.data, name: world.data_fingerprint},
        client_data={**old.client_data, name: {**known, **own}},
    )


def claim(folder: Path, config: RunConfig) -> None:
    """Methods and seeds of earlier calls stay in the run's file: the report shows them all."""
    path = folder / CONFIG
    try:
        if path.exists() and _has_results(folder):
            old = read_config(path).train
            methods, seeds = ((*old.methods, *config.train.methods), (*old.seeds, *config.train.seeds))
            train = {"methods": tuple(dict.fromkeys(methods)), "seeds": tuple(dict.fromkeys(seeds))}
            config = config.with_values(train=train)
        folder.mkdir(parents=True, exist_ok=True)
        write_config(config, path)
    except OSError as error:
        raise FlexError(f"cannot write the run's folder {folder}: {error}") from None


@contextmanager
def alone_in(folder: Path, console: Console) -> Iterator[None]:
    """No two processes write one run: the system drops the lock when its holder ends, however it ends."""
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FlexError(
                f"another process is at work in {folder}; expected it to end first, or another --output"
            ) from None
        except OSError as error:  # some network file systems have no locks
            console.print(f"warning: {folder} cannot be locked ({error}); do not run it twice at once", style="yellow")
        yield


def run_events(
    config: RunConfig,
    sites: Iterable[SiteAbout],
    data: dict[str, str],
    title: str,
    descriptions: dict[str, str],
    client_data: dict[str, dict[str, str]] | None = None,
) -> list[Event]:
    """What the whole run has in common (whose data, which base, which versions), and what was cut: from what the sites
    say of themselves."""
    sites = list(sites)
    common = RunStarted(
        title=title or config.output,
        base_model=config.model.path,
        fingerprint=sites[0].fingerprint,
        template=config.data.template,
        clients=[
            {
                "client_id": site.client_id,
                "num_train": site.num_train,
                "num_test": site.num_test,
                "description": descriptions.get(site.client_id, ""),
            }
            for site in sites
        ],
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        threads=torch.get_num_threads(),
        data=data,
        client_data=client_data or {},
        format=FORMAT,
    )
    cut = [
        Truncated(site.client_id, part, count, config.data.max_length)
        for site in sites
        for part, count in site.truncated.items()
        if count
    ]
    return [common, *cut]
