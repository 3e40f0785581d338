"""The numbers of a run as a flat table: one line for each method and measure, for a spreadsheet or a script."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flex.errors import FlexError
from flex.methods import MAIN
from flex.report import numbers
from flex.report.findings import differences
from flex.report.numbers import Row

COLUMNS = (
    *("run", "method", "label", "split", "group", "measure", "higher_is_better", "mean", "deviation", "seeds"),
    *("examples", "bytes_up_per_round", "bytes_down_per_round", "learning_rate", "graft_learning_rate"),
    *("main_minus_this", "low", "high", "p", "p_holm", "main_ahead_in_seeds", "pairs", "verdict"),
)


def flat_rows(summary: Sequence[Row], run: str = "") -> list[dict[str, Any]]:
    """Scores after aggregation in their own unit (shares in [0, 1]); the difference is of the main method minus this
    one, `p_holm` corrected for all methods of the run on that measure. What is not known is left empty."""
    summary = list(summary)
    main = next((row for row in summary if row.method == MAIN), None)
    found = []
    for measure in numbers.measures(summary):
        others = [row for row in summary if row is not main]
        compared = differences(main, others, measure) if main is not None and measure in main.after else {}
        for row in summary:
            stat = row.after.get(measure)
            if stat is None:
                continue
            rates = row.learning_rates or {}
            line = {
                "run": run,
                "method": row.method,
                "label": row.label,
                "split": measure.split,
                "group": measure.group,
                "measure": measure.name,
                "higher_is_better": measure.higher_is_better,
                "mean": stat.mean,
                "deviation": stat.spread,
                "seeds": " ".join(map(str, sorted(stat.values))),
                "examples": stat.num_examples,
                "bytes_up_per_round": (row.bytes_per_round or {}).get("up"),
                "bytes_down_per_round": (row.bytes_per_round or {}).get("down"),
                **{name: rates.get(name) for name in ("learning_rate", "graft_learning_rate")},
            }
            if (diff := compared.get(row.method)) is not None:
                test = diff.test
                line |= {"main_minus_this": diff.mean, "main_ahead_in_seeds": f"{diff.ahead}/{diff.num_seeds}"}
                line |= {"verdict": diff.verdict}
                if test is not None:
                    line |= {"low": test.low, "high": test.high, "p": test.p, "p_holm": diff.p, "pairs": test.num_pairs}
            found.append(line)
    return found


def write_csv(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str] = COLUMNS) -> Path:
    """The rows under their column names, as a file for `write_text`."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if value is None else value for key, value in row.items()} for row in rows)
    return write_text(path, text.getvalue())


def write_text(path: Path, text: str) -> Path:
    """The file as a whole, or not at all.

    Raises:
        FlexError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise FlexError(f"cannot write {path}: {error}") from None
    return path
