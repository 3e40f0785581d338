"""A GPU that an illegal access has taken: every later call of the process fails, so one bad kernel would look like
hundreds of failing tests. The process ends after the first instead."""

import os
import sys
from collections.abc import Callable

import pytest


def end_if_lost(report: pytest.TestReport, synchronize: Callable[[], None]) -> None:
    """After a failed test: if the device does not answer any more, says which test took it, and ends.

    A worker of pytest-xdist ends at once: xdist names the test and starts another worker for the rest.

    Args:
        synchronize: waits for the device; raises RuntimeError where it is lost.
    """
    if not report.failed:
        return
    try:
        synchronize()
    except RuntimeError as lost:
        why = f"the device is lost after {report.nodeid}: {str(lost).splitlines()[0]}"
        if "PYTEST_XDIST_WORKER" in os.environ:
            print(why, report.longreprtext, sep="\n", file=sys.__stderr__, flush=True)
            os._exit(1)
        pytest.exit(why, returncode=1)
