"""Several runs on one page: every method of each, what differs in their settings, and the paired differences of the
methods that they have in common."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from markupsafe import Markup

from flex.errors import require
from flex.evaluation.paired import holm
from flex.report import numbers
from flex.report.findings import Difference, difference, format_p
from flex.report.numbers import Measure, Row, read_events, summarise
from flex.report.page import STYLE, environment
from flex.store.events import Event, RunStarted

LEFT_OUT = {"output", "workers", "threads", "format", "train.methods", "train.seeds"}  # of the settings' differences
LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)


@dataclass(frozen=True)
class Compared:
    """One run of the comparison. `name`: its folder's, or all of the path where two folders have one name."""

    name: str
    events: list[Event]
    config: dict[str, Any]

    @cached_property
    def summary(self) -> list[Row]:
        return summarise(self.events)

    @cached_property
    def rows(self) -> dict[str, Row]:
        return {row.method: row for row in self.summary}

    @cached_property
    def data(self) -> dict[str, str]:
        """The fingerprint of the data of each seed."""
        headers = [event for event in self.events if isinstance(event, RunStarted)]
        return headers[-1].data if headers else {}


def load(folders: Sequence[Path]) -> list[Compared]:
    """The runs, from their logs.

    Raises:
        FlexError: fewer than two, one twice, or a folder without results.
    """
    require(len(folders) > 1, f"compare got {len(folders)} run; expected two or more")
    paths = [folder.resolve() for folder in folders]
    twice = [str(path) for index, path in enumerate(paths) if path in paths[:index]]
    require(not twice, f"compare got {twice[0] if twice else ''} twice; expected each run once")
    names = [path.name for path in paths]
    runs = []
    for folder, path in zip(folders, paths, strict=True):
        events = read_events(folder)
        require(bool(events), f"{folder} has nothing to compare yet; expected a run with events in metrics.jsonl")
        name = path.name if names.count(path.name) == 1 else str(folder)
        runs.append(Compared(name, events, _settings(folder / "config.toml")))
    return runs


def _settings(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return {}
    flat = {}
    for section, value in table.items():
        for key, own in value.items() if isinstance(value, dict) else [("", value)]:
            flat[f"{section}.{key}" if key else section] = own
    return {key: value for key, value in flat.items() if key not in LEFT_OUT}


def measures(runs: Sequence[Compared]) -> list[Measure]:
    return numbers.measures([row for run in runs for row in run.summary])


def best(runs: Sequence[Compared], measure: Measure) -> set[tuple[str, str]]:
    """(run, method) of the best mean of all, as it is printed."""
    means = {
        (run.name, row.method): row.after[measure].mean for run in runs for row in run.summary if measure in row.after
    }
    return numbers.best(means, measure)


def settings_that_differ(runs: Sequence[Compared]) -> list[tuple[str, list[str]]]:
    """Every setting that is not the same in all runs that say theirs, with each run's value."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    told = [run for run in runs if run.config]
    odd = [key for key in keys if len({repr(run.config.get(key)) for run in told}) > 1]
    return [(key, [_shown(run.config.get(key)) if run.config else "?" for run in runs]) for key in odd]


def _shown(value: Any) -> str:
    return "–" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def paired_with_first(runs: Sequence[Compared], measure: Measure) -> list[tuple[str, str, Difference]]:
    """(run, label, difference) of each later run minus the first, for the methods that both have, on seeds whose data
    are the same. The p-values are corrected for all of them together."""
    first, found = runs[0], []
    for run in runs[1:]:
        same = {int(seed) for seed, digest in run.data.items() if first.data.get(seed) == digest}
        for method, row in run.rows.items():
            if method not in first.rows:
                continue
            own, other = (_of_seeds(r, same) for r in (row, first.rows[method]))
            if own.jobs and other.jobs and (diff := difference(own, other, measure)) is not None:
                found.append((run.name, row.label, diff))
    corrected = holm([diff.p for _, _, diff in found])
    return [
        (name, label, replace(diff, p=p, family=len(found)))
        for (name, label, diff), p in zip(found, corrected, strict=True)
    ]


def _of_seeds(row: Row, seeds: set[int]) -> Row:
    return Row(row.method, [job for job in row.counted if job.seed in seeds])


def page(runs: Sequence[Compared]) -> str:
    """The whole document: one file, no scripts, nothing fetched from anywhere."""
    shown = measures(runs)
    primary = numbers.primary_measure([row for run in runs for row in run.summary])
    return (
        environment()
        .get_template("compare.html.j2")
        .render(
            runs=runs,
            style=Markup(STYLE.read_text(encoding="utf-8")),
            measures=shown,
            best={measure: best(runs, measure) for measure in shown},
            settings=settings_that_differ(runs),
            primary=primary,
            pairs=paired_with_first(runs, primary) if primary else [],
            format_p=format_p,
            format_bytes=numbers.format_bytes,
        )
    )


def latex(runs: Sequence[Compared]) -> str:
    """The first table for a paper (booktabs): means and deviations, the best of a column in bold."""
    shown = measures(runs)
    winners = {measure: best(runs, measure) for measure in shown}
    heads = ["Run", "Method", *(measure.title for measure in shown)]
    lines = [
        f"\\begin{{tabular}}{{ll{'r' * len(shown)}}}",
        "\\toprule",
        " & ".join(head.translate(LATEX) for head in heads) + " \\\\",
        "\\midrule",
    ]
    for run in runs:
        for row in run.summary:
            cells = [run.name.translate(LATEX), row.label.translate(LATEX)]
            for measure in shown:
                stat = row.after.get(measure)
                number = "--" if stat is None else measure.format(stat.mean)
                number = f"\\textbf{{{number}}}" if (run.name, row.method) in winners[measure] else number
                spread = (
                    f" {{\\small $\\pm$ {measure.format(stat.spread)}}}" if stat and stat.spread is not None else ""
                )
                cells.append(number + spread)
            lines.append(" & ".join(cells) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])
