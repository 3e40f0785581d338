"""Real processes on loopback: a server, a worker and a SuperNode a site, each ended by its own test, by its own id.

Not collected by a plain `pytest`: `make test-flower` and `make test-flower-all` name these files.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from same_run import without_times
from tiny import read_log

from flex.deploy.processes import free_port

ROOT = Path(__file__).resolve().parents[2]
SITES = ("farm", "clinic", "workshop")
# Generous: what is waited for is a fact, not a time, and a machine may be busy.
START_S, RUN_S, END_S = 240.0, 900.0, 60.0


def environment() -> dict[str, str]:
    own = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": own, "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}


def until(what: str, is_so: Callable[[], object], seconds: float = START_S) -> None:
    ends = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < ends, f"{what}: not within {seconds} s"
        time.sleep(0.2)


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


class Process:
    """One `flex` command in a process group of its own, with its output in a file."""

    def __init__(self, log: Path, *words: object):
        self.log, self.words = log, [str(word) for word in words]
        with log.open("ab") as out:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "flex.cli", *self.words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=environment(),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    def said(self, text: str) -> bool:
        return text in self.log.read_text(errors="replace")

    def ended(self) -> bool:
        return self.popen.poll() is not None

    def kill(self) -> None:
        """As a crash: no chance to tidy up."""
        self.popen.kill()
        self.popen.wait(END_S)

    def end(self) -> None:
        """Asks first; what is left of its process group is then killed."""
        if not self.ended():
            self.popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(END_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.popen.wait(END_S)


class Federation:
    """A federation on this machine, from `flex deploy example` on."""

    def __init__(self, folder: Path, sites: Sequence[str] = SITES):
        self.folder, self.sites, self.port = folder, tuple(sites), free_port()
        self.fed, self.example = folder / "fed", folder / "example"
        self.running: dict[str, Process] = {}
        self.started: list[Process] = []  # all of them: a name is taken over by who starts under it next
        self.flex("deploy", "example", self.example)

    def flex(self, *words: object, code: int = 0, seconds: float = RUN_S) -> str:
        """A `flex` command to its end; what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "flex.cli", *map(str, words)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=environment(),
            timeout=seconds,
        )
        assert done.returncode == code, f"{words}: code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def init(self, *options: str) -> None:
        address = f"127.0.0.1:{self.port}"
        self.flex(
            *("deploy", "init", self.fed, self.example / "flex.toml", "--address", address),
            *("--sites", *self.sites, *options),
        )

    def start(self, name: str, *words: object, ready: str = "") -> Process:
        self.running[name] = process = Process(self.folder / f"{name}-{len(self.started)}.log", *words)
        self.started.append(process)
        if ready:
            until(f"{name} says {ready!r}", lambda: process.said(ready) or process.ended())
            assert process.said(ready), process.log.read_text()
        return process

    def server(self) -> Process:
        return self.start("server", "deploy", "server", self.fed, "--listen", "127.0.0.1", ready="ready at")

    def package(self, site: str) -> Path:
        return self.fed / "packages" / site

    def worker(self, site: str, *options: object) -> Process:
        own = self.example / site
        return self.start(
            f"worker-{site}",
            *("worker", self.package(site), "--model", self.example / "model"),
            *("--data", own / "train.jsonl", "--test", own / "test.jsonl", "--general", own / "general.jsonl"),
            *options,
        )

    def workers(self) -> None:
        for site in self.sites:
            self.worker(site)
        self.until_at_work(*self.sites)

    def until_at_work(self, *sites: str) -> None:
        """Until the workers of these sites take questions; a SuperNode that finds none ends."""
        for site in sites:
            process = self.running[f"worker-{site}"]
            until(f"worker of {site}", lambda p=process, site=site: p.said(f"site {site}:") or p.ended())
            assert not process.ended(), process.log.read_text()

    def node(self, site: str, *options: object) -> Process:
        return self.start(f"node-{site}", "node", self.package(site), *options)

    def run(self, code: int = 0, *options: object) -> str:
        return self.flex("deploy", "run", self.fed, *options, code=code)

    def state(self, site: str, job: str) -> Path:
        return next((self.package(site) / "state").glob(f"*/{job}/clients/{site}"))

    def end(self) -> None:
        for process in reversed(self.started):
            process.end()


@contextlib.contextmanager
def federation(folder: Path, sites: Sequence[str] = SITES) -> Iterator[Federation]:
    made = Federation(folder, sites)
    try:
        yield made
    finally:
        made.end()


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def same(one: Path, other: Path) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def events(job: Path, masked: bool = False) -> list[dict]:
    """Without times, and where updates were masked without the hash of what was sent: masks are drawn anew."""
    found = without_times(read_log(job / "metrics.jsonl"))
    return [{key: value for key, value in line.items() if not (masked and key == "sha256")} for line in found]


def assert_same_run(
    alone: Path, apart: Path, personal: Callable[[str, str], Path], jobs: Sequence[str], masked: bool = False
) -> None:
    """Shared weights and strategy of the last two rounds, personal files of every site, all events, bit by bit."""
    for job in jobs:
        files = sorted((alone / job / "server").glob("*.safetensors"))
        assert len(files) == 2
        for path in files:
            assert same(path, apart / job / "server" / path.name), path
        for path in sorted((alone / job / "clients").glob("*/*.safetensors")):
            assert same(path, personal(path.parent.name, job) / path.name), path
        assert events(alone / job, masked) == events(apart / job, masked), job
