"""Records: JSON lines of instructions and responses, read line by line and refused by line."""

import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flex.errors import FlexError

Record = dict[str, Any]


TEXTS = ("instruction", "context", "response")


def read_records(
    path: str | Path, columns: Sequence[str] = ("instruction", "response"), clients_by: str = ""
) -> list[Record]:
    """The records of a `.jsonl` or `.jsonl.gz` file.

    Raises:
        FlexError: the file is missing, damaged or empty, a line is no JSON object, a record lacks one of `columns`, a
            text is no string, or the column `clients_by` (where one is given) names no client.
    """
    path = Path(path)
    if not path.is_file():
        raise FlexError(f"no data file at {path}; expected a .jsonl or .jsonl.gz file")
    open_text = gzip.open if path.suffix == ".gz" else open
    records = []
    try:
        with open_text(path, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    records.append(_record(line, f"{path}, line {number}", columns, clients_by))
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise FlexError(f"{path} cannot be read as JSON lines: {error}") from None
    if not records:
        raise FlexError(f"{path} holds no records; expected one JSON object a line")
    return records


def _record(line: str, where: str, columns: Sequence[str], clients_by: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise FlexError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise FlexError(f"{where} is not JSON that can be read: {error}") from None
    if not isinstance(record, dict):
        raise FlexError(f"{where} is a {type(record).__name__}; expected a JSON object")
    for column in columns:
        if column not in record:
            raise FlexError(f"{where} has no column {column!r}; it has {', '.join(map(repr, record))}")
    if "\\ud" in line.lower():
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise FlexError(f"{where} holds half of a character (a \\ud… alone); expected whole ones") from None
    for column in TEXTS:
        value = record.get(column, "")
        if not (isinstance(value, str) or (value is None and column == "context")):
            raise FlexError(f"{where} has {_shown(value)} as {column!r}; expected a string")
    if clients_by:
        name = record[clients_by]
        if not isinstance(name, str | int | float) or not str(name).strip():
            raise FlexError(f"{where} has {_shown(name)} as {clients_by!r}; expected the name of a client")
    return record


def _shown(value: Any) -> str:
    """A value as the file has it, in a few characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}…"
