"""`metrics.jsonl`: what happened, one JSON object a line. A run that is resumed forgets the rounds it will do again."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flex.errors import FlexError

Event = dict[str, Any]
METRICS = "metrics.jsonl"


class EventLog:
    """Appends events to a file and flushes each; every event carries the fields given at the start."""

    def __init__(self, path: Path, **common: Any):
        self.path, self.common = path, common

    def write(self, event: Event) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**self.common, **event}) + "\n")
        except OSError as error:
            raise FlexError(f"cannot write {self.path}: {error}") from None

    def rewind(self, round_index: int) -> None:
        """Keeps what belongs to rounds up to `round_index`; an event without a round belongs to round 0."""
        write_events(self.path, [e for e in read_events(self.path) if e.get("round", 0) <= round_index])


def read_events(path: Path) -> list[Event]:
    """The whole events of a file; a last line cut short by a kill is left out. No file: no events.

    Raises:
        FlexError: the file cannot be read, or a line that was written to its end is no event.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise FlexError(f"cannot read {path}: {error}") from None
    events = []
    for number, line in enumerate(lines, 1):
        event = _parse(line)
        if event is not None:
            events.append(event)
        elif line.strip() and number < len(lines):
            start = line[:40].decode("utf-8", errors="replace")
            raise FlexError(f"{path}, line {number} is damaged: it begins with {start!r}; wanted a JSON object")
    return events


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line.decode("utf-8"))
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


def write_events(path: Path, events: Iterable[Event]) -> None:
    """The file anew, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text("".join(json.dumps(e) + "\n" for e in events), encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise FlexError(f"cannot write {path}: {error}") from None
