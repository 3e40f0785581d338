"""Anchors: general text that belongs to nobody, cut into examples on which a client's model is held to the base."""

import gzip
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from flex.config import CONVERSATION, TEXTS, AnchorSettings
from flex.data.examples import Encoder, Example
from flex.data.records import read_records
from flex.data.rows import read_rows
from flex.errors import FlexError, require

# Endings of files of records, before a `.gz`; any other is plain text.
RECORDS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
CHARACTERS_PER_TOKEN = 16  # of a long text so many are read for each token that is wanted
T = TypeVar("T")


def load_anchors(settings: AnchorSettings, encoder: Encoder) -> list[Example]:
    """At most `settings.examples` encoded examples, taken evenly over the file; every setting has its value.

    Labels of an instruction are its response; of plain text, all but the first token.

    Raises:
        FlexError: the file is missing, unreadable or empty, a record is none (see `read_records`) and has no text, or
            there are fewer examples than a batch takes.
    """
    path = Path(settings.text).expanduser()
    require(path.exists(), f"no file at anchor.text = {settings.text!r}; expected plain text or JSON lines")
    endings = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    if path.is_dir() or (endings and endings[-1] in RECORDS):
        found = _from_records(path, settings.examples, encoder)
    else:
        found = list(_pieces(_read_text(path), settings.examples, encoder))
    require(
        len(found) >= settings.batch_size,
        f"anchor.text = {settings.text!r} gives {len(found)} examples of up to {encoder.max_length} tokens; expected "
        f"at least anchor.batch_size, {settings.batch_size}",
    )
    return evenly(found, settings.examples)


def evenly(items: Sequence[T], count: int) -> list[T]:
    """`count` of the items, evenly spaced in their order; all of them where there are no more."""
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else list(items)


def _from_records(path: Path, count: int, encoder: Encoder) -> list[Example]:
    """Of a file whose first row has a `text` and neither an instruction nor turns: a piece of each text."""
    row, _ = next(read_rows(path), ({}, ""))
    if not isinstance(row, dict) or "text" not in row or row.keys() & {TEXTS[0], CONVERSATION}:
        return [encoder.example(record) for record in evenly(read_records(path), count)]
    texts = []
    for row, where in read_rows(path):
        text = row.get("text") if isinstance(row, dict) else None
        require(isinstance(text, str) and bool(text.strip()), f"{where} has no text; expected one, as in the first row")
        texts.append(text)
    return [example for text in evenly(texts, count) for example in _pieces(text, 1, encoder)]


def _read_text(path: Path) -> str:
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            text = file.read()
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise FlexError(f"anchor.text = {str(path)!r} cannot be read as text: {error}") from None
    require(bool(text.strip()), f"anchor.text = {str(path)!r} is empty; expected general text")
    return text


def _pieces(text: str, count: int, encoder: Encoder) -> Iterator[Example]:
    """A text in examples of `max_length` tokens; of a long one, pieces from evenly spaced places, so that no more is
    tokenised than is wanted."""
    room = encoder.max_length * CHARACTERS_PER_TOKEN
    parts = [text] if len(text) <= count * room else [text[i * len(text) // count :][:room] for i in range(count)]
    head = encoder.tokenizer("")["input_ids"][:1]
    head = head if head == [encoder.tokenizer.bos_token_id] else []
    size = encoder.max_length - len(head)
    for part in parts:
        ids = encoder.text_ids(part)
        windows = [ids[start : start + size] for start in range(0, len(ids), size)]
        for window in windows if len(parts) == 1 else windows[:1]:
            if len(head) + len(window) > 1:  # of a single token nothing is predicted
                yield Example((*head, *window), 0, "")
