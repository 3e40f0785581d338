"""One job of the study, in a process of its own."""

import io
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.study.variants import configure
from flex.runs.run import run


def run_job(job: tuple[str, str, int], out: Path, base: Path | None, dolly: Path | None) -> str:
    torch.set_num_threads(1)
    config = configure(*job, out, base, dolly)
    run(config, Console(file=io.StringIO()))
    return " ".join(map(str, job))
