"""`train.track`: the events of a job as scalars for TensorBoard, in RUN/tensorboard/<method>-seed<N>/.

A job that goes on writes its folder anew from its log, so that the curves are those of the log, whatever was stopped.
"""

import shutil
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flex.errors import FlexError
from flex.evaluation.measures import KINDS
from flex.runs.progress import Tell
from flex.store.events import AFTER, METRICS, Evaluated, Event, Trained, read_events

FOLDER = "tensorboard"


def check_track(track: str) -> None:
    """Raises FlexError where the package is missing that `train.track` names."""
    if track:
        _writer_class()


def tracked(tell: Tell, job: Path, track: str) -> Tell:
    """Hands on what a job tells, and where `track` says so writes its scalars beside the job's folder."""
    if not track:
        return tell
    writer: Any = None

    def listen(**told: Any) -> None:
        nonlocal writer
        if "total" in told:  # the job begins, or goes on: its log is what it was stopped with
            folder = job.parent / FOLDER / job.name
            shutil.rmtree(folder, ignore_errors=True)
            writer = _writer_class()(str(folder))
            _add(writer, read_events(job / METRICS))
        elif writer is not None and told.get("events"):
            _add(writer, told["events"])
            writer.flush()
        if told.get("ended") and writer is not None:
            writer.close()
        tell(**told)

    return listen


def _writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise FlexError(
            'train.track is "tensorboard", which is not installed; expected pip install tensorboard (the extra '
            '"tensorboard" of this package), or train.track = ""'
        ) from None
    return SummaryWriter


def _add(writer: Any, events: Iterable[Event]) -> None:
    for name, value, at in scalars(events):
        writer.add_scalar(name, value, at)


def scalars(events: Iterable[Event]) -> Iterator[tuple[str, float, int]]:
    """(name, value, round): of each client, and the mean over the clients of a round."""
    means: dict[tuple[str, int], list[float]] = {}
    for event in events:
        for name, value in _values(event):
            yield f"{name}/{event.client_id}", value, event.at_round
            means.setdefault((name, event.at_round), []).append(value)
    for (name, at), values in means.items():
        yield f"{name}/mean", statistics.fmean(values), at


def _values(event: Event) -> Iterator[tuple[str, float]]:
    if isinstance(event, Trained):
        if event.loss is not None:
            yield "train loss", event.loss
        if event.opening:
            yield "gate opening", statistics.fmean(event.opening)
        if event.bytes_up is not None:
            yield "bytes sent", event.bytes_up
    elif isinstance(event, Evaluated) and event.when == AFTER:
        for key in KINDS:
            if (value := getattr(event, key)) is not None:
                yield f"{event.split} {key}", value
