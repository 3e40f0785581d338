"""Flower's own programs as child processes: their environment, their start, their end, what they last said."""

import collections
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from flex.errors import FlexError

END_S = 20.0
PR_SET_PDEATHSIG = 1  # of Linux's prctl
_LIBC = ctypes.CDLL(None)
CALL_S = 120.0
SUPEREXEC = "flower-superexec"
NAME = 15  # letters of a program's name that the kernel keeps


def environment(home: Path) -> dict[str, str]:
    """For Flower's programs: nothing leaves but what they are for, nothing is installed, and they find each other."""
    own = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": f"{own}{os.pathsep}{os.environ.get('PATH', os.defpath)}",  # they start each other by bare names
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": os.environ.get("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.2"),
        "PYTHONWARNINGS": "ignore",
    }


def program(name: str) -> str:
    """The path of one of Flower's programs; FlexError where it is not installed."""
    found = shutil.which(name, path=environment(Path())["PATH"])
    if found is None:
        raise FlexError(f"{name} is not installed beside {sys.executable}; expected `pip install flwr`")
    return found


def free_port() -> int:
    """A port of this machine that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_port(host: str, port: int) -> None:
    """Raises FlexError where the port cannot be listened at."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise FlexError(
                f"cannot listen at {host}:{port} ({error.strerror}); expected a free port (another server may run)"
            ) from None


def _end_with_parent() -> None:
    """In a child, before its program starts: whoever started it may be killed without a chance to end it."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has just ended
        return ""


def children(pid: int) -> list[int]:
    """The processes that this one has started, those among them that ended unnoticed; none where it is gone."""
    return [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in _read(path).split()]


def _is_dead(pid: int, name: str) -> bool:
    """Whether a process has ended, unnoticed by who started it."""
    before, _, after = _read(Path(f"/proc/{pid}/stat")).rpartition(")")
    return before.endswith(f"({name[:NAME]}") and after.split()[0] == "Z"


class Child:
    """A child process whose output goes to a log file or the terminal, and whose last lines are kept. It ends with the
    thread that started it."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path | None = None):
        self.last: collections.deque[str] = collections.deque(maxlen=40)
        self.process = subprocess.Popen(
            list(command),
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            preexec_fn=_end_with_parent,
        )
        self._reader = threading.Thread(target=self._read, args=(log,), daemon=True)
        self._reader.start()

    def _read(self, log: Path | None) -> None:
        file = log.open("a", encoding="utf-8") if log else sys.stderr
        try:
            with self.process.stdout as lines:
                for line in lines:
                    self.last.append(line.rstrip())
                    file.write(line)
                    file.flush()
        finally:
            if log:
                file.close()

    @property
    def ended(self) -> int | None:
        """Its exit status, once it has ended."""
        return self.process.poll()

    def said(self, *words: str) -> bool:
        """Whether one of `words` is among its last lines."""
        self._reader.join(1 if self.ended is not None else 0)
        return any(word in line for line in self.last for word in words)

    def end(self) -> None:
        """Ends it: first asks, then insists."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(END_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(1)


class Flower(Child):
    """A SuperLink or a SuperNode, and the SuperExec that starts the apps of its runs or messages.

    Flower's programs start one and never look at it again; it ends at the first answer that it does not expect (a
    database that is locked for a moment, of a busy machine), and they would take everything in and start nothing.

    Args:
        runtime: the options by which a SuperExec finds the program.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path | None, runtime: Sequence[str]):
        super().__init__(command, env, log)
        self._again = [program(SUPEREXEC), *runtime, "--parent-pid", str(self.process.pid)], env, log
        self._superexec: Child | None = None

    def look_after(self) -> bool:
        """Starts another SuperExec where the last one has ended; whether it had to."""
        if self.ended is not None or not self._has_lost_it():
            return False
        self._superexec = Child(*self._again)
        return True

    def _has_lost_it(self) -> bool:
        if self._superexec is not None:
            return self._superexec.ended is not None
        return any(_is_dead(pid, SUPEREXEC) for pid in children(self.process.pid))

    def end(self) -> None:
        super().end()
        if self._superexec is not None:
            self._superexec.end()


@contextmanager
def until_stopped() -> Iterator[threading.Event]:
    """SIGTERM and SIGINT set the event instead of ending the process at once."""
    stopped = threading.Event()
    before = {sign: signal.signal(sign, lambda *_: stopped.set()) for sign in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)


def call(command: Sequence[str], env: Mapping[str, str]) -> str:
    """What one of Flower's commands prints on its standard output.

    Raises:
        FlexError: it fails, or takes too long; with the last line it said.
    """
    name = " ".join(Path(word).name for word in command[:3])
    try:
        done = subprocess.run(
            list(command), env=dict(env), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CALL_S
        )
    except subprocess.TimeoutExpired:
        raise FlexError(f"`{name}` gave no answer within {CALL_S:g} s") from None
    if done.returncode:
        lines = [line.strip(" │╭╰─╮╯") for line in (done.stdout + done.stderr).splitlines()]
        said = next((line for line in reversed(lines) if line), "nothing")
        raise FlexError(f"`{name}` failed: {said}")
    return done.stdout
