"""Records: what one example says, in one of two forms, checked by the line it stands in.

    a pair           `instruction`, `context` (may be missing), `response`; Alpaca's `input` and `output` stand for the
                     last two
    a conversation   `messages`: turns with a `role` and a `content`, perhaps a system turn, then user and assistant by
                     turns, the assistant last

The first record of a file says which form all of it has. A column mapping gives columns of other names these names.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flex.config import CONVERSATION, TEXTS, check_columns
from flex.data.rows import read_rows
from flex.errors import FlexError, require

ALIASES = {"context": "input", "response": "output"}  # by the names of Alpaca's files
FORMS = {TEXTS[0]: "an instruction with a response", CONVERSATION: "a conversation (messages)"}
ROLES = ("system", "user", "assistant")


class Record(dict[str, Any]):
    """A row under our names, with whatever other columns it has. `where`: the file and line it stands in."""

    def __init__(self, values: Mapping[str, Any], where: str = ""):
        super().__init__(values)
        self.where = where


def read_records(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    *,
    clients_by: str = "",
    needs: Sequence[str] = (),
) -> list[Record]:
    """The records of a file: JSON lines, one JSON array, CSV, Parquet or a folder that `datasets` saved (`rows.py`).

    Args:
        columns: our names -> those of the file, where they differ, e.g. `{"instruction": "question"}`.
        clients_by: the column that says whose a record is; empty where the whole file is one client's.
        needs: further columns that every record must have.

    Raises:
        FlexError: the file is missing, damaged or empty, a record lacks a column or is of another form than the first,
            a text is no string, a conversation has no answer, an empty turn or roles out of order, or a record names no
            client.
    """
    path, mapping = Path(path), dict(columns or {})
    check_columns(mapping)
    named = [*needs, *([clients_by] if clients_by else [])]
    records: list[Record] = []
    form, first, default = "", "", CONVERSATION if CONVERSATION in mapping else TEXTS[0]
    for row, where in read_rows(path):
        require(isinstance(row, dict), f"{where} is a {type(row).__name__}; expected a JSON object")
        own = _form(row, mapping)
        if form and own and own != form:
            raise FlexError(f"{where} is {FORMS[own]}, but {first} is {FORMS[form]}; expected one form in a file")
        form, first = form or own or default, first or where
        record = Record(_under_our_names(row, mapping, named), where)
        other = TEXTS[2] if form == CONVERSATION else CONVERSATION  # of the other form: nobody reads it
        if other not in named:
            record.pop(other, None)
        _check_there(record, row, mapping, (CONVERSATION,) if form == CONVERSATION else (TEXTS[0], TEXTS[2]), named)
        if form == CONVERSATION:
            record[CONVERSATION] = _turns(record[CONVERSATION], where)
        else:
            _check_texts(record)
        if clients_by:
            _check_client(record, clients_by)
        records.append(record)
    require(bool(records), f"{path} holds no records; expected one or more")
    context = mapping.get("context")
    if context is not None and not any("context" in record for record in records):
        raise FlexError(f"{path} has no column {context!r}, which data.columns names for 'context'")
    return records


def _form(row: Mapping[str, Any], mapping: Mapping[str, str]) -> str:
    """Which form a row has by its columns; empty where they do not say. A column without a value is none."""

    def there(ours: str) -> bool:
        names = [mapping[ours]] if ours in mapping else [ours, *([ALIASES[ours]] if ours in ALIASES else [])]
        return any(row.get(name) is not None for name in names)

    if CONVERSATION in mapping or not mapping.keys().isdisjoint(TEXTS):
        pair = CONVERSATION not in mapping
        return (TEXTS[0] if pair else CONVERSATION) if there(TEXTS[0] if pair else CONVERSATION) else ""
    if there("instruction") and there("response"):
        return TEXTS[0]
    return CONVERSATION if there(CONVERSATION) else TEXTS[0] if there("instruction") else ""


def _under_our_names(row: Mapping[str, Any], mapping: Mapping[str, str], named: Sequence[str]) -> dict[str, Any]:
    """The row with mapped columns and Alpaca's under our names; what they were called goes, unless it is named."""
    values = dict(row)
    for ours, theirs in mapping.items():
        values.pop(ours, None)
        if theirs in row:
            values[ours] = row[theirs]
    for ours, theirs in mapping.items():
        if theirs not in mapping and theirs not in named and theirs != ours:
            values.pop(theirs, None)
    for ours, alias in ALIASES.items():
        taken = alias in named or alias in mapping.values()
        if ours not in mapping and values.get(ours) is None and alias in values and not taken:
            values.pop(ours, None)
            values[ours] = values.pop(alias)
    return values


def _check_there(
    record: Record, row: Mapping[str, Any], mapping: Mapping[str, str], texts: Sequence[str], named: Sequence[str]
) -> None:
    for column in (*texts, *named):
        if column not in record:
            theirs = mapping.get(column, column) if column in texts else column
            stands_for = f", which data.columns names for {column!r}" if column in texts and column in mapping else ""
            has = ", ".join(map(repr, row))
            hint = " (data.columns can name another)" if column in texts and not stands_for else ""
            raise FlexError(f"{record.where} has no column {theirs!r}{stands_for}; it has {has}{hint}")


def _check_texts(record: Record) -> None:
    for column in TEXTS:
        value = record.get(column, "")
        if not (isinstance(value, str) or (value is None and column == "context")):
            raise FlexError(f"{record.where} has {_shown(value)} as {column!r}; expected a string")
    asked = f"{record['instruction']}{record.get('context') or ''}"
    for text, column in ((asked, "instruction"), (record["response"], "response")):
        require(bool(text.strip()), f"{record.where} has an empty {column!r}; expected text")


def _check_client(record: Record, clients_by: str) -> None:
    name = record[clients_by]
    named = isinstance(name, str | int | float) and not isinstance(name, bool) and str(name).strip()
    if not named or (isinstance(name, float) and not math.isfinite(name)):
        raise FlexError(f"{record.where} has {_shown(name)} as {clients_by!r}; expected the name of a client")


def _turns(value: Any, where: str) -> list[dict[str, str]]:
    """The turns of a conversation, `role` and `content` of each.

    Raises:
        FlexError: no list of turns, an empty turn, no answer, or roles in another order than system, user, assistant,
            user, assistant, ...
    """
    require(isinstance(value, list) and bool(value), f"{where} has {_shown(value)} as 'messages'; expected turns")
    turns = []
    for number, turn in enumerate(value, 1):
        at = f"{where}, turn {number}"
        require(isinstance(turn, dict), f"{at} is {_shown(turn)}; expected an object with role and content")
        for key in ("role", "content"):
            require(isinstance(turn.get(key), str), f"{at} has {_shown(turn.get(key))} as {key!r}; expected a string")
        require(turn["role"] in ROLES, f"{at} has the role {turn['role']!r}; expected {', '.join(ROLES)}")
        require(bool(turn["content"].strip()), f"{at} ({turn['role']}) is empty; expected text")
        turns.append({"role": turn["role"], "content": turn["content"]})
    roles = [turn["role"] for turn in turns]
    require("assistant" in roles, f"{where} has no assistant turn; expected an answer to train on")
    start = roles[0] == "system"
    for index, role in enumerate(roles[start:]):
        expected = ROLES[1 + index % 2]
        number = index + start + 1
        require(role == expected, f"{where}, turn {number} is of the role {role!r}; expected {expected!r} there")
    require(roles[-1] == "assistant", f"{where} ends with a user turn; expected the assistant's answer last")
    return turns


def is_conversation(record: Mapping[str, Any]) -> bool:
    return CONVERSATION in record and TEXTS[2] not in record


def texts_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """All that an example says; two records with the same texts are the same example."""
    if is_conversation(record):
        return tuple(f"{turn['role']}: {turn['content']}" for turn in record[CONVERSATION])
    return tuple(record.get(column) or "" for column in TEXTS)


def unread_columns(records: Iterable[Record], read: Iterable[str]) -> list[str]:
    """Columns that some record has and nobody reads, in the order of their first record."""
    known: set[str] = set(read)
    unread: dict[str, None] = {}
    for record in records:
        own = (CONVERSATION,) if is_conversation(record) else TEXTS
        unread |= dict.fromkeys(c for c in record if c not in known and c not in own)
    return list(unread)


def _shown(value: Any) -> str:
    """A value as the file has it, in a few characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:40]}…"
