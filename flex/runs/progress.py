"""The progress of a job on the terminal, also from another process: what it tells are its events and its steps.

On a terminal a job has a bar with the time left and the loss; elsewhere it prints one line a round.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from flex.store.events import VALIDATION, Evaluated, Event, Trained

Tell = Callable[..., None]


class Bar:
    """The progress of one job: what it says goes to `tell`, in this process or through a queue to the one that owns the
    terminal."""

    def __init__(self, tell: Tell):
        self.tell = tell

    def begin(self, total: int, completed: int = 0, rounds: int = 0) -> None:
        """`total` steps, `completed` of them in an earlier process; `rounds` in all."""
        self.tell(total=total, completed=completed, rounds=rounds)

    def step(self, steps: int = 1) -> None:
        self.tell(advance=steps)

    def say(self, what: str) -> None:
        self.tell(what=what)

    def hear(self, events: Sequence[Event]) -> None:
        """What the log has just been told; all of a round at once."""
        self.tell(events=events)

    def end(self, what: str) -> None:
        self.tell(ended=True, what=what)


@contextmanager
def job_lines(console: Console) -> Iterator[Callable[[str], Tell]]:
    """Gives each job, by its title, a place where it is told how far it is."""
    if not console.is_terminal:
        yield functools.partial(printed_line, console)
        return
    with progress_bars(console) as progress:
        yield functools.partial(line_of, progress)


@contextmanager
def progress_bars(console: Console) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description:<18}", markup=False),
        BarColumn(bar_width=16),
        MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=5)),
        TimeRemainingColumn(elapsed_when_finished=True, table_column=Column(no_wrap=True, min_width=7)),
        TextColumn("{task.fields[what]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        yield progress


def line_of(progress: Progress, title: str) -> Tell:
    """A line of the terminal for one job, with the time left; at its end the time that it took."""
    task = progress.add_task(title, total=None, what="", start=False)
    loss = ""

    def tell(
        ended: bool = False, events: Sequence[Event] = (), rounds: int = 0, what: str | None = None, **changes: Any
    ) -> None:
        nonlocal loss
        if "total" in changes:
            progress.reset(task, total=changes.pop("total"), completed=changes.pop("completed", 0))
        if found := losses(events):
            loss = f"{found}, "
        if what is not None:
            changes["what"] = what if ended else loss + what
        progress.update(task, **changes)
        if ended:
            progress.stop_task(task)

    return tell


def printed_line(console: Console, title: str) -> Tell:
    """For one job a line for every round, and one for its end."""
    last, planned, said = time.monotonic(), 0, ""
    seconds: list[float] = []

    def tell(
        ended: bool = False, events: Sequence[Event] = (), rounds: int = 0, what: str | None = None, **changes: Any
    ) -> None:
        nonlocal last, planned, said
        if "total" in changes:
            last, planned = time.monotonic(), rounds
        said = said if what is None else what
        if found := losses(events):
            now = time.monotonic()
            seconds.append(now - last)
            last, at = now, max(event.round for event in events if isinstance(event, Trained))
            left = statistics.fmean(seconds) * (planned - at)
            line = f"{title}: round {at}/{planned}, {found}, {duration(seconds[-1])}, {duration(left)} left"
            console.out(line, highlight=False)
        if ended:
            console.out(f"{title}: {said}", highlight=False)

    return tell


def losses(events: Sequence[Event]) -> str:
    """The mean loss of a round over its clients, and that on their validation parts; empty for other events."""
    trained = [event.loss for event in events if isinstance(event, Trained) and event.loss is not None]
    held = [event.loss for event in events if isinstance(event, Evaluated) and event.split == VALIDATION]
    if not trained:
        return ""
    return f"loss {statistics.fmean(trained):.4g}" + (f", validation {statistics.fmean(held):.4g}" if held else "")


def duration(seconds: float) -> str:
    """As "4.2 s", "3 min 5 s", "2 h 10 min"."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
