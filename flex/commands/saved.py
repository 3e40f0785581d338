"""`flex eval` and `flex generate`: what a run saved, loaded again. Files are read before the model is."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TextStreamer

from flex.config import RunConfig, read_config
from flex.data.clients import read_own_tests, read_tests
from flex.data.examples import encode
from flex.data.prompts import read_prompts
from flex.errors import FlexError, require
from flex.evaluation.score import generate as greedy
from flex.evaluation.tasks import read_tasks
from flex.federation.client import Site
from flex.federation.messages import Arrays
from flex.methods import METHODS
from flex.runs.job import kept_shared
from flex.runs.run import CONFIG, check_contents, job_folders, started
from flex.runs.workers import job_folder
from flex.runs.world import World, load_bare_world, load_world
from flex.store.events import OF_LAYERS, Added, Cost, Evaluated, Event, Routed

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

    def answers(
        self, client_id: str, prompts: list[list[int]], max_new_tokens: int, streamer: TextStreamer | None = None
    ) -> list[str]:
        """Greedy answers of the client's model, which is attached; `streamer` gets that to one prompt as it comes."""
        prepare = self.site(client_id).prepare()
        return greedy(self.world.base.model, self.world.encoder, prompts, max_new_tokens, prepare, streamer)


def evaluate(
    folder: Path,
    method: str,
    seed: int | None,
    client_id: str | None,
    test: str = "",
    overrides: Sequence[str] = (),
) -> int:
    """Scores on the test part, from the files of the round that is kept.

    Args:
        test: another file of test examples; the training data are not looked for then. Without it they may be gone too,
            as long as the run has a test file of its own.
        overrides: of the section [evaluate], e.g. which tasks to score.
    """
    wrong = [text for text in overrides if not text.startswith("evaluate.")]
    require(
        not wrong, f"--set got {wrong[0] if wrong else ''!r}; expected a setting of [evaluate], e.g. evaluate.tasks"
    )
    saved = load_saved(folder, method, seed, test=test, client_id=client_id, overrides=overrides)
    for note in saved.world.notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False)
    on = f" on {Path(test).name}" if test else ""
    table = Table(title=Text(f"{folder}, {method}, after round {saved.round_index}{on}", "table.title"))
    for column in ("client", "examples", "loss", "exact match", "ROUGE-L"):
        table.add_column(column, justify="left" if column == "client" else "right")
    further: list[Evaluated] = []
    of_layers: list[Event] = []
    for name in [client_id] if client_id is not None else saved.sites:
        if not saved.site(name).client.train:  # nothing here that a graft could be chosen on
            saved.attach(name)
        events = saved.site(name).evaluate(saved.round_index, saved.shared, splits=("test",))
        event = next(event for event in events if isinstance(event, Evaluated))
        rouge = "" if event.rouge_l is None else f"{event.rouge_l:.3f}"
        table.add_row(Text(name), str(event.num_examples), f"{event.loss:.3f}", f"{event.exact_match:.3f}", rouge)
        further += [event for event in events if isinstance(event, Evaluated) and event.split != "test"]
        of_layers += [event for event in events if not isinstance(event, Evaluated)]
    console.print(table)
    if further:
        console.print(_of_tasks(further))
    if any(isinstance(event, OF_LAYERS) for event in of_layers):
        console.print(_of_layers(of_layers))
    return 0


def _of_layers(events: Sequence[Event]) -> Table:
    """A line a client: what its prompts do in the layers, mean over these; the report has each layer."""
    table = Table(title=Text("mean over the layers, on the test part's prompts", "table.title"))
    for column in (
        "client",
        "entropy",
        "of base",
        "at most",
        "added",
        "opening",
        "graft to experts",
        "forward longer by",
    ):
        table.add_column(column, justify="left" if column == "client" else "right")
    rows: dict[str, dict[str, str]] = {}
    for event in events:
        match event:
            case Routed(layers=[_, *_]):
                means = map(statistics.fmean, (event.entropy, event.base_entropy, event.most))
                cells = {
                    name: f"{mean:.3f}" for name, mean in zip(("entropy", "of base", "at most"), means, strict=True)
                }
            case Added(layers=[_, *_]):
                cells = {"added": f"{100 * statistics.fmean(event.added):.2f} %"}
                cells["opening"] = f"{100 * statistics.fmean(event.opening):.1f} %"
            case Cost(layers=[_, *_]):
                cells = {"graft to experts": f"{100 * sum(event.graft_flops) / sum(event.layer_flops):.1f} %"}
                longer = event.seconds["with"] / event.seconds["without"] - 1
                cells["forward longer by"] = f"{100 * longer:.1f} %"
            case _:
                continue
        rows.setdefault(event.client_id, {}).update(cells)
    for client_id, cells in rows.items():
        table.add_row(Text(client_id), *(cells.get(str(column.header), "") for column in table.columns[1:]))
    return table


def _of_tasks(events: Sequence[Evaluated]) -> Table:
    """What was scored beside the test part: a line a client and task, and one for each group of its questions."""
    table = Table(title=Text("further tasks", "table.title"))
    for column in ("client", "task", "group", "questions", "accuracy %", "± error", "perplexity", "note"):
        table.add_column(column, justify="left" if column in ("client", "task", "group", "note") else "right")
    for event in events:
        errors = event.details.get("standard_error_by_group", {})
        note = ", ".join(
            f"{k}: {v:g}" for k, v in event.details.items() if isinstance(v, int | float) and "error" not in k
        )
        for group, part in {"": vars(event), **event.groups}.items():
            share = part.get("accuracy")
            error = errors.get(group) if group else event.details.get("standard_error")
            cells = ["" if value is None else f"{100 * value:.1f}" for value in (share, error)]
            cells.append("" if group or event.perplexity is None else f"{event.perplexity:.2f}")
            table.add_row(
                Text(event.client_id),
                event.split,
                Text(group),
                str(part["num_examples"]),
                *cells,
                "" if group else note,
            )
    return table


def generate(
    folder: Path, method: str, seed: int | None, client_id: str, prompt: str, context: str, max_new_tokens: int
) -> int:
    """The answer of one client's model: shared LoRA of the round that is kept, that client's own graft."""
    check_tokens(max_new_tokens)
    saved = load_saved(folder, method, seed, with_data=False)
    saved.attach(client_id)
    print(saved.answers(client_id, [saved.world.encoder.prompt_ids(prompt, context)], max_new_tokens)[0])
    return 0


def generate_all(
    folder: Path,
    method: str,
    seed: int | None,
    client_id: str,
    path: str,
    max_new_tokens: int,
    batch_size: int | None = None,
) -> int:
    """The answers to all prompts of a file, or of standard input ("-"), as JSON lines, in the prompts' order.

    Args:
        batch_size: prompts answered at once; None: the run's `evaluate.batch_size`.
    """
    check_tokens(max_new_tokens)
    require(batch_size is None or batch_size >= 1, f"--batch-size is {batch_size}; expected 1 or more")
    prompts = read_prompts(path, run_config(folder).data.columns)
    saved = load_saved(folder, method, seed, with_data=False)
    saved.attach(client_id)
    encoder, size = saved.world.encoder, batch_size or saved.config.evaluate.batch_size
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        ids = [
            encoder.prompt_ids(prompt.turns[0]["content"], prompt.context)
            if prompt.context
            else encoder.next_ids(prompt.turns)
            for prompt in batch
        ]
        for prompt, answer in zip(batch, saved.answers(client_id, ids, max_new_tokens), strict=True):
            print(json.dumps(prompt.answered(answer), ensure_ascii=False), flush=True)
    return 0


def check_tokens(max_new_tokens: int) -> None:
    require(max_new_tokens >= 1, f"--max-new-tokens is {max_new_tokens}; expected 1 or more")


def run_config(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration that a run was made with."""
    if not (folder / CONFIG).exists():
        raise FlexError(f"no run at {folder}; expected a folder that `flex train` or `flex demo` wrote")
    return read_config(folder / CONFIG, overrides)


def load_saved(
    folder: Path,
    method: str,
    seed: int | None,
    with_data: bool = True,
    test: str = "",
    client_id: str | None = None,
    overrides: Sequence[str] = (),
) -> Saved:
    """A job of a run; without data its clients are those that the run names, and nothing but their files is read.

    Args:
        test: a file of test examples in place of the run's data, with `client_id` perhaps of this client alone.

    Raises:
        FlexError: no such run or job, or base or data are not those that the run was made with.
    """
    config = run_config(folder, overrides)
    if method not in METHODS:
        raise FlexError(f"--method is {method!r}; expected one of {', '.join(METHODS)}")
    seed = config.train.seeds[0] if seed is None else seed
    job = job_folder(folder, (seed, method))
    if not job.exists():
        there = [path.name for path in job_folders(folder) if path.exists()]
        raise FlexError(f"{folder} has no job {job.name}; it has {', '.join(there) or 'none yet'}")
    if config.threads:
        torch.set_num_threads(config.threads)
    said, notes = started(folder), []
    names = [str(client["client_id"]) for client in said.clients]
    # Who has left has a model still.
    known = [*names, *(name for name in said.client_data.get(str(seed), {}) if name not in names)]
    data, tests = config.data.for_seed(seed), None
    if test:
        if client_id is not None and client_id not in known:
            raise FlexError(f"no client {client_id!r} in this run; its clients are {', '.join(known)}")
        tests = read_tests(test, data, known, client_id, notes)
    elif with_data:
        tests = read_own_tests(data, names, notes)
        gone = bool(data.train) and not Path(data.train).exists() and tests is None
        require(not gone, f"{data.train} is not there, nor a test file of the run; expected them, or --test FILE")
    # A method that weighs by the client's own prompts needs them for every answer.
    whole = (with_data and tests is None) or METHODS[method].weighed
    if whole:  # somebody may have been added to the files who has not joined
        world = load_world(config, seed)
        world = replace(world, clients=[client for client in world.clients if client.client_id in names], notes=[])
        check_contents(folder, world, seed)
    else:
        world = load_bare_world(config, known)
        check_contents(folder, world, None)
    if with_data:
        world = replace(world, tasks=read_tasks(config.evaluate))
    if tests is not None:
        there = {client.client_id: client for client in world.clients}
        own = [
            replace(there[name], test=encode(part, data, world.encoder))
            for name, part in tests.items()
            if name in there
        ]
        world = replace(world, clients=own, notes=notes)
    sites = world.sites(config, method, seed, job)
    start = next(iter(sites.values())).model.shared_arrays()
    round_index, shared = kept_shared(job, world.base.fingerprint, start)
    return Saved(job, config, world, sites, round_index, shared)


def no_client(client_id: str, world: World) -> FlexError:
    names = ", ".join(c.client_id for c in world.clients)
    return FlexError(f"no client {client_id!r} in this run; its clients are {names}")
