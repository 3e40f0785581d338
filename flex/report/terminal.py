"""What came out of a run, for people: a table in the terminal, the findings in sentences, and RUN/report.html.

events = read_events(run_dir)          every event of RUN/metrics.jsonl
summary = summarise(events)            one dict per method: means and spreads over seeds, and every seed's value
terminal_table(summary)                a rich table, at most 100 columns wide
findings(summary)                      sentences, the most important first; a control that is as good is named
write_report(run_dir)                  RUN/report.html: one file, no scripts, nothing fetched from anywhere
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flex.errors import FlexError
from flex.report.findings import findings
from flex.report.numbers import AFTER, Measure, format_bytes, measures, read_events, summarise

__all__ = ["findings", "read_events", "summarise", "terminal_table", "write_report"]

TABLE_WIDTH = 100


def terminal_table(summary: list[dict[str, Any]], columns: int = TABLE_WIDTH) -> Table:
    """Methods x measures after aggregation; what does not fit into `columns` (at most 100) stays for the report."""
    columns = min(columns, TABLE_WIDTH)
    shown = measures(summary)
    while True:
        table = _table(summary, shown, left_out=len(measures(summary)) - len(shown))
        width = Console(width=10_000).measure(table).maximum
        if width <= columns or len(shown) <= 1:
            table.width = min(width, columns)
            return table
        shown.remove(max(reversed(shown), key=_dispensable))


def _table(summary: list[dict[str, Any]], shown: list[Measure], left_out: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, caption_justify="left", caption_style="dim")
    table.add_column("Method", no_wrap=True)
    for measure in shown:
        table.add_column(Text(_heading(measure)), justify="right", no_wrap=True)
    table.add_column("sent per\nround", justify="right", no_wrap=True)
    for row in summary:
        cells = []
        for measure in shown:
            stat = row[AFTER].get(measure)
            cells.append(measure.format(stat["mean"], stat["spread"]) if stat else "–")
        sent = format_bytes(row["bytes_per_round"]["up"]) if row["bytes_per_round"] else "–"
        unfinished = "" if row["finished"] else " (unfinished)"
        style = "bold" if row["method"] == "flex" else None
        table.add_row(Text(row["label"] + unfinished), *cells, sent, style=style)
    seeds = max((len(row["seeds"]) for row in summary), default=0)
    notes = [
        "after aggregation, mean over clients" + (f" ± deviation over {seeds} seeds" if seeds > 1 else ", one seed")
    ]
    if left_out:
        notes.append(f"{left_out} more in the report")
    table.caption = "; ".join(notes)
    return table


def _dispensable(measure: Measure) -> int:
    """What a narrow table can do without first: losses, general groups, ROUGE-L (exact match says most of it)."""
    general = measure.split == "general"
    secondary = measure.name != "exact_match"
    return 4 * (general and measure.name == "loss") or 3 * (general and bool(measure.group)) or 2 * secondary


def _heading(measure: Measure) -> str:
    """Each word of a title on its own line: headings are never wider than their numbers need."""
    return "\n".join(measure.title.replace("EM %", "EM\u00a0%").split(" "))


def write_report(run_dir: Path | str) -> Path:
    """Writes RUN/report.html from RUN/metrics.jsonl (and RUN/config.toml where there is one); whole or not at all.

    Raises:
        FlexError: `run_dir` holds no metrics, or the report cannot be written.
    """
    from flex.report.html import Run
    from flex.report.page import page

    run_dir = Path(run_dir)
    events = read_events(run_dir)
    config = run_dir / "config.toml"
    text = page(Run(events, config.read_text(encoding="utf-8") if config.is_file() else ""))
    path, part = run_dir / "report.html", run_dir / ".report.html.part"
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise FlexError(f"cannot write {path}: {error}") from None
    return path
