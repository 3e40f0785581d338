"""A kernel that takes the device with it ends the run at its own test, instead of failing all that come after."""

import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent / "support"
CONFTEST = """
import sys
sys.path.insert(0, {support!r})
from lost_device import end_if_lost

lost = []

def synchronize():
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\\nmore words")

def pytest_runtest_logreport(report):
    if report.failed and "loses" in report.nodeid:
        lost.append(report.nodeid)
    end_if_lost(report, synchronize)
"""
TESTS = """
def test_fails_and_nothing_else(): assert False
def test_loses_the_device(): raise RuntimeError("the first to see it")
def test_comes_after(): assert False
"""


def run(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    (folder / "conftest.py").write_text(CONFTEST.format(support=str(SUPPORT)))
    (folder / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_run_ends_and_prints_what_failed_so_far(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.returncode == 1
    assert "the device is lost after test_some.py::test_loses_the_device: CUDA error: an illegal" in result.stdout
    assert "FAILED test_some.py::test_fails_and_nothing_else" in result.stdout
    assert "test_comes_after" not in result.stdout


def test_a_worker_of_xdist_ends_at_once_with_the_reason(tmp_path: Path) -> None:
    result = run(tmp_path, PYTEST_XDIST_WORKER="gw0")
    assert result.returncode == 1
    assert "the device is lost after test_some.py::test_loses_the_device" in result.stderr
    assert "the first to see it" in result.stderr
    assert "test_comes_after" not in result.stdout + result.stderr
