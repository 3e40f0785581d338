"""`flex report`: the page of a run, from its log."""

from pathlib import Path

from flex.errors import require
from flex.report.terminal import read_events, write_report


def report(folder: Path) -> int:
    require(
        bool(read_events(folder)),
        f"{folder} has nothing to report yet; expected a run with events in metrics.jsonl",
    )
    print(write_report(folder))
    return 0
