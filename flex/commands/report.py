"""`flex report` and `flex compare`: the page of a run, and of several, from their logs."""

from collections.abc import Sequence
from pathlib import Path

from flex.errors import require
from flex.report import layers
from flex.report.flat import flat_rows, write_csv, write_text
from flex.report.terminal import read_events, summarise, write_report


def report(folder: Path, csv: Path | None = None, details: Path | None = None) -> int:
    """Writes report.html, and with `csv` the scores as a table, with `details` what messages and layers measured."""
    require(
        bool(read_events(folder)),
        f"{folder} has nothing to report yet; expected a run with events in metrics.jsonl",
    )
    print(write_report(folder))
    if csv is not None:
        print(write_csv(csv, flat_rows(summarise(read_events(folder)), folder.name)))
    if details is not None:
        rows = layers.detail_rows(summarise(read_events(folder)), folder.name)
        print(write_csv(details, rows, layers.COLUMNS))
    return 0


def compare(folders: Sequence[Path], target: Path, csv: Path | None, latex: Path | None) -> int:
    """Writes one page over several runs, and what else is asked for."""
    from flex.report import compare

    runs = compare.load(folders)
    print(write_text(target, compare.page(runs)))
    if csv is not None:
        print(write_csv(csv, [row for run in runs for row in flat_rows(run.summary, run.name)]))
    if latex is not None:
        print(write_text(latex, compare.latex(runs)))
    return 0
