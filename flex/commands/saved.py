"""`flex eval` and `flex generate`: what a run saved, loaded again."""

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flex.config import METHODS, read_config
from flex.errors import FlexError, require
from flex.evaluation.score import generate as greedy
from flex.federation.client import ClientRuntime
from flex.runs.job import Setting, latest_shared
from flex.runs.workers import prepare

console = Console()


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
