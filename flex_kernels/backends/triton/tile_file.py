"""Tiles as data, and the user's file of measured ones: its types, and how it is read and written. No kernel is here.

`FLEX_TILES` names the file, by default `~/.cache/flex/tiles.json` (`$XDG_CACHE_HOME/flex/tiles.json`); with
`FLEX_TILES=` (empty) no file is read or written. `tiles.py` reads it, `tuning.py` writes it.
"""

import contextlib
import datetime
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

import torch

KERNELS = ("gate_up", "down", "d_preactivations", "d_hidden")  # as in `ExpertTiles`
FORMAT = 1


@dataclass(frozen=True)
class Tile:
    """`block_m` rows by `block_n` columns of output, `block_k` of the sum at a time, `group_m` row tiles per L2 visit.

    `per_processor` programs share a processor: while one stores its tile, another multiplies. Asking for more than fit
    costs little: the surplus programs start as others finish.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    per_processor: int = 1
    group_m: int = 8


@dataclass(frozen=True)
class ExpertTiles:
    """The tiles of one layer call; `block_m` is the same in all of them."""

    gate_up: Tile  # two accumulators: gate and up columns
    down: Tile
    d_preactivations: Tile  # large epilogue
    d_hidden: Tile

    @property
    def block_m(self) -> int:
        return self.gate_up.block_m


@dataclass(frozen=True)
class Kind:
    """The calls that an entry of the file is valid for. A tile that one Triton compiles may not fit with another."""

    chip: str  # as the driver says it
    dtype: str
    hidden_size: int
    intermediate_size: int
    graft_size: int
    num_experts: int
    rows: str  # "few" or "many" per expert
    triton: str


@dataclass(frozen=True)
class Measured:
    """The winners, and milliseconds of the four GEMMs together: theirs and those of the table's tiles."""

    tiles: ExpertTiles
    ms: float
    default_ms: float


def file_path() -> Path | None:
    """The file of measured tiles; None if FLEX_TILES is empty."""
    named = os.environ.get("FLEX_TILES")
    if named is None:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flex" / "tiles.json"
    return Path(named).expanduser() if named else None


@cache
def remembered() -> dict[Kind, ExpertTiles]:
    """What this process knows: the file as it was at the first call, and what was measured since."""
    path = file_path()
    return read(path) if path is not None else {}


def read(path: Path) -> dict[Kind, ExpertTiles]:
    """The file's entries; none if there is no file, and without those from before `per_processor` was tried.

    Raises:
        ValueError: it cannot be read, or is not a file of measured tiles of this format.
    """
    entries = [entry for entry in _entries(path) if all("per_processor" in tile for tile in entry["tiles"].values())]
    return {_kind(entry): _tiles(entry) for entry in entries}


def write(path: Path, kind: Kind, measured: Measured) -> None:
    """Adds an entry or replaces the old one; entries that other processes wrote meanwhile stay.

    The file is complete at any time: a process that is killed half way leaves the old one.

    Raises:
        ValueError: there is a file that `read` refuses. It stays as it is.
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {
        **asdict(kind),
        "tiles": asdict(measured.tiles),
        "ms": round(measured.ms, 5),
        "default_ms": round(measured.default_ms, 5),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    with _locked(path):
        content = {
            "format": FORMAT,
            "about": "tiles of flex_kernels' layer, measured with FLEX_TUNE=1; a deleted entry is measured again",
            "entries": [*(other for other in _entries(path) if _kind(other) != kind), entry],
        }
        handle, temporary = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".part", dir=path.parent)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
                file.write("\n")
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time, held by a file beside it; the system lets go of it when the process ends."""
    with open(path.with_name(f"{path.name}.lock"), "w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks: the last writer wins, the file stays whole
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _entries(path: Path) -> list[dict]:
    """The checked entries as they stand in the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"format {found!r}, expected {FORMAT}")
        for number, entry in enumerate(content["entries"]):
            try:
                _kind(entry)
                _tiles(entry)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"entry {number}: {error!r}") from error
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = "no file of measured tiles that this version reads"
        raise ValueError(f"{path} is {what} ({error}); delete it, or name another in FLEX_TILES") from error
    return content["entries"]


def _kind(entry: dict) -> Kind:
    return Kind(**{field.name: entry[field.name] for field in fields(Kind)})


def _tiles(entry: dict) -> ExpertTiles:
    tiles = ExpertTiles(**{kernel: Tile(**sizes) for kernel, sizes in entry["tiles"].items()})
    each = [getattr(tiles, kernel) for kernel in KERNELS]
    numbers = [number for tile in each for number in asdict(tile).values()]
    powers = [number for tile in each for number in (tile.block_m, tile.block_n, tile.block_k, tile.num_warps)]
    if not all(type(number) is int and number > 0 for number in numbers) or any(n & (n - 1) for n in powers):
        raise ValueError("a tile's sizes are whole numbers, blocks and warps powers of two")
    if len({tile.block_m for tile in each}) > 1:
        raise ValueError("block_m differs among the four tiles")
    return tiles
