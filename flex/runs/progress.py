"""The progress of a job on the terminal, also from another process."""

import multiprocessing

from rich.progress import Progress, TaskID

JobName = tuple[int, str]  # seed, method


class Bar:
    """The progress of one job on the terminal."""

    def __init__(self, progress: Progress, title: str):
        self.progress = progress
        self.task: TaskID = progress.add_task(title, total=None, what="", start=False)

    def begin(self, total: int) -> None:
        self.progress.update(self.task, total=total)
        self.progress.start_task(self.task)

    def step(self, steps: int = 1) -> None:
        self.progress.advance(self.task, steps)

    def say(self, what: str) -> None:
        self.progress.update(self.task, what=what)

    def end(self) -> None:
        self.progress.stop_task(self.task)


class RemoteBar:
    """The same, from another process: calls go through a queue to the one that owns the terminal."""

    def __init__(self, messages: multiprocessing.Queue, job: JobName):
        self.messages, self.job = messages, job

    def begin(self, total: int) -> None:
        self.messages.put((self.job, "begin", (total,)))

    def step(self, steps: int = 1) -> None:
        self.messages.put((self.job, "step", (steps,)))

    def say(self, what: str) -> None:
        self.messages.put((self.job, "say", (what,)))

    def end(self) -> None:
        self.messages.put((self.job, "end", ()))
