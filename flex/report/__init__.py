"""What came out of a run, for people: a table in the terminal, findings in sentences, one HTML page.

events = read_events(run_dir)          every event of RUN/metrics.jsonl
summary = summarise(events)            one row per method: means and spreads over seeds, and every seed's value
terminal_table(summary)                a rich table, at most 100 columns wide
findings(summary)                      sentences, the most important first; a control that is as good is named
write_report(run_dir)                  RUN/report.html: one file, no scripts, nothing fetched from anywhere

Drawing and the template engine are imported only when a page is written.
"""

from flex.report.findings import findings
from flex.report.numbers import read_events, summarise
from flex.report.terminal import terminal_table, write_report

__all__ = ["findings", "read_events", "summarise", "terminal_table", "write_report"]
