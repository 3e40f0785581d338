"""Markdown tables, and a file of sections of which some are written anew and the others stay."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


def rows_of(text: str, title: str) -> list[dict[str, str]]:
    """What `table` has written under a title within a text, each row as {column: cell}; none where there is no such."""
    lines = iter(text.partition(f"### {title}\n")[2].splitlines())
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in _first_block(lines)]
    return [dict(zip(found[0], cells, strict=True)) for cells in found[2:]]


def _first_block(lines: Iterator[str]) -> list[str]:
    block: list[str] = []
    for line in lines:
        if line.startswith("|"):
            block.append(line)
        elif block or line.startswith("#"):
            break
    return block


def sections_of(text: str) -> dict[str, str]:
    """Title -> text of each section of a file that `write_sections` wrote."""
    parts = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    return {title: body.strip() for title, _, body in (part.partition("\n") for part in parts)}


def write_sections(path: Path, sections: Mapping[str, str], top: Callable[[Mapping[str, str]], str]) -> None:
    """Title -> text of each section, in the order of the titles; those that the file has besides stay as they are.

    `top` makes what stands above them, of all of them.
    """
    kept = sections_of(path.read_text()) if path.exists() else {}
    kept |= {title: text.strip() for title, text in sections.items()}
    path.write_text("\n".join([top(kept), *(f"## {title}\n\n{kept[title]}\n" for title in sorted(kept))]))
