"""A site's own record: every question that was put to its worker, and what left the site, one JSON object a line.

It is written before anything leaves, by the site, for the site; it also says which round is next.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from flex.errors import FlexError
from flex.federation.flower import RecordDict
from flex.federation.messages import ARRAYS, control_of, to_arrays


@dataclass(frozen=True)
class Entry:
    """One question and its answer.

    asked: "train", "evaluate", "about", "start", "who". peer: the user id that asked. start: sha256 of the tensors that
    came. tensors: the names of those that left; sha256, bytes: of them; norm: of what left minus what came.
    numbers: what else left in numbers. events: how many scores, measures of layers and choices of grafts. scored: with
    a turn of training, the round whose scores left too. refused: why nothing left.
    """

    asked: str
    peer: int
    run: str = ""
    method: str = ""
    seed: int = 0
    round: int = 0
    start: str = ""
    tensors: list[str] = field(default_factory=list)
    sha256: str = ""
    bytes: int = 0
    norm: float | None = None
    numbers: dict[str, Any] = field(default_factory=dict)
    events: int = 0
    scored: int | None = None
    refused: str = ""
    time: str = ""


def left(came: RecordDict, sent: RecordDict) -> dict[str, Any]:
    """What an answer carries, as an entry says it."""
    digest, count, names = hashlib.sha256(), 0, []
    for record in (*sent.array_records.values(), control_of(sent)):
        for name, array in record.items():
            digest.update(name.encode())
            digest.update(array.data)
            count += len(array.data)
            names.append(name)
    return {
        "tensors": names,
        "sha256": digest.hexdigest() if names else "",
        "bytes": count,
        "norm": _norm(came, sent),
        "numbers": {key: value for record in sent.metric_records.values() for key, value in record.items()},
    }


def _norm(came: RecordDict, sent: RecordDict) -> float | None:
    if ARRAYS not in came.array_records or ARRAYS not in sent.array_records:
        return None
    before, after = to_arrays(came[ARRAYS]), to_arrays(sent[ARRAYS])
    squares = [float(((after[name] - before[name]).astype("float64") ** 2).sum()) for name in after if name in before]
    return math.sqrt(sum(squares))


class Record:
    """The file, and what it says of earlier turns."""

    def __init__(self, path: Path):
        self.path = path
        self.last: dict[tuple[str, str, int], int] = {}  # (run, method, seed) -> the last round trained
        self.starts: dict[tuple[str, str, int, int], set[str]] = {}  # (..., round) -> what was scored
        for entry in self.entries():
            self._take(entry)

    def entries(self) -> Iterator[Entry]:
        """All entries; a last line that a kill cut short is left out."""
        known = {f.name for f in fields(Entry)}
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return
        except (OSError, UnicodeDecodeError) as error:
            raise FlexError(f"cannot read {self.path}: {error}") from None
        for number, line in enumerate(lines, 1):
            try:
                yield Entry(**{key: value for key, value in json.loads(line).items() if key in known})
            except (ValueError, TypeError, AttributeError):
                if number < len(lines):
                    raise FlexError(f"{self.path}, line {number} is damaged; expected a JSON object") from None

    def write(self, entry: Entry) -> None:
        """Appends an entry, to the disk: what cannot be recorded does not leave."""
        values = {**asdict(entry), "time": datetime.now(UTC).isoformat(timespec="seconds")}
        try:
            with self.path.open("ab+") as file:
                if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                    file.write(b"\n")  # after a line that was cut short
                file.write(json.dumps(values).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise FlexError(f"the site's record cannot be written ({error.strerror}); nothing has left") from None
        self._take(entry)

    def _take(self, entry: Entry) -> None:
        job = (entry.run, entry.method, entry.seed)
        if entry.refused:
            return
        scored = entry.round if entry.asked == "evaluate" else entry.scored
        if scored is not None:
            self.starts.setdefault((*job, scored), set()).add(entry.start)
        if entry.asked == "train":
            self.last[job] = entry.round


def record_table(entries: Iterator[Entry]) -> Table:
    """The record for a person."""
    table = Table(title="what was asked, and what left this site")
    for column in ("time", "asked", "job", "round", "tensors", "bytes", "norm", "sha256", "numbers, or why refused"):
        table.add_column(column)
    for e in entries:
        job = f"{e.method} seed {e.seed}" if e.method else ""
        norm = "" if e.norm is None else f"{e.norm:.4g}"
        said = e.refused or ", ".join(f"{key} {_short(value)}" for key, value in e.numbers.items())
        counts = (str(e.round or ""), str(len(e.tensors) or ""), str(e.bytes or ""))
        asked = e.asked if e.scored is None else f"{e.asked}, score {e.scored}"
        table.add_row(*map(Text, (e.time, asked, job, *counts, norm, e.sha256[:12], said)))
    return table


def _short(value: Any) -> str:
    return (
        f"{value:.4g}"
        if isinstance(value, float)
        else f"{len(value)} numbers"
        if isinstance(value, list)
        else str(value)
    )
