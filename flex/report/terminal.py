"""The table of a run in the terminal, and the writing of its page."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flex.report import numbers
from flex.report.findings import findings
from flex.report.flat import write_text
from flex.report.numbers import Measure, Row, read_events, summarise

__all__ = ["findings", "read_events", "summarise", "terminal_table", "write_report"]

TABLE_WIDTH = 100


def terminal_table(summary: list[Row], columns: int = TABLE_WIDTH) -> Table:
    """Methods x measures after aggregation; what does not fit into `columns` (at most 100) stays for the report.

    Where general questions come in groups, groups stand for the whole if they fit: what clients teach otherwise cannot
    be kept, what nobody touches can.
    """
    columns = min(columns, TABLE_WIDTH)
    found, primary = numbers.measures(summary), numbers.primary_measure(summary)

    def dispensable(measure: Measure) -> int:
        """The highest is dropped first, the last of several; the headline score is dropped last."""
        if measure == primary:
            return 0
        if measure.split == "general":
            return 5 if not measure.kind.is_share else 4 if measure.group else 1
        return 3 if not measure.kind.is_share else 2 if measure.group else 1

    shares = [measure for measure in found if measure.kind.is_share]
    grouped = {(measure.split, measure.name) for measure in shares if measure.group}
    if any(split == "general" for split, _ in grouped):
        in_groups = [m for m in shares if m.group or m == primary or (m.split, m.name) not in grouped]
        table = _table(summary, in_groups, left_out=len(found) - len(in_groups))
        if _width(table) <= columns:
            return table
    shown = list(found)
    while True:
        table = _table(summary, shown, left_out=len(found) - len(shown))
        if _width(table) <= columns or len(shown) <= 1:
            table.width = min(_width(table), columns)
            return table
        shown.remove(max(reversed(shown), key=dispensable))


def _width(table: Table) -> int:
    return Console(width=10_000).measure(table).maximum


def _table(summary: list[Row], shown: list[Measure], left_out: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, caption_justify="left", caption_style="dim")
    table.add_column("Method", no_wrap=True)
    for measure in shown:
        # Each word on its own line: headings are never wider than their numbers need.
        heading = measure.title.replace(" %", "\u00a0%").replace(" ", "\n")
        table.add_column(Text(heading), justify="right", no_wrap=True)
    table.add_column("sent per\nround", justify="right", no_wrap=True)
    best = {measure: numbers.best_methods(summary, measure) for measure in shown}
    for row in summary:
        cells = []
        for measure in shown:
            stat = row.after.get(measure)
            text = measure.format(stat.mean, stat.spread) if stat else "–"
            cells.append(Text(text, style="bold" if row.method in best[measure] else ""))
        sent = numbers.format_bytes(row.bytes_per_round["up"]) if row.bytes_per_round else "–"
        table.add_row(Text(row.label + ("" if row.finished else " (unfinished)")), *cells, sent)
    seeds = max((len(row.seeds) for row in summary), default=0)
    over = f" ± deviation over {seeds} seeds" if seeds > 1 else ", one seed"
    more = f"; {left_out} more in the report" if left_out else ""
    table.caption = f"after aggregation, mean over clients{over}{more}"
    return table


def write_report(run_dir: Path | str) -> Path:
    """Writes RUN/report.html from RUN/metrics.jsonl (and RUN/config.toml where there is one); whole or not at all.

    Raises:
        FlexError: `run_dir` holds no metrics, or the report cannot be written.
    """
    from flex.report.page import Run, page

    run_dir = Path(run_dir)
    events = read_events(run_dir)
    config = run_dir / "config.toml"
    text = page(Run(events, config.read_text(encoding="utf-8") if config.is_file() else ""))
    return write_text(run_dir / "report.html", text)
