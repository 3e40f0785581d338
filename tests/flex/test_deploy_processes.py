"""Child processes: they end with who started them, what they last said is known, and what fails is a sentence."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flex.deploy import processes
from flex.deploy.processes import Child, Flower, call, environment, program, until_stopped
from flex.errors import FlexError


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_child_is_heard_and_ended(tmp_path):
    code = "import sys, time; print('ready now', flush=True); time.sleep(60)"
    child = Child([sys.executable, "-c", code], os.environ, tmp_path / "log")
    ends = time.monotonic() + 20
    while not child.said("ready"):
        assert time.monotonic() < ends
        time.sleep(0.02)
    assert child.ended is None
    child.end()
    assert child.ended == -15
    assert (tmp_path / "log").read_text() == "ready now\n"


def test_a_child_that_does_not_listen_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "END_S", 0.2)
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    child = Child([sys.executable, "-c", code], os.environ, tmp_path / "log")
    while not child.said("deaf"):
        time.sleep(0.02)
    child.end()
    assert child.ended == -9


def test_a_child_does_not_outlive_who_started_it(tmp_path):
    code = (
        "import os, sys, time; from pathlib import Path; from flex.deploy.processes import Child;"
        f"c = Child([sys.executable, '-c', 'import time; time.sleep(60)'], os.environ, Path({str(tmp_path / 'l')!r}));"
        "print(c.process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    ends = time.monotonic() + 20
    while alive(pid):
        assert time.monotonic() < ends
        time.sleep(0.02)


PARENT = "import subprocess, sys, time; p = subprocess.Popen(sys.argv[1:]); print(p.pid, flush=True); time.sleep(60)"


@pytest.fixture
def superexec(tmp_path, monkeypatch) -> Path:
    """Ends at the first line that it is told, and at the end of what it is told."""
    path = tmp_path / "flower-superexec"
    path.write_text("#!/bin/sh\necho here $*\nread line\n")
    path.chmod(0o755)
    monkeypatch.setattr(processes, "program", lambda name: str(tmp_path / name))
    return path


def soon(is_so) -> None:
    ends = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_a_superexec_that_has_ended_is_replaced(tmp_path, superexec):
    child = Flower([sys.executable, "-c", PARENT, str(superexec)], os.environ, tmp_path / "log", ["--at", "x"])
    try:
        soon(child.look_after)  # its standard input is closed: it ends by itself, and nobody waits for it
        soon(child.look_after)  # so does the other one
        assert child.ended is None
        soon(lambda: f"here --at x --parent-pid {child.process.pid}" in (tmp_path / "log").read_text())
    finally:
        child.end()
    assert not child.look_after()


def test_a_superexec_that_is_at_work_is_left_alone(tmp_path, superexec):
    superexec.write_text("#!/bin/sh\necho here\nexec sleep 60\n")
    child = Flower([sys.executable, "-c", PARENT, str(superexec)], os.environ, tmp_path / "log", [])
    try:
        soon(lambda: child.said("here"))
        assert not child.look_after()
        pid = int(Path(f"/proc/{child.process.pid}/task/{child.process.pid}/children").read_text())
    finally:
        child.end()
    os.kill(pid, 9)


def test_a_call_that_fails_gives_its_last_line(tmp_path):
    assert call([sys.executable, "-c", "print(3)"], environment(tmp_path)) == "3\n"
    with pytest.raises(FlexError, match=r"failed: the reason$"):
        call([sys.executable, "-c", "print('much'); raise SystemExit('the reason')"], environment(tmp_path))


def test_a_call_that_hangs_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "CALL_S", 0.2)
    with pytest.raises(FlexError, match=r"gave no answer within 0.2 s"):
        call([sys.executable, "-c", "import time; time.sleep(60)"], environment(tmp_path))


def test_flowers_programs_are_found_or_named():
    assert Path(program("flower-superlink")).exists()
    with pytest.raises(FlexError, match="flower-something is not installed beside"):
        program("flower-something")


def test_a_signal_asks_to_stop():
    with until_stopped() as stopped:
        os.kill(os.getpid(), 15)
        assert stopped.wait(5)
