"""The file of figures: written after every measurement, gone on with by the next call.

    {"machine": {...}, "ceilings": {"copy_gb_s", "bf16_tflop_s"}, "figures": [...], "skipped": [...],
     "ratios": [{"shape", "tokens", "pass", "peer", "ratio"}], ...}

A figure belongs to a key (part, shape, tokens, pass, provider) and is there once. A ratio is the peer's time over ours.
"""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

OURS = "flex"
BOUNDS = ("bmm", "flex bare")  # beside ours, but nobody's layer


class Key(NamedTuple):
    part: str
    shape: str
    tokens: int
    what: str  # fwd, bwd, fwd+bwd; in other parts what they measure
    provider: str


@dataclasses.dataclass
class Record:
    """All that was measured on one machine."""

    path: Path
    machine: dict[str, str]
    command: str = ""  # the last call's
    figures: dict[Key, dict[str, Any]] = dataclasses.field(default_factory=dict)
    skipped: dict[Key, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, machine: dict[str, str]) -> "Record":
        """An empty one, or the file's, if it is of the same machine; its drivers may be several.

        Raises:
            ValueError: the file's figures come from another device or other versions.
        """
        record = cls(path, machine)
        if path.exists():
            old = json.loads(path.read_text())
            if not cls.fits(path, machine):
                raise ValueError(f"{path} holds figures of {old['machine']}, this is {machine}; name another --output")
            drivers = [*old["machine"]["driver"].split(" and "), *machine["driver"].split(" and ")]
            record.machine = {**machine, "driver": " and ".join(dict.fromkeys(drivers))}
            record.command = old.get("command", "")
            record.figures = {_key_of(row): _values_of(row) for row in old["figures"]}
            record.skipped = {_key_of(row): row["reason"] for row in old["skipped"]}
        return record

    @staticmethod
    def fits(path: Path, machine: dict[str, str]) -> bool:
        """Whether there is a file, of this device and these versions."""
        return path.exists() and _without_driver(json.loads(path.read_text())["machine"]) == _without_driver(machine)

    def add(self, key: Key, **values: Any) -> None:
        self.figures[key] = {**values, "measured": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())}
        self.skipped.pop(key, None)
        self.save()
        shown = f"{values['ms']:.3f} ms" if "ms" in values else str(values)
        percent = f", {values['percent_of_ceiling']:.0f} % of the ceiling" if "percent_of_ceiling" in values else ""
        print(
            f"{key.part:8} {key.shape:18} T={key.tokens:<6} {key.what:8} {key.provider:12} {shown}{percent}", flush=True
        )

    def skip(self, key: Key, reason: object) -> None:
        self.skipped[key] = (str(reason).strip() or type(reason).__name__).split("\n")[0][:300]
        self.save()
        print(f"skipped: {' '.join(map(str, key))}: {self.skipped[key]}", flush=True)

    def done(self, part: str, shape: str, tokens: int, last: str) -> bool:
        """Whether the last pass of a place was measured; ours is written after all the others."""
        return Key(part, shape, tokens, last, OURS) in self.figures

    def ceiling(self, what: str) -> float | None:
        """GB/s of "copy", TFLOP/s of "matmul": the best that was measured."""
        rates = [row["rate"] for key, row in self.figures.items() if key.part == "ceilings" and key.what == what]
        return max(rates, default=None)

    def percent(self, tflop_s: float) -> dict[str, float]:
        ceiling = self.ceiling("matmul")
        return {} if ceiling is None else {"percent_of_ceiling": 100 * tflop_s / ceiling}

    def ratios(self, part: str) -> list[dict[str, Any]]:
        rows = []
        for key, row in self.figures.items():
            if key.part != part or key.provider in (OURS, *BOUNDS) or "ms" not in row:
                continue
            if ours := self.figures.get(key._replace(provider=OURS)):
                place = {"shape": key.shape, "tokens": key.tokens, "pass": key.what, "peer": key.provider}
                rows.append({**place, "ratio": row["ms"] / ours["ms"]})
        return rows

    def save(self) -> None:
        content = {
            "machine": self.machine,
            "command": self.command,
            "ceilings": {"copy_gb_s": self.ceiling("copy"), "bf16_tflop_s": self.ceiling("matmul")},
            "figures": [{**_row_of(key), **row} for key, row in self.figures.items()],
            "skipped": [{**_row_of(key), "reason": reason} for key, reason in self.skipped.items()],
            "ratios": self.ratios("layers"),
            "other_ratios": {part: self.ratios(part) for part in ("plan", "scoring", "step", "round", "small")},
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(unfinished, self.path)


def _without_driver(machine: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in machine.items() if name != "driver"}


def _row_of(key: Key) -> dict[str, Any]:
    row = key._asdict()
    return {"pass" if name == "what" else name: value for name, value in row.items()}


def _key_of(row: dict[str, Any]) -> Key:
    return Key(row["part"], row["shape"], row["tokens"], row["pass"], row["provider"])


def _values_of(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("part", "shape", "tokens", "pass", "provider")}
