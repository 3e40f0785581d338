"""What the commands of `cli.py` do. Each takes plain values, prints to the terminal, and returns the exit code."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flex import graft as grafting
from flex.client import ClientRuntime, derived_seed
from flex.config import METHODS, RunConfig, read_config
from flex.demo import demo_config, describe_clients, write_demo_data
from flex.errors import FlexError, require
from flex.evaluate import generate as greedy
from flex.graft_view import choice_table, curves, heat_map, write_picture
from flex.job import Setting, latest_shared
from flex.report import findings, read_events, summarise, terminal_table, write_report
from flex.run import progress_bars, run
from flex.state import folder_name
from flex.workers import prepare

console = Console()


def demo(folder: Path, overrides: list[str]) -> int:
    """Generates the data of each seed, then does what `train` does."""
    config = demo_config(folder, overrides)
    for seed in config.train.seeds:
        write_demo_data(Path(config.data.for_seed(seed).train).parent, seed)
    title = "FLEx demo: five clients, conventions of their own, one new skill in common"
    return _run_and_report(config, title, describe_clients(config.train.seeds[0]))


def train(path: Path | None, overrides: list[str]) -> int:
    """Every method and seed of a configuration, from data to report; resumes what was stopped."""
    return _run_and_report(read_config(path, overrides))


def _run_and_report(config: RunConfig, title: str = "", descriptions: dict[str, str] | None = None) -> int:
    folder = run(config, console, title, descriptions)
    summary = summarise(read_events(folder))
    console.print(terminal_table(summary, console.width))
    for sentence in findings(summary):
        console.print(f"- {sentence}", markup=False, emoji=False)
    console.out(f"\nreport: {write_report(folder)}", highlight=False)
    return 0


def graft(path: Path | None, overrides: list[str], client_id: str | None) -> int:
    """What `flex` would graft for each client and layer, by how much, and a picture of it in the run's folder."""
    config = read_config(path, overrides)
    if config.threads:
        torch.set_num_threads(config.threads)
    seed = config.train.seeds[0]
    setting = prepare(config, seed)
    if client_id is not None and client_id not in {c.client_id for c in setting.clients}:
        raise _no_client(client_id, setting)
    for client in setting.clients:
        if client_id in (None, client.client_id):
            examples = client.train[: config.graft.calibration_sequences]
            folder = Path(config.output) / "graft" / folder_name(client.client_id)
            with _calibration_bar(client.client_id) as progress:
                choices = grafting.choose_grafts(
                    setting.base,
                    setting.encoder,
                    examples,
                    config.graft.of(METHODS["flex"]),
                    config.evaluate.batch_size,
                    str(derived_seed("graft", seed, client.client_id)),
                    folder,
                    progress,
                )
            console.print(choice_table(client.client_id, len(examples), choices))
            console.print(heat_map(choices, console.width))
            console.print(curves(choices))
            picture = write_picture(folder / "choice.png", client.client_id, choices)
            console.out(f"picture: {picture}\n", highlight=False)
    return 0


@contextmanager
def _calibration_bar(client_id: str) -> Iterator[grafting.Progress]:
    """A bar on a terminal, nothing elsewhere."""
    if not console.is_terminal:
        yield lambda what, done, total: None
        return
    with progress_bars(console) as bars:
        task = bars.add_task(client_id, total=None, what="")

        def show(what: str, done: int, total: int) -> None:
            bars.update(task, completed=done, total=total, what=what)

        yield show


def evaluate(folder: Path, method: str, seed: int | None, client_id: str | None) -> int:
    """Scores on the test part from the files of the last round."""
    setting, runtime, round_index, shared = _load_run(folder, method, seed)
    table = Table(title=Text(f"{folder}, {method}, after round {round_index}", "table.title"))
    for column in ("client", "examples", "loss", "exact match", "ROUGE-L"):
        table.add_column(column, justify="left" if column == "client" else "right")
    clients = [client_id] if client_id is not None else [c.client_id for c in setting.clients]
    for name in clients:
        if name not in runtime.clients:
            raise _no_client(name, setting)
        scores = runtime.evaluate(name, round_index, shared, "after_aggregation")["test"]
        rouge = "" if scores["rouge_l"] is None else f"{scores['rouge_l']:.3f}"
        numbers = (str(scores["num_examples"]), f"{scores['loss']:.3f}", f"{scores['exact_match']:.3f}", rouge)
        table.add_row(Text(name), *numbers)
    console.print(table)
    return 0


def generate(
    folder: Path, method: str, seed: int | None, client_id: str, prompt: str, context: str, max_new_tokens: int
) -> int:
    """The answer of one client's model: shared LoRA of the last round, that client's own graft."""
    require(max_new_tokens >= 1, f"--max-new-tokens is {max_new_tokens}; wanted 1 or more")
    setting, runtime, round_index, shared = _load_run(folder, method, seed)
    if client_id not in runtime.clients:
        raise _no_client(client_id, setting)
    runtime.attach(client_id, round_index, shared)
    prompt_ids = setting.encoder.prompt_ids(prompt, context)
    print(greedy(setting.base.model, setting.encoder, [prompt_ids], max_new_tokens)[0])
    return 0


def _load_run(folder: Path, method: str, seed: int | None) -> tuple[Setting, ClientRuntime, int, dict]:
    if not (folder / "config.toml").exists():
        raise FlexError(f"no run at {folder}; wanted a folder that `flex train` or `flex demo` wrote")
    config = read_config(folder / "config.toml")
    if method not in METHODS:
        raise FlexError(f"--method is {method!r}; wanted one of {', '.join(METHODS)}")
    seed = config.train.seeds[0] if seed is None else seed
    job = folder / f"{method}-seed{seed}"
    if not job.exists():
        there = sorted(p.name for p in folder.glob("*-seed*") if p.name.rpartition("-seed")[0] in METHODS)
        raise FlexError(f"{folder} has no job {job.name}; it has {', '.join(there) or 'none yet'}")
    if config.threads:
        torch.set_num_threads(config.threads)
    setting = prepare(config, seed)
    runtime = ClientRuntime(setting.base, setting.encoder, setting.clients, setting.general, config, method, seed, job)
    round_index, shared = latest_shared(job, setting.base.fingerprint, runtime.shared_arrays())
    return setting, runtime, round_index, shared


def _no_client(client_id: str, setting: Setting) -> FlexError:
    names = ", ".join(c.client_id for c in setting.clients)
    return FlexError(f"no client {client_id!r} in this run; its clients are {names}")
