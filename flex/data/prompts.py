"""Prompts to answer: a file of them, or standard input; text with one a line, or rows as data files have them.

A row is `instruction` (perhaps with `context`), or `messages` that end with a user turn; an answer that stands there
already (`response`, a last assistant turn) is left aside, so that a test file can be given as it is.
"""

import io
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flex.config import CONVERSATION, TEXTS
from flex.data.records import ALIASES
from flex.data.rows import json_rows, read_rows
from flex.errors import FlexError, require

STDIN = "-"
TABLES = (".csv", ".tsv", ".parquet", ".gz")  # what `read_rows` knows by its ending, beside JSON


@dataclass(frozen=True)
class Prompt:
    """What is asked. `turns`: of a conversation, a user turn last; `row`: what stood there, to be handed back."""

    turns: list[dict[str, str]]
    context: str
    row: dict[str, Any]

    def answered(self, answer: str) -> dict[str, Any]:
        """The row with its answer, as a data file has it."""
        if CONVERSATION in self.row:
            return {**self.row, CONVERSATION: [*self.turns, {"role": "assistant", "content": answer}]}
        return {**self.row, "response": answer}


def read_prompts(path: str, columns: Mapping[str, str] | None = None) -> list[Prompt]:
    """The prompts of a file, or of standard input where `path` is "-", in their order.

    Args:
        columns: our names -> those of the file, where they differ.

    Raises:
        FlexError: no such file, nothing in it, or a row that asks nothing.
    """
    name = Path("standard input" if path == STDIN else path)
    mapping = {ours: (columns or {}).get(ours, ours) for ours in ("instruction", "context", CONVERSATION)}
    if path != STDIN and (name.is_dir() or name.suffix.lower() in TABLES or not name.is_file()):
        prompts = [_of_row(row, where, mapping) for row, where in read_rows(name)]
    else:
        try:
            text = sys.stdin.read() if path == STDIN else name.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise FlexError(f"{name} cannot be read: {error}") from None
        if name.suffix.lower() in (".json", ".jsonl") or _is_json(text):
            prompts = [_of_row(row, where, mapping) for row, where in json_rows(io.StringIO(text), name)]
        else:
            lines = [line.strip() for line in text.splitlines()]
            prompts = [_pair(line, "", {"instruction": line}) for line in lines if line]
    require(bool(prompts), f"{name} holds no prompts; expected one or more, one a line")
    return prompts


def _is_json(text: str) -> bool:
    """Whether a text begins with a JSON object, or is an array of them."""
    start = text.lstrip()
    for candidate in (start.partition("\n")[0], start) if start[:1] in ("{", "[") else ():
        try:
            value = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        return isinstance(value, dict) or all(isinstance(entry, dict) for entry in value)
    return False


def _pair(instruction: str, context: str, row: dict[str, Any]) -> Prompt:
    return Prompt([{"role": "user", "content": instruction}], context, row)


def _of_row(row: Any, where: str, mapping: Mapping[str, str]) -> Prompt:
    if isinstance(row, str):
        require(bool(row.strip()), f"{where} asks nothing; expected a text")
        return _pair(row, "", {"instruction": row})
    require(isinstance(row, dict), f"{where} is a {type(row).__name__}; expected a JSON object, or a text")
    turns = row.get(mapping[CONVERSATION])
    if turns is not None and row.get(mapping["instruction"]) is None:
        return Prompt(_turns(turns, where), "", {**row, CONVERSATION: turns})
    instruction = row.get(mapping["instruction"])
    context = row.get(mapping["context"])
    context = row.get(ALIASES["context"]) if context is None else context
    require(
        isinstance(instruction, str) and bool(instruction.strip()),
        f"{where} asks nothing; expected {mapping['instruction']!r} or {mapping[CONVERSATION]!r}, it has "
        f"{', '.join(map(repr, row)) or 'no columns'}",
    )
    require(context is None or isinstance(context, str), f"{where} has a context that is no string; expected a text")
    return _pair(instruction, context or "", {k: v for k, v in row.items() if k != TEXTS[2]})


def _turns(value: Any, where: str) -> list[dict[str, str]]:
    good = isinstance(value, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in value
    )
    require(good, f"{where} has messages that are no turns; expected objects with role and content")
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in value]
    if turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    roles = [turn["role"] for turn in turns]
    own = roles[1:] if roles[:1] == ["system"] else roles
    wanted = ["user" if index % 2 == 0 else "assistant" for index in range(len(own))]
    require(
        bool(own) and own == wanted and own[-1] == "user",
        f"{where} has turns of {', '.join(roles) or 'nobody'}; expected user and assistant by turns, a user last",
    )
    return turns
