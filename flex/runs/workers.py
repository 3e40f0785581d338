"""Jobs, one after another in this process or several at once in processes of their own.

Jobs do not touch each other: each has its own folder, and its numbers depend on the method, the seed and the number of
threads alone, not on who else is at work. A process of its own loads the base again; small models gain from it (two
single-threaded jobs beat one of two threads), a large one has no room for it.
"""

import multiprocessing
import os
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from flex.config import RunConfig
from flex.data.examples import Encoder, load_clients, load_general
from flex.errors import FlexError
from flex.model.adapters import unwrap
from flex.model.base import Base, load_base
from flex.runs.job import Setting, run_job
from flex.runs.progress import Bar, JobName, RemoteBar

POLL_S = 0.1
LEAVE_S = 30


def prepare(config: RunConfig, seed: int, base: Base | None = None) -> Setting:
    """Loads the base (unless it is there) and the data of a seed."""
    base = base or load_base(config.model)
    unwrap(base)
    encoder = Encoder(base.tokenizer, config.data.template, config.data.max_length)
    data = config.data.for_seed(seed)
    return Setting(base, encoder, load_clients(data, encoder), load_general(data, encoder))


def run_here(config: RunConfig, jobs: list[JobName], bars: dict[JobName, Bar], setting: Setting) -> Iterator[JobName]:
    """Runs the jobs in order on the base of `setting`, which is that of the first job's seed; yields each when done."""
    loaded = jobs[0][0]
    for seed, method in jobs:
        if seed != loaded:
            setting, loaded = prepare(config, seed, setting.base), seed
        run_job(setting, config, method, seed, job_folder(config, (seed, method)), bars[seed, method])
        yield seed, method
    unwrap(setting.base)


def run_apart(config: RunConfig, jobs: list[JobName], bars: dict[JobName, Bar]) -> Iterator[JobName]:
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
                raise FlexError(*arguments)
            if call == "done":
                waiting.discard(job)
                yield job
            else:
                getattr(bars[job], call)(*arguments)
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
    bars = {job: RemoteBar(messages, job) for job in jobs}
    try:
        for job in run_here(config, jobs, bars, prepare(config, jobs[0][0])):
            messages.put((job, "done", ()))
    except FlexError as error:
        messages.put((jobs[0], "failed", (str(error),)))


def job_folder(config: RunConfig, job: JobName) -> Path:
    seed, method = job
    return Path(config.output) / f"{method}-seed{seed}"
