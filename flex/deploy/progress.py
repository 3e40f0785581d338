"""How far a run is, from the process that serves it to the one that shows it: lines of JSON in a file."""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flex.store.events import Event, from_json

PROGRESS = "progress.jsonl"
ENDED = "ended"  # the last line's key: how the run ended; "done", or the sentence of what went wrong
DONE = "done"


class Teller:
    """Writes the lines. Every one says which Flower run it is of."""

    def __init__(self, path: Path, run_id: int):
        self.path, self.run_id = path, run_id
        path.parent.mkdir(parents=True, exist_ok=True)

    def tell(self, **values: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"run": self.run_id, "pid": os.getpid(), "time": time.time(), **values}) + "\n")

    def line(self, job: str) -> Callable[..., None]:
        """A `Tell` (`runs/progress.py`) for one job."""

        def tell(events: Sequence[Event] = (), **values: Any) -> None:
            self.tell(job=job, **values, **({"events": [event.to_json() for event in events]} if events else {}))

        return tell


def last_run(path: Path) -> int | None:
    """The Flower run that has told of itself last; None where none has."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return None
    return json.loads(lines[-1])["run"] if lines else None


class Listener:
    """Reads the lines of one Flower run as they come."""

    def __init__(self, path: Path, run_id: int):
        self.path, self.run_id, self.place, self.rest = path, run_id, 0, b""

    def new(self) -> list[dict[str, Any]]:
        """The lines that are new since the last call."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.place)
                came = file.read()
        except FileNotFoundError:
            return []
        self.place += len(came)
        *whole, self.rest = (self.rest + came).split(b"\n")
        lines = [line for text in whole if text and (line := json.loads(text))["run"] == self.run_id]
        for line in lines:
            if "events" in line:
                line["events"] = [from_json(event) for event in line["events"]]
        return lines
