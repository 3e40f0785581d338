"""Measures tiles on the user's own chip: which are worth a try, the layer's four grouped GEMMs as functions of a tile,
and the sweep. It stands above the kernels; `plan.py` hands it down to `tiles.py`.

`FLEX_TUNE=1`: the first layer call of a new kind (`Kind`: chip, dtype, sizes, few or many rows per expert, Triton)
times at most a dozen tiles around the table's for each of the four grouped GEMMs, on random operands of these sizes,
with `ROWS_PER_EXPERT` rows. A tile that does not compile, does not fit or does not compute what the table's tile
computes is out. The four must agree on `block_m`: for each height the best of each kernel are added up, and the least
sum wins. `make bench-gpu PART=sweep` tries all candidates.

The winners go into the user's file (`tile_file.py`). A kind that is in it is not measured again until its entry is
deleted; without a file they last as long as the process. Other tiles add up in another order, so results may differ
from the table's in their last bits; the same file gives the same bits.

Nothing is measured under Triton's interpreter, while a CUDA graph is being captured, or by `torch.compile` (which runs
no kernel while it traces): the table's tiles are used there.
"""

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from triton.errors import TritonError
from triton.testing import do_bench

from flex_kernels.backends.call import LayerCall
from flex_kernels.backends.triton.experts_bwd import d_preactivations
from flex_kernels.backends.triton.experts_fwd import gate_up_fwd
from flex_kernels.backends.triton.grouped import Schedule, grouped_rows, make_schedule
from flex_kernels.backends.triton.launch import Target
from flex_kernels.backends.triton.routing_plan import routing_plan
from flex_kernels.backends.triton.tile_file import KERNELS, ExpertTiles, Kind, Measured, Tile, file_path, write
from flex_kernels.backends.triton.tiles import table_tiles

# Rows per expert measured for each class: a middle value of the class, not the first call's.
ROWS_PER_EXPERT = {"few": 48, "many": 512}
TOP_K = 4  # experts per token; the result hardly depends on it
WARM_UP_MS, MEASURE_MS = 10, 50
# How a compiler or a launch refuses a tile.
REFUSALS = (RuntimeError, ValueError, TypeError, AssertionError, TritonError)
# Shared memory that one program may have. Accumulators must leave a thread registers for the rest.
SHARED_BYTES = {
    "sm80": 163 << 10,
    "sm90": 227 << 10,
    "sm100": 227 << 10,
    "gfx942": 64 << 10,
    "small": 99 << 10,
    "interpreter": 99 << 10,
}
ACCUMULATORS_PER_THREAD = 128
REGISTERS_PER_LANE = 2048  # of a processor
LANES = {"gfx942": 64}  # of a warp; elsewhere 32
LEAST_OTHER_REGISTERS = 32  # a thread
MOST_NEIGHBOURS = 12
Gemm = Callable[[Tile], list[Tensor]]


@dataclass(frozen=True)
class Sizes:
    """Of one layer call; without a graft `graft_size` is 0."""

    num_tokens: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    graft_size: int
    num_experts: int


def name_of(tile: Tile) -> str:
    sizes = f"{tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.num_warps} s{tile.num_stages}"
    return f"{sizes} p{tile.per_processor} g{tile.group_m}"


def fits(kernel: str, tile: Tile, chip: str, element_bytes: int) -> bool:
    """By arithmetic; the compiler may still refuse it, or use more registers than it counts here."""
    pairs, threads = 2 if kernel == "gate_up" else 1, LANES.get(chip, 32) * tile.num_warps
    shared_bytes = element_bytes * tile.num_stages * tile.block_k * (tile.block_m + pairs * tile.block_n)
    accumulators = pairs * tile.block_m * tile.block_n // threads
    registers = tile.per_processor * threads * (accumulators + LEAST_OTHER_REGISTERS)
    return (
        tile.per_processor * shared_bytes <= SHARED_BYTES[chip]
        and accumulators <= ACCUMULATORS_PER_THREAD
        and registers <= LANES.get(chip, 32) * REGISTERS_PER_LANE
    )


def all_candidates(kernel: str, default: Tile) -> Iterator[Tile]:
    """For 16-bit operands on Hopper: the default first, then every product of usual sizes that fits.

    Where two programs fit a processor, one alone would leave half of it idle and is not tried; two stages are tried
    only where they make room for the second program.
    """
    yield default
    for group_m in (1, 4, 16, 32):
        yield replace(default, group_m=group_m)
    for *sizes, num_stages in itertools.product((64, 128), (64, 128, 256), (64, 128), (4, 8), (2, 3, 4, 5)):
        alone, shared, roomier = (
            Tile(*sizes, *rest) for rest in ((num_stages, 1), (num_stages, 2), (num_stages + 1, 2))
        )
        two_fit = fits(kernel, shared, "sm90", 2)
        tile = shared if two_fit else alone
        needless = num_stages == 2 and (not two_fit or fits(kernel, roomier, "sm90", 2))
        if tile != default and not needless and fits(kernel, tile, "sm90", 2):
            yield tile


def neighbours(kernel: str, default: Tile, chip: str, element_bytes: int) -> list[Tile]:
    """The default first, then the likeliest: its own height, twice and half of it, each with one other size changed.

    At most `MOST_NEIGHBOURS`, and as many of each height, since the four kernels must agree on one.
    """
    columns, stages = default.block_n, default.num_stages
    shared = {"block_n": columns // 2, "num_warps": 4, "num_stages": min(stages, 3), "per_processor": 2}
    alone = {"num_warps": 8, "per_processor": 1}
    changes: list[dict[str, int]] = [
        {},
        {"block_n": columns // 2},
        shared if default.per_processor == 1 else alone,
        {"num_stages": stages - 1},
        {"num_warps": 4 if default.num_warps == 8 else 8},
        {"block_n": columns * 2},
        {"num_stages": stages + 1},
        {"group_m": 16},
        {"block_k": default.block_k * 2},
    ]
    heights = [m for m in (default.block_m, default.block_m * 2, default.block_m // 2) if 16 <= m <= 128]
    found = []
    for height in heights:
        tiles = [replace(default, block_m=height, **change) for change in changes]
        # The epilogues take a tile's columns in four parts of at least eight.
        sound = [tile for tile in tiles if tile.block_n >= 32 and tile.num_stages >= 1]
        fitting: dict[Tile, None] = {}  # in order, each once
        for tile in sound:
            counts = range(tile.per_processor, 0, -1)
            alike = [replace(tile, per_processor=count) for count in counts]
            largest = (
                tile if tile == default else next((t for t in alike if fits(kernel, t, chip, element_bytes)), None)
            )
            if largest is not None:
                fitting[largest] = None
        found += list(fitting)[: max(1, MOST_NEIGHBOURS // len(heights))]
    return found


def gemms(sizes: Sizes, dtype: torch.dtype, target: Target) -> dict[str, Gemm]:
    """Each of `KERNELS` on random operands; all that it computes comes back. On "meta" for the compiler alone.

    A call makes its own schedule of row tiles, which is one small launch more. The random numbers are the same at
    every call, and the caller's generators stay where they are.
    """
    T, K, H, E = sizes.num_tokens, sizes.top_k, sizes.hidden_size, sizes.num_experts
    width, graft_size, device = sizes.intermediate_size, sizes.graft_size, torch.device(target.device)
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

    def random(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device, generator=generator).mul_(std)

    def graft(*shape: int, std: float = 1.0) -> Tensor | None:
        return random(*shape, std=std) if graft_size else None

    routing_weights = torch.rand(T, K, dtype=torch.float32, device=device, generator=generator)
    if generator is None:
        pairs, offsets = (torch.empty(n, dtype=torch.int32, device=device) for n in (T * K, E + 1))
    else:
        scores = torch.rand(T, E, dtype=torch.float32, device=device, generator=generator)
        pairs, _, offsets = routing_plan(scores.topk(K).indices, E)
    x, d_out = random(T, H), random(T, H)
    gate_up, down = random(E, 2 * width, H, std=H**-0.5), random(E, H, width, std=width**-0.5)
    graft_gate_up = graft(2 * graft_size, H, std=H**-0.5)
    graft_down = graft(H, graft_size, std=max(graft_size, 1) ** -0.5)
    activations, graft_activations = random(T * K, width), graft(T, graft_size)
    # Pre-activations, and in their place for `d_hidden` also their gradient.
    rows, graft_rows = random(T * K, 2 * width), graft(T, 2 * graft_size)
    graft_logits = torch.zeros(T, dtype=torch.float32, device=device) if graft_size else None
    layer = (gate_up, down, graft_gate_up, graft_down, graft_logits)
    call = LayerCall(x, pairs, offsets, routing_weights, *layer).contiguous()
    saved = (d_out, rows, x.new_empty(0, 0) if graft_rows is None else graft_rows)

    def schedule(tile: Tile) -> Schedule:
        return make_schedule(pairs, offsets, T, tile.block_m)

    def run_gate_up(tile: Tile) -> list[Tensor]:
        results = gate_up_fwd(x, pairs, K, gate_up, graft_gate_up, schedule(tile), target, tile, "silu", True)
        return [result for result in results if result is not None and result.numel()]

    def run_down(tile: Tile) -> list[Tensor]:
        return [grouped_rows(activations, graft_activations, down, graft_down, schedule(tile), target, tile, True)]

    def run_d_preactivations(tile: Tile) -> list[Tensor]:
        *d_rows, products, graft_products = d_preactivations(call, *saved, schedule(tile), target, tile)
        # One partial sum per column tile; summed here as in the layer.
        sums = [partials.sum(1) for partials in (products, graft_products) if partials is not None]
        return [result for result in (*d_rows, *sums) if result is not None]

    def run_d_hidden(tile: Tile) -> list[Tensor]:
        return [grouped_rows(rows, graft_rows, gate_up, graft_gate_up, schedule(tile), target, tile, False)]

    return dict(zip(KERNELS, (run_gate_up, run_down, run_d_preactivations, run_d_hidden), strict=True))


def tune(kind: Kind, target: Target, dtype: torch.dtype) -> ExpertTiles | None:
    """Measures a kind of call and writes the winners down; None if the chip cannot hold a second layer of this size.

    Raises:
        ValueError: the file is not one of measured tiles.
    """
    path = file_path()
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
    num_tokens = -(-ROWS_PER_EXPERT[kind.rows] * kind.num_experts // top_k)
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
