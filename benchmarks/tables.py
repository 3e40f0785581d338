"""Markdown tables, and a file of sections of which some are written anew and the others stay."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> list[str]:
    """The lines of a table and an empty one after it; nothing where there are no rows."""
    rows = list(rows)
    if not rows:
        return []
    head = [f"### {title}", ""] if title else []
    lines = [*head, _line(columns), "|---" * len(columns) + "|", *map(_line, rows)]
    return [*lines, ""]


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def write_sections(path: Path, sections: Mapping[str, str], introduction: str) -> None:
    """Title -> text of each section, in the order of the titles; those that the file has besides stay as they are."""
    old = path.read_text() if path.exists() else ""
    kept = {part.partition("\n")[0]: part for part in re.split(r"^## ", old, flags=re.MULTILINE)[1:]}
    kept |= {title: f"{title}\n\n{text}" for title, text in sections.items()}
    path.write_text("\n".join([introduction, *(f"## {kept[title].rstrip()}\n" for title in sorted(kept))]))
