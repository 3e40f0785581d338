"""What the pages of the studies share: rows kept beside them, a part that is made between two marks, drawings."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def kept_rows(path: Path, collected: list[dict[str, Any]], keys: Sequence[str] = ()) -> list[dict[str, Any]]:
    """What was collected, kept in `path`, a row a line, and what is kept there already.

    `keys`: the columns that name a job; what is kept of jobs that were not collected stays. Without them all that was
    collected takes the place of all that was kept.
    """
    kept = json.loads(path.read_text()) if path.exists() else []
    if not collected:
        return kept
    new = {tuple(row[key] for key in keys) for row in collected}
    rows = [*[row for row in kept if tuple(row[key] for key in keys) not in new], *collected] if keys else collected
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    return rows


def write_between(path: Path, begin: str, end: str, lines: Sequence[str]) -> None:
    """Replaces what stands between the mark `begin` and the next `end`; the marks stay."""
    text = path.read_text()
    start = text.index(begin)
    path.write_text(text[:start] + "\n".join([begin, "", *lines]) + text[text.index(end, start) :])


@contextmanager
def svg(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """An empty figure, written to `path` afterwards; the same drawing gives the same bytes."""
    with matplotlib.rc_context({"svg.hashsalt": "flex", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def plain(axes: Axes) -> None:
    """A light grid, and no frame above and at the right."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
