"""One job of the study, in a process of its own."""

import io
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.knowledge.cells import CELLS, configure
from flex.runs.job import is_done
from flex.runs.run import run


def run_job(name: str, seed: int, out: Path) -> str:
    torch.set_num_threads(1)
    run(configure(name, seed, out), Console(file=io.StringIO()))
    return f"{name} {seed}"


def log_of(name: str, seed: int, out: Path) -> Path:
    """The folder of a job's log and files."""
    return out / name / f"seed{seed}" / f"{CELLS[name].method}-seed{seed}"


def is_left(name: str, seed: int, out: Path) -> bool:
    return not is_done(log_of(name, seed, out))
