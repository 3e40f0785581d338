"""A whole run: every method and seed of a configuration on the same data, resumable at any moment.

RUN/config.toml                          the resolved configuration
RUN/metrics.jsonl, RUN/report.html       what came out
RUN/<method>-seed<N>/                    one job, see `job.py`
"""

import dataclasses
import fcntl
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
from flex.errors import FlexError
from flex.federation.strategy import make_strategy
from flex.model.adapters import check_targets
from flex.runs.job import Setting
from flex.runs.progress import Bar
from flex.runs.workers import prepare, run_apart, run_here
from flex.store.events import METRICS, Event, read_events, write_events

RUN = "run.jsonl"  # what the whole run has in common


@contextmanager
def progress_bars(console: Console) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description:<18}", markup=False),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[what]}", markup=False),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        yield progress


def run(config: RunConfig, console: Console, title: str = "", descriptions: dict[str, str] | None = None) -> Path:
    """Trains and scores every job that is not finished; returns the run's folder.

    Args:
        title, descriptions: of the run, and of each client in one line; for the report.

    Raises:
        FlexError: bad input (nothing has been written then), or the folder holds a run with other settings.
    """
    folder = Path(config.output)
    config = _with_full_paths(config)
    _check_free(folder, config)
    if config.threads:
        torch.set_num_threads(config.threads)
    console.print(f"[dim]loading {config.model.path} ...[/dim]")
    setting = prepare(config, config.train.seeds[0])
    if any(METHODS[method].lora for method in config.train.methods):
        check_targets(setting.base.model, config.lora.targets)
    make_strategy(config.train.strategy, len(setting.clients), clients_per_round=config.train.clients_per_round)
    data = _check_contents(folder, setting, config.train.seeds[0])
    _claim(folder, config)
    jobs = [(seed, method) for seed in config.train.seeds for method in config.train.methods]
    with _alone_in(folder), progress_bars(console) as progress:
        event = {**_run_event(config, setting, title, descriptions or {}), "data": data}
        write_events(folder / RUN, [event, *_truncation_events(config, setting)])
        bars = {(seed, method): Bar(progress, f"{method} seed {seed}") for seed, method in jobs}
        finished = run_here(config, jobs, bars, setting) if config.workers == 1 else run_apart(config, jobs, bars)
        for _ in finished:
            collect(folder)
    return folder


def collect(folder: Path) -> None:
    """RUN/metrics.jsonl anew from the jobs' own files."""
    files = [folder / RUN, *sorted(folder.glob(f"*-seed*/{METRICS}"))]
    write_events(folder / METRICS, [event for file in files for event in read_events(file)])


def _with_full_paths(config: RunConfig) -> RunConfig:
    """What the run's own file says of files must be true from every folder."""

    def full(name: str) -> str:
        path = Path(name).expanduser()
        return str(path.absolute()) if name and (path.exists() or "{seed}" in name) else name

    files = {name: full(getattr(config.data, name)) for name in ("train", "test", "general")}
    data = dataclasses.replace(config.data, **files)
    return dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, path=full(config.model.path)))


def _check_free(folder: Path, config: RunConfig) -> None:
    """Nobody's run lies in `folder`, or one with the same settings, or one that came to nothing."""
    path = folder / "config.toml"
    if path.exists() and _has_results(folder):
        here, there = (_comparable(c) for c in (config, read_config(path)))
        different = [key for key in here if here[key] != there[key]]
        if different:
            key = different[0]
            raise FlexError(
                f"{folder} holds a run with other settings ({key} = {there[key]!r} there, {here[key]!r} here); "
                "wanted the same settings to resume it, another --output, or that folder gone"
            )


def _has_results(folder: Path) -> bool:
    """Whether a job there is finished, or has left more than its events."""
    events = (event for file in folder.glob(f"*-seed*/{METRICS}") for event in read_events(file))
    return any(folder.glob("*-seed*/**/*.safetensors")) or any(event["event"] == "done" for event in events)


def _check_contents(folder: Path, setting: Setting, seed: int) -> dict[str, str]:
    """The fingerprints of the data by seed, of this call and of earlier ones; base and data must be what they were."""
    events = read_events(folder / RUN) if _has_results(folder) else []
    old = next((event for event in events if event["event"] == "run"), {})
    if old and old["fingerprint"] != setting.base.fingerprint:
        raise FlexError(f"{folder} holds a run on another base; wanted the same one to resume it, or another --output")
    data = {**old.get("data", {}), str(seed): setting.data_fingerprint}
    if old.get("data", {}).get(str(seed), data[str(seed)]) != data[str(seed)]:
        raise FlexError(
            f"{folder} holds a run on other data (a file has changed); wanted the same, or another --output"
        )
    return data


def _claim(folder: Path, config: RunConfig) -> None:
    """Methods and seeds of earlier calls stay in the run's file: the report shows them all."""
    path = folder / "config.toml"
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
def _alone_in(folder: Path) -> Iterator[None]:
    """No two processes write one run: the system drops the lock when its holder ends, however it ends."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FlexError(
                f"another process is at work in {folder}; wanted it to end first, or another --output"
            ) from None
        yield


def _comparable(config: RunConfig) -> dict[str, Any]:
    """Every setting that decides a job's numbers, flat. Base and data are told by their content (`Job.header`)."""
    train = dataclasses.replace(config.train, methods=("base",), seeds=(0,))
    model = dataclasses.replace(config.model, path="", device="")
    data = dataclasses.replace(config.data, train="", test="", general="")
    evaluate = dataclasses.replace(config.evaluate, batch_size=1)
    parts = {"train": train, "model": model, "data": data, "evaluate": evaluate}
    tree = dataclasses.asdict(dataclasses.replace(config, output="", workers=1, **parts))
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
