"""One job of the study, in a process of its own."""

import io
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.knowledge.cells import CELLS, RealText, configure, configure_dolly
from flex.config import RunConfig
from flex.runs.job import is_done
from flex.runs.run import run


def run_job(name: str, seed: int, out: Path, given: RealText | None = None) -> str:
    torch.set_num_threads(1)
    run(config_of(name, seed, out, given), Console(file=io.StringIO()))
    return f"{name} {seed}"


def config_of(name: str, seed: int, out: Path, given: RealText | None) -> RunConfig:
    """On Dolly where its files are given, else of the demo."""
    return configure_dolly(name, seed, out, given) if given else configure(name, seed, out)


def log_of(name: str, seed: int, out: Path) -> Path:
    """The folder of a job's log and files."""
    return out / name / f"seed{seed}" / f"{CELLS[name].method}-seed{seed}"


def is_left(name: str, seed: int, out: Path) -> bool:
    return not is_done(log_of(name, seed, out))
