"""The progress of a job on the terminal, also from another process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Tell = Callable[..., None]


class Bar:
    """The progress of one job: what it says goes to `tell`, in this process or through a queue to the one that owns the
    terminal."""

    def __init__(self, tell: Tell):
        self.tell = tell

    def begin(self, total: int) -> None:
        self.tell(total=total)

    def step(self, steps: int = 1) -> None:
        self.tell(advance=steps)

    def say(self, what: str) -> None:
        self.tell(what=what)

    def end(self) -> None:
        self.tell(ended=True)


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


def line_of(progress: Progress, title: str) -> Tell:
    """A line of the terminal for one job; it runs from the first total to the end."""
    task = progress.add_task(title, total=None, what="", start=False)

    def tell(ended: bool = False, **changes: Any) -> None:
        progress.update(task, **changes)
        if "total" in changes:
            progress.start_task(task)
        if ended:
            progress.stop_task(task)

    return tell
