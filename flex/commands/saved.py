"""`flex eval` and `flex generate`: what a run saved, loaded again."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flex.config import RunConfig, read_config
from flex.errors import FlexError, require
from flex.evaluation.score import generate as greedy
from flex.federation.client import Site
from flex.federation.messages import Arrays
from flex.methods import METHODS
from flex.runs.job import kept_shared
from flex.runs.run import CONFIG, check_contents, job_folders, started
from flex.runs.workers import job_folder
from flex.runs.world import World, load_bare_world, load_world
from flex.store.events import Evaluated

console = Console()


@dataclass(frozen=True)
class Saved:
    """A job as its files in `folder` have it: its clients, and the shared state after `round_index`."""

    folder: Path
    config: RunConfig
    world: World
    sites: dict[str, Site]
    round_index: int
    shared: Arrays

    def site(self, client_id: str) -> Site:
        if client_id not in self.sites:
            raise no_client(client_id, self.world)
        return self.sites[client_id]

    def attach(self, client_id: str) -> None:
        """That client's model: the shared state, and what it keeps to itself.

        Raises:
            FlexError: no such client, or it has not taken part yet.
        """
        site = self.site(client_id)
        if site.model.own and site.store.load(self.round_index) is None:
            method = site.model.method_name
            raise FlexError(f"client {client_id!r} has not taken part in a round of {method} yet: it has no model")
        site.attach(self.round_index, self.shared)


def evaluate(folder: Path, method: str, seed: int | None, client_id: str | None) -> int:
    """Scores on the test part from the files of the last round."""
    saved = load_saved(folder, method, seed)
    table = Table(title=Text(f"{folder}, {method}, after round {saved.round_index}", "table.title"))
    for column in ("client", "examples", "loss", "exact match", "ROUGE-L"):
        table.add_column(column, justify="left" if column == "client" else "right")
    for name in [client_id] if client_id is not None else saved.sites:
        events = saved.site(name).evaluate(saved.round_index, saved.shared)
        test = next(event for event in events if isinstance(event, Evaluated))
        rouge = "" if test.rouge_l is None else f"{test.rouge_l:.3f}"
        table.add_row(Text(name), str(test.num_examples), f"{test.loss:.3f}", f"{test.exact_match:.3f}", rouge)
    console.print(table)
    return 0


def generate(
    folder: Path, method: str, seed: int | None, client_id: str, prompt: str, context: str, max_new_tokens: int
) -> int:
    """The answer of one client's model: shared LoRA of the last round, that client's own graft."""
    require(max_new_tokens >= 1, f"--max-new-tokens is {max_new_tokens}; expected 1 or more")
    saved = load_saved(folder, method, seed, with_data=False)
    saved.attach(client_id)
    encoder, prepare = saved.world.encoder, saved.site(client_id).prepare()
    print(greedy(saved.world.base.model, encoder, [encoder.prompt_ids(prompt, context)], max_new_tokens, prepare)[0])
    return 0


def load_saved(folder: Path, method: str, seed: int | None, with_data: bool = True) -> Saved:
    """A job of a run; without data its clients are those that the run names, and nothing but their files is read.

    Raises:
        FlexError: no such run or job, or base or data are not those that the run was made with.
    """
    if not (folder / CONFIG).exists():
        raise FlexError(f"no run at {folder}; expected a folder that `flex train` or `flex demo` wrote")
    config = read_config(folder / CONFIG)
    if method not in METHODS:
        raise FlexError(f"--method is {method!r}; expected one of {', '.join(METHODS)}")
    seed = config.train.seeds[0] if seed is None else seed
    job = job_folder(folder, (seed, method))
    if not job.exists():
        there = [path.name for path in job_folders(folder) if path.exists()]
        raise FlexError(f"{folder} has no job {job.name}; it has {', '.join(there) or 'none yet'}")
    if config.threads:
        torch.set_num_threads(config.threads)
    said = started(folder)
    names = [str(client["client_id"]) for client in said.clients]
    if with_data:  # somebody may have been added to the files who has not joined
        world = load_world(config, seed)
        world = replace(world, clients=[client for client in world.clients if client.client_id in names])
    else:  # who has left has a model still
        left = [name for name in said.client_data.get(str(seed), {}) if name not in names]
        world = load_bare_world(config, [*names, *left])
    check_contents(folder, world, seed if with_data else None)
    sites = world.sites(config, method, seed, job)
    start = next(iter(sites.values())).model.shared_arrays()
    round_index, shared = kept_shared(job, world.base.fingerprint, start)
    return Saved(job, config, world, sites, round_index, shared)


def no_client(client_id: str, world: World) -> FlexError:
    names = ", ".join(c.client_id for c in world.clients)
    return FlexError(f"no client {client_id!r} in this run; its clients are {names}")
