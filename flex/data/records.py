"""Records: JSON lines of instructions and responses, read line by line and refused by line."""

import gzip
import itertools
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from flex.errors import FlexError

Record = dict[str, Any]

TEXTS = ("instruction", "context", "response")
ALIASES = {"context": "input", "response": "output"}  # by the names of Alpaca's files


def read_records(
    path: str | Path, columns: Sequence[str] = ("instruction", "response"), clients_by: str = ""
) -> list[Record]:
    """The records of a file with one JSON object per line, or with one JSON array of them; `.gz` is unpacked.

    Columns named as in Alpaca's files (`input`, `output`) are read as `context` and `response`.

    Raises:
        FlexError: the file is missing, damaged or empty, a line is no JSON object, a record lacks one of `columns`, a
            text is no string, or the column `clients_by` (where one is given) names no client.
    """
    path = Path(path)
    if not path.is_file():
        raise FlexError(f"no data file at {path}; expected a .jsonl or .jsonl.gz file")
    open_text = gzip.open if path.suffix.lower() == ".gz" else open
    records = []
    try:
        with open_text(path, "rt", encoding="utf-8-sig") as file:
            for value, where in _values(file, path):
                records.append(_record(value, where, columns, clients_by))
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise FlexError(f"{path} cannot be read as JSON lines: {error}") from None
    if not records:
        raise FlexError(f"{path} holds no records; expected one JSON object a line")
    return records


def unread_columns(records: Iterable[Record], read: Iterable[str]) -> list[str]:
    """Columns that some record has and nobody reads, in the order of their first record."""
    known = {*TEXTS, *read}
    return [column for column in dict.fromkeys(c for record in records for c in record) if column not in known]


def _values(file: TextIO, path: Path) -> Iterator[tuple[Any, str]]:
    """(JSON value, where it stands): of every line, or of every entry where the whole file is one array."""
    lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
    start, first = next(lines, (1, ""))
    if first.lstrip().startswith("[") and _starts_array(first):
        for index, value in enumerate(_parsed(first + file.read(), str(path)), 1):
            yield value, f"{path}, entry {index}"
        return
    for number, line in itertools.chain([(start, first)] if first else [], lines):
        yield _parsed(line, f"{path}, line {number}"), f"{path}, line {number}"


def _starts_array(line: str) -> bool:
    """Whether a file that begins with this line is one array: it goes on past the line, or it holds objects."""
    try:
        return all(isinstance(value, dict) for value in json.loads(line))
    except ValueError:
        return True
    except RecursionError:
        return False


def _parsed(text: str, where: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise FlexError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise FlexError(f"{where} is not JSON that can be read: {error}") from None
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise FlexError(f"{where} holds half of a character (a \\ud… alone); expected whole ones") from None
    return value


def _record(record: Any, where: str, columns: Sequence[str], clients_by: str) -> Record:
    if not isinstance(record, dict):
        raise FlexError(f"{where} is a {type(record).__name__}; expected a JSON object")
    for column, alias in ALIASES.items():
        if record.get(column) is None and alias in record and alias not in columns and alias != clients_by:
            record = {**{k: v for k, v in record.items() if k not in (column, alias)}, column: record[alias]}
    for column in columns:
        if column not in record:
            raise FlexError(f"{where} has no column {column!r}; it has {', '.join(map(repr, record))}")
    for column in TEXTS:
        value = record.get(column, "")
        if not (isinstance(value, str) or (value is None and column == "context")):
            raise FlexError(f"{where} has {_shown(value)} as {column!r}; expected a string")
    if clients_by:
        name = record[clients_by]
        named = isinstance(name, str | int | float) and not isinstance(name, bool) and str(name).strip()
        if not named or (isinstance(name, float) and not math.isfinite(name)):
            raise FlexError(f"{where} has {_shown(name)} as {clients_by!r}; expected the name of a client")
    return record


def _shown(value: Any) -> str:
    """A value as the file has it, in a few characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}…"
