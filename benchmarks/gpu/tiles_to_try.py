"""The candidates of the sweep, and the layer's four grouped GEMMs as functions of a tile."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from shapes import Shape
from torch import Tensor

from flex_kernels import reference
from flex_kernels.kernels import experts_bwd, tiles
from flex_kernels.kernels.experts import gate_up_fwd
from flex_kernels.kernels.grouped import Schedule, grouped_rows, make_schedule
from flex_kernels.kernels.tiles import Tile

KERNELS = ("gate_up", "down", "d_preactivations", "d_hidden")
# Of one Hopper processor: shared memory of a program; accumulators that leave a thread registers for the rest.
SHARED_BYTES = 227 << 10
ACCUMULATORS_A_THREAD = 128


@dataclass(frozen=True)
class Operands:
    """Random ones of one layer, the graft as wide as an expert."""

    shape: Shape
    hidden_states: Tensor  # [T, H]
    pairs: Tensor  # [T*K] int32
    offsets: Tensor  # [E+1] int32
    gate_up: Tensor  # [E+1, 2I, H]; the last one is the graft
    down: Tensor  # [E+1, H, I]
    rows: Tensor  # [T*K + T, 2I]; the last T are the graft's


def operands(shape: Shape, dtype: torch.dtype, device: str) -> Operands:
    """On "meta" without memory, for the compiler."""

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=dtype, device=device)

    T, H, E, K, width = (
        shape.num_tokens, shape.hidden_size, shape.num_experts, shape.top_k, shape.intermediate_size
    )  # fmt: skip
    if device == "meta":
        pairs, offsets = (torch.empty(n, dtype=torch.int32, device=device) for n in (T * K, E + 1))
    else:
        indices = torch.rand(T, E, device=device).topk(K).indices
        pairs, _, offsets = reference.routing_plan(indices, E)
    gate_up, down = random(E + 1, 2 * width, H) * H**-0.5, random(E + 1, H, width) * width**-0.5
    return Operands(shape, random(T, H), pairs, offsets, gate_up, down, random(T * K + T, 2 * width))


def name_of(tile: Tile) -> str:
    return f"{tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.num_warps} s{tile.num_stages} g{tile.group_m}"


def candidates(kernel: str, default: Tile) -> Iterator[Tile]:
    """The default first, then what fits by arithmetic; the compiler may still refuse one."""
    yield default
    pairs = 2 if kernel == "gate_up" else 1
    sizes = itertools.product((64, 128), (64, 128, 256), (64, 128), (4, 8), (3, 4, 5), (8,))
    grouped = [replace(default, group_m=group_m) for group_m in (1, 4, 16, 32)]
    for tile in [*grouped, *itertools.starmap(Tile, sizes)]:
        shared_bytes = 2 * tile.num_stages * tile.block_k * (tile.block_m + pairs * tile.block_n)
        accumulators = pairs * tile.block_m * tile.block_n // (32 * tile.num_warps)
        if tile != default and shared_bytes <= SHARED_BYTES and accumulators <= ACCUMULATORS_A_THREAD:
            yield tile


def gemms(given: Operands, target: tiles.Target) -> dict[str, Callable[[Tile], Tensor]]:
    """Each makes its own schedule of row tiles, which is one small launch more."""
    x, pairs, shape = given.hidden_states, given.pairs, given.shape
    T, K, width = shape.num_tokens, shape.top_k, shape.intermediate_size
    gate_up, graft_gate_up = given.gate_up[:-1], given.gate_up[-1]
    down, graft_down = given.down[:-1], given.down[-1]
    d_rows, d_graft_rows = given.rows[: T * K], given.rows[T * K :]
    rows, graft_rows = given.rows[:, :width].contiguous().split([T * K, T])
    backward = experts_bwd._Layer(
        torch.randn_like(x), pairs, torch.rand(T, K, device=x.device), down, graft_down,
        torch.zeros(T, device=x.device), d_rows, d_graft_rows, activation="silu", convex=False, need_hidden=True,
        need_routing_weights=True, need_graft=True, need_graft_logits=True,
    )  # fmt: skip

    def schedule(tile: Tile) -> Schedule:
        return make_schedule(pairs, given.offsets, T, tile.block_m)

    return {
        "gate_up": lambda tile: gate_up_fwd(
            x, pairs, K, gate_up, graft_gate_up, schedule(tile), target, tile, "silu", True
        )[0],
        "down": lambda tile: grouped_rows(rows, graft_rows, down, graft_down, schedule(tile), target, tile, True),
        "d_preactivations": lambda tile: experts_bwd._d_preactivations(backward, schedule(tile), target, tile)[0],
        "d_hidden": lambda tile: grouped_rows(
            d_rows, d_graft_rows, gate_up, graft_gate_up, schedule(tile), target, tile, False
        ),
    }
