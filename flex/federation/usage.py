"""What a round costs beside the clients' work, and what memory a process takes."""

import resource
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from flex.store.events import Exchanged

UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
TURN_SECONDS, PEAK_BYTES = "turn-seconds", "peak-bytes"  # of a turn's metrics


def peak_bytes() -> int:
    """The largest resident set that this process has had, in bytes; memory of a GPU is not in it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT


def exchanged(round_index: int, seconds: float, turns: Iterable[Mapping[str, Any]], side_by_side: bool) -> Exchanged:
    """A round's exchange, as this process saw it.

    Args:
        seconds: of the whole of it.
        turns: the metrics of the clients' turns; one that does not say how long it took counts for nothing.
        side_by_side: whether clients worked at the same time, each in a process of its own.
    """
    took = [float(metrics.get(TURN_SECONDS, 0.0)) for metrics in turns]
    return Exchanged(round_index, seconds, (max if side_by_side else sum)(took or [0.0]), peak_bytes())
