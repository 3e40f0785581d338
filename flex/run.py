"""A whole run: every method and seed of a configuration on the same data, resumable at any moment.

RUN/config.toml                          the resolved configuration
RUN/metrics.jsonl, RUN/report.html       what came out
RUN/<method>-seed<N>/                    one job, see `job.py`
"""

import dataclasses
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flex.config import METHODS, RunConfig, read_config, write_config
from flex.data import Encoder, load_clients, load_general
from flex.errors import FlexError
from flex.events import METRICS, Event, read_events, write_events
from flex.job import Setting, run_job
from flex.model import Base, check_targets, load_base, unwrap


@contextmanager
def progress_bars(console: Console) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[what]}"),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        yield progress


def prepare(config: RunConfig, seed: int, base: Base | None = None) -> Setting:
    """Loads the base (unless it is there) and the data of a seed."""
    base = base or load_base(config.model)
    unwrap(base)
    if any(METHODS[method].lora for method in config.train.methods):
        check_targets(base.model, config.lora.targets)
    encoder = Encoder(base.tokenizer, config.data.template, config.data.max_length)
    data = config.data.for_seed(seed)
    return Setting(base, encoder, load_clients(data, encoder), load_general(data, encoder))


def run(config: RunConfig, console: Console, title: str = "", descriptions: dict[str, str] | None = None) -> Path:
    """Trains and scores every job that is not finished, in order; returns the run's folder.

    Args:
        title, descriptions: of the run, and of each client in one line; for the report.

    Raises:
        FlexError: bad input, or the folder holds a run with other settings.
    """
    folder = Path(config.output)
    _claim(folder, config)
    if config.threads:
        torch.set_num_threads(config.threads)
    console.print(f"[dim]loading {config.model.path} ...[/dim]")
    setting = None
    with progress_bars(console) as progress:
        for seed in config.train.seeds:
            setting = prepare(config, seed, setting.base if setting else None)
            first = [_run_event(config, setting, title, descriptions or {}), *_truncation_events(config, setting)]
            write_events(folder / "run.jsonl", first)
            for method in config.train.methods:
                run_job(setting, config, method, seed, folder / f"{method}-seed{seed}", progress)
                collect(folder)
    unwrap(setting.base)
    return folder


def collect(folder: Path) -> None:
    """RUN/metrics.jsonl anew from the jobs' own files."""
    files = [folder / "run.jsonl", *sorted(folder.glob(f"*-seed*/{METRICS}"))]
    write_events(folder / METRICS, [event for file in files for event in read_events(file)])


def _claim(folder: Path, config: RunConfig) -> None:
    """Writes RUN/config.toml, or finds there the same settings."""
    path = folder / "config.toml"
    if path.exists():
        here, there = (_comparable(c) for c in (config, read_config(path)))
        different = [key for key in here if here[key] != there[key]]
        if different:
            key = different[0]
            raise FlexError(
                f"{folder} holds a run with other settings ({key} = {there[key]!r} there, {here[key]!r} here); "
                "wanted the same settings to resume it, or another --output"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_config(config, path)
    except OSError as error:
        raise FlexError(f"cannot write the run's folder {folder}: {error}") from None


def _comparable(config: RunConfig) -> dict[str, Any]:
    """Every setting that decides a job's numbers, flat."""
    train = dataclasses.replace(config.train, methods=("base",), seeds=(0,))
    tree = dataclasses.asdict(dataclasses.replace(config, output="", train=train))
    return {
        f"{section}.{key}" if isinstance(values, dict) else section: value
        for section, values in tree.items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
    }


def _run_event(config: RunConfig, setting: Setting, title: str, descriptions: dict[str, str]) -> Event:
    """What the whole run has in common: whose data, which base, which versions."""
    return {
        "event": "run",
        "title": title or config.output,
        "base_model": config.model.path,
        "fingerprint": setting.base.fingerprint,
        "template": config.data.template,
        "clients": [
            {
                "client_id": client.client_id,
                "num_train": len(client.train),
                "num_test": len(client.test),
                "description": descriptions.get(client.client_id, ""),
            }
            for client in setting.clients
        ],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "threads": torch.get_num_threads(),
    }


def _truncation_events(config: RunConfig, setting: Setting) -> list[Event]:
    return [
        {
            "event": "truncated",
            "client_id": client.client_id,
            "part": part,
            "count": count,
            "max_length": config.data.max_length,
        }
        for client in setting.clients
        for part, count in client.truncated().items()
        if count
    ]
