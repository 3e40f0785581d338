"""Tiles measured on the user's own chip, and the file that remembers them. `tiles.expert_tiles` asks here first.

`FLEX_TUNE=1`: the first layer call of a new kind (`Kind`: chip, dtype, sizes, few or many rows an expert, Triton) times
at most a dozen tiles around the table's for each of the four grouped GEMMs, on random operands of these sizes, with
`ROWS_AN_EXPERT` rows. A tile that does not compile, does not fit or does not compute what the table's tile computes is
out. The four must agree on `block_m`: for each height the best of each kernel are added up, and the least sum wins.

`FLEX_TILES` names the file, by default `~/.cache/flex/tiles.json` (`$XDG_CACHE_HOME/flex/tiles.json`). It is read once
a process, also without FLEX_TUNE; a kind that is in it is not measured again until somebody deletes its entry. With
`FLEX_TILES=` (empty) no file is read or written, and what FLEX_TUNE finds lasts as long as the process. Other tiles
add up in another order, so results may differ in their last bits from the table's; the same file gives the same.

Nothing is measured under Triton's interpreter, while a CUDA graph is being captured, or by `torch.compile` (which runs
no kernel while it traces): the table's tiles are used there.
"""

import contextlib
import datetime
import fcntl
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.errors import TritonError
from triton.testing import do_bench

from flex_kernels.backends.triton.tiles import ExpertTiles, Target, Tile, table_tiles
from flex_kernels.candidates import KERNELS, Gemm, Sizes, gemms, neighbours

FORMAT = 1
# What is measured for each class of rows, whatever the first call brings: in the middle of what the class holds.
ROWS_AN_EXPERT = {"few": 96, "many": 512}
TOP_K = 4  # experts a token; it counts for little, how many rows the graft has beside the experts'
WARM_UP_MS, MEASURE_MS = 10, 50
# What a compiler or a launch says of a tile that it cannot do.
REFUSALS = (RuntimeError, ValueError, TypeError, AssertionError, TritonError)


@dataclass(frozen=True)
class Kind:
    """What an entry of the file is valid for. A tile that one Triton compiles may not fit with another."""

    chip: str  # as the driver says it
    dtype: str
    hidden_size: int
    intermediate_size: int
    graft_size: int
    num_experts: int
    rows: str  # "few" or "many" an expert
    triton: str


@dataclass(frozen=True)
class Measured:
    """The winners, and milliseconds of the four GEMMs together: theirs and those of the table's tiles."""

    tiles: ExpertTiles
    ms: float
    default_ms: float


def measured_tiles(
    target: Target, dtype: torch.dtype, few: bool, num_experts: int, sizes: tuple[int, ...], may_measure: bool
) -> ExpertTiles | None:
    """What the file says of this kind of call, or, where the user wants it and it may be, what is measured now.

    Raises:
        ValueError: the file cannot be read or is not one of ours, or FLEX_TUNE is neither 0 nor 1.
    """
    rows = "few" if few else "many"
    kind = Kind(target.name, str(dtype).removeprefix("torch."), *sizes, num_experts, rows, triton.__version__)
    path, remembered = file_path(), _remembered()
    if kind not in remembered and tuning_wanted() and may_measure:
        if path is not None:
            remembered.update(read(path))  # another process may have been here
        if kind not in remembered:
            found = _measure_and_write(kind, target, dtype, path)
            if found is None:
                return None
            remembered[kind] = found
    return remembered.get(kind)


def tuning_wanted() -> bool:
    value = os.environ.get("FLEX_TUNE", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"FLEX_TUNE is {value!r}, want 0 or 1")
    return value == "1"


def file_path() -> Path | None:
    """The file of measured tiles; None where FLEX_TILES is empty."""
    named = os.environ.get("FLEX_TILES")
    if named is None:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flex" / "tiles.json"
    return Path(named).expanduser() if named else None


@cache
def _remembered() -> dict[Kind, ExpertTiles]:
    """What this process knows: the file as it was at the first call, and what was measured since."""
    path = file_path()
    return read(path) if path is not None else {}


def read(path: Path) -> dict[Kind, ExpertTiles]:
    """What the file holds; nothing where there is none, and nothing of entries from before `per_processor` was tried.

    Raises:
        ValueError: it cannot be read, or is not a file of measured tiles of this format.
    """
    entries = [entry for entry in _entries(path) if all("per_processor" in tile for tile in entry["tiles"].values())]
    return {_kind(entry): _tiles(entry) for entry in entries}


def write(path: Path, kind: Kind, measured: Measured) -> None:
    """Adds an entry, or puts it in the old one's place; what other processes wrote meanwhile stays.

    The file is there as a whole at any time: whoever is killed half way leaves the old one.

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
            "about": "tiles of flex_kernels' layer, measured with FLEX_TUNE=1; a deleted entry is measured anew",
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
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _entries(path: Path) -> list[dict]:
    """The checked entries as they stand in the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"format {found!r}, want {FORMAT}")
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


def _measure_and_write(kind: Kind, target: Target, dtype: torch.dtype, path: Path | None) -> ExpertTiles | None:
    """None where the chip's memory does not hold a second layer of this size."""
    kept = "FLEX_TILES is empty: this process alone will use them" if path is None else f"they go to {path}"
    _say(f"measuring tiles once for {kind}, which takes a minute or two; {kept}")
    try:
        measured = measure(kind, target, dtype)
    except torch.OutOfMemoryError as error:
        _say(f"no memory to measure tiles in, the default ones are used: {error}")
        return None
    try:
        if path is not None:
            write(path, kind, measured)
    except OSError as error:
        _say(f"the measured tiles cannot be written ({error}); this process alone will use them")
    return measured.tiles


def _say(message: str) -> None:
    warnings.warn(f"flex_kernels: {message}", RuntimeWarning, stacklevel=2)


def measure(kind: Kind, target: Target, dtype: torch.dtype) -> Measured:
    """The sweep. It takes turns with whatever else runs on the device, and waits for it."""
    top_k = min(TOP_K, kind.num_experts)
    num_tokens = -(-ROWS_AN_EXPERT[kind.rows] * kind.num_experts // top_k)
    layer = (kind.hidden_size, kind.intermediate_size, kind.graft_size)
    defaults = table_tiles(target, dtype, kind.rows == "few", layer)
    device = torch.device(target.device)
    with torch.cuda.device(device.index if device.type == "cuda" else -1):
        runs = gemms(Sizes(num_tokens, top_k, *layer, kind.num_experts), dtype, target)
        times = {kernel: _times(kernel, run, getattr(defaults, kernel), target, dtype) for kernel, run in runs.items()}

    best: dict[int, tuple[float, ExpertTiles]] = {}
    heights = {tile.block_m: None for of_kernel in times.values() for tile in of_kernel}  # the default's comes first
    for height in heights:
        fitting = [{t: ms for t, ms in of_kernel.items() if t.block_m == height} for of_kernel in times.values()]
        if all(fitting):
            winners = [min(candidates, key=candidates.get) for candidates in fitting]
            total = sum(candidates[tile] for candidates, tile in zip(fitting, winners, strict=True))
            best[height] = total, ExpertTiles(**dict(zip(times, winners, strict=True)))
    ms, tiles = min(best.values(), key=lambda sum_and_tiles: sum_and_tiles[0])
    return Measured(tiles, ms, sum(times[kernel][getattr(defaults, kernel)] for kernel in KERNELS))


def _times(kernel: str, run: Gemm, default: Tile, target: Target, dtype: torch.dtype) -> dict[Tile, float]:
    """Milliseconds of every candidate that is right, the default first."""
    truth = run(default)
    times = {default: milliseconds(partial(run, default))}
    for tile in neighbours(kernel, default, target.chip, dtype.itemsize)[1:]:
        try:
            if agree(run(tile), truth):
                times[tile] = milliseconds(partial(run, tile))
        except REFUSALS:
            continue
    return times


def agree(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Whether two tiles computed the same, up to the order of their sums: number by number, within a few roundings."""
    for a, b in zip(ours, theirs, strict=True):
        limit = max(4 * torch.finfo(b.dtype).eps, 1e-4)
        spread = float(b.float().square().mean().sqrt())
        if not torch.allclose(a.float(), b.float(), rtol=limit, atol=limit * spread):
            return False
    return True


def milliseconds(run: Callable[[], object]) -> float:
    """The median on the device's clock, its L2 flushed before each run."""
    return do_bench(run, warmup=WARM_UP_MS, rep=MEASURE_MS, return_mode="median")
