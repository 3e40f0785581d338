"""Jobs, one after another in this process or several at once in processes of their own.

Jobs do not touch each other: each has its own folder, and its numbers depend on the method, the seed and the number of
threads alone, not on who else is at work. A process of its own loads the base again; small models gain from it (two
single-threaded jobs beat one of two threads), a large one has no room for it.
"""

import functools
import multiprocessing
import os
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from flex.config import RunConfig
from flex.errors import FlexError
from flex.federation.client_app import make_client_app
from flex.federation.local import InProcessGrid
from flex.federation.rounds import identity
from flex.runs.job import Job
from flex.runs.progress import Bar, Tell
from flex.runs.track import tracked
from flex.runs.world import Worlds

JobName = tuple[int, str]  # seed, method
POLL_S = 0.1
LEAVE_S = 30


def job_folder(folder: Path, job: JobName) -> Path:
    """Of a job of the run in `folder`."""
    seed, method = job
    return folder / f"{method}-seed{seed}"


def make_job(config: RunConfig, job: JobName, worlds: Worlds, tell: Tell) -> Job:
    """A job whose clients are all on this machine."""
    (seed, method), folder = job, job_folder(Path(config.output), job)
    bar = Bar(tracked(tell, folder, config.train.track))
    world = worlds.of(seed)
    sites = world.sites(config, method, seed, folder, bar)
    grid = InProcessGrid(
        make_client_app(lambda _, context: sites[identity(context)[0]]),
        list(sites),
        on_message=lambda message, *_: bar.say(f"{grid.clients[message.metadata.dst_node_id]} done"),
    )
    return Job(config, method, seed, folder, grid, lambda _: world.identity, bar)


def run_apart(config: RunConfig, jobs: list[JobName], lines: dict[JobName, Tell]) -> Iterator[JobName]:
    """Runs the jobs in `config.workers` processes; yields each when done.

    Raises:
        FlexError: what a job raised, or a process that died; the others are ended.
    """
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    shares = [share for i in range(config.workers) if (share := jobs[i :: config.workers])]
    processes = [context.Process(target=_work, args=(config, share, messages), daemon=True) for share in shares]
    for process in processes:
        process.start()
    try:
        waiting = set(jobs)
        while waiting:
            try:
                job, call, arguments = messages.get(timeout=POLL_S)
            except queue.Empty:
                dead = [p.exitcode for p in processes if p.exitcode]
                if dead:
                    raise FlexError(f"a worker process ended with code {dead[0]}; its traceback is above") from None
                continue
            if call == "failed":
                raise FlexError(arguments["reason"])
            if call == "done":
                waiting.discard(job)
                yield job
            else:
                lines[job](**arguments)
    finally:
        for process in processes:
            process.join(0 if waiting else LEAVE_S)
            process.terminate()


def _end_with_parent() -> None:
    """Waits for whoever started the run to be gone, even by SIGKILL: a resumed run must find nobody at work."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(config: RunConfig, jobs: list[JobName], messages: multiprocessing.Queue) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(config.threads or max(1, torch.get_num_threads() // config.workers))

    def tell(job: JobName, **arguments: object) -> None:
        messages.put((job, "tell", arguments))

    lines = {job: functools.partial(tell, job) for job in jobs}
    worlds = Worlds(config)
    try:
        for job in jobs:
            make_job(config, job, worlds, lines[job]).run()
            messages.put((job, "done", {}))
    except FlexError as error:
        messages.put((jobs[0], "failed", {"reason": str(error)}))
