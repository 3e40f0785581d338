"""Tiles that may beat the table's, and the layer's four grouped GEMMs as functions of a tile, to measure them by.

`tune.py` tries a dozen of them on the user's chip; `make bench-gpu PART=sweep` tries all.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flex_kernels.backends.triton import experts_bwd
from flex_kernels.backends.triton.experts_fwd import gate_up_fwd
from flex_kernels.backends.triton.grouped import Schedule, grouped_rows, make_schedule
from flex_kernels.backends.triton.routing_plan import routing_plan
from flex_kernels.backends.triton.tiles import Target, Tile

KERNELS = ("gate_up", "down", "d_preactivations", "d_hidden")  # as in `tiles.ExpertTiles`
# Shared memory that one program may have. Accumulators must leave a thread registers for the rest.
SHARED_BYTES = {
    "sm80": 163 << 10,
    "sm90": 227 << 10,
    "sm100": 227 << 10,
    "gfx942": 64 << 10,
    "small": 99 << 10,
    "interpreter": 99 << 10,
}
ACCUMULATORS_A_THREAD = 128
REGISTERS_A_LANE = 2048  # of a processor
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
        and accumulators <= ACCUMULATORS_A_THREAD
        and registers <= LANES.get(chip, 32) * REGISTERS_A_LANE
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
    backward = experts_bwd._Layer(
        d_out, pairs, routing_weights, down, graft_down, graft_logits,
        rows, x.new_empty(0, 0) if graft_rows is None else graft_rows, activation="silu", convex=False,
        need_hidden=True, need_routing_weights=True, need_graft=graft_size > 0, need_graft_logits=graft_size > 0,
    )  # fmt: skip

    def schedule(tile: Tile) -> Schedule:
        return make_schedule(pairs, offsets, T, tile.block_m)

    def run_gate_up(tile: Tile) -> list[Tensor]:
        results = gate_up_fwd(x, pairs, K, gate_up, graft_gate_up, schedule(tile), target, tile, "silu", True)
        return [result for result in results if result is not None and result.numel()]

    def run_down(tile: Tile) -> list[Tensor]:
        return [grouped_rows(activations, graft_activations, down, graft_down, schedule(tile), target, tile, True)]

    def run_d_preactivations(tile: Tile) -> list[Tensor]:
        *d_rows, products, graft_products = experts_bwd._d_preactivations(backward, schedule(tile), target, tile)
        # One column of partials a column tile; as in the layer, somebody sums them.
        sums = [partials.sum(1) for partials in (products, graft_products) if partials is not None]
        return [result for result in (*d_rows, *sums) if result is not None]

    def run_d_hidden(tile: Tile) -> list[Tensor]:
        return [grouped_rows(rows, graft_rows, gate_up, graft_gate_up, schedule(tile), target, tile, False)]

    return dict(zip(KERNELS, (run_gate_up, run_down, run_d_preactivations, run_d_hidden), strict=True))
