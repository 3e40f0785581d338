"""What arithmetic says before anything is measured: the table of predictions in NOTES.md (`--predict`).

A product's tile takes the longer of its operations (rows padded to whole tiles) and its bytes of L2, and then its
prologue and epilogue; the product takes the longer of its tiles and its bytes of memory. What only streams takes its
bytes of memory; each launch leaves a gap. `floor` has no padding, gaps and losses: the longer of the useful operations
at the dense rate and the bytes that must be read or written once.
"""

import itertools
from dataclasses import dataclass, replace

import torch

from benchmarks.gpu.layer_part import useful_flops
from benchmarks.shapes import MODELS, TOKENS, Shape
from benchmarks.tables import table
from flex_kernels.backends.triton import launch, tiles
from flex_kernels.backends.triton.tile_file import Tile

# Assumed: what the loop of a plain Triton GEMM reaches of the dense rate; what L2 gives (question A of
# `first_part.py` tells); the gap between two launches.
LOOP_EFFICIENCY = 0.93
L2_BYTES_S = 7.5e12
GAP_S = 2e-6
# Counted in the machine code, not measured: cycles of a tile before its loop and after it, at this clock.
PROLOGUE_CYCLES = 3000
EPILOGUE_CYCLES = {"gate_up": 5000, "down": 2500, "d_preactivations": 8000, "d_hidden": 2500}
CYCLES_S = 1.7e9
FORWARD_LAUNCHES, BACKWARD_LAUNCHES = 6, 7
HOPPER = launch.Target("sm90", 132)


@dataclass(frozen=True)
class Card:
    """What one reaches: dense bf16 products of random matrices, and copies."""

    name: str
    dense_flop_s: float
    copy_bytes_s: float


CARDS = (Card("H100 SXM", 798e12, 3.0e12), Card("H200", 788e12, 4.3e12))


@dataclass(frozen=True)
class Prediction:
    block_m: int
    padding: float  # padded rows over rows, the graft's among them
    floor_ms: dict[str, float]
    ms: dict[str, float]


def padded_rows(shape: Shape, block_m: int) -> int:
    """For uniform random routing, which is what the bench has."""
    generator = torch.Generator().manual_seed(0)
    rows = shape.num_tokens * shape.top_k
    counts = torch.randint(shape.num_experts, (rows,), generator=generator).bincount(minlength=shape.num_experts)
    return int((counts + block_m - 1).div(block_m, rounding_mode="floor").sum()) * block_m


def predict(card: Card, model: Shape, num_tokens: int) -> Prediction:
    shape = replace(model, num_tokens=num_tokens)
    T, H, width, experts = num_tokens, shape.hidden_size, shape.intermediate_size, shape.num_experts + 1
    routed = T * shape.top_k
    few = tiles.few_rows(routed, shape.num_experts)
    chosen = tiles.table_tiles(HOPPER, torch.bfloat16, few, (H, width, width))
    rows = routed + T
    padded = padded_rows(shape, chosen.block_m) + -(-T // chosen.block_m) * chosen.block_m

    def product(kernel: str, inner: int, outer: int, moved: int) -> float:
        """`outer` columns for every row, the sum over `inner`."""
        tile: Tile = getattr(chosen, kernel)
        columns = tile.block_n * (2 if kernel == "gate_up" else 1)
        operations = 2 * tile.block_m * columns * inner / (LOOP_EFFICIENCY * card.dense_flop_s)
        l2 = 2 * (tile.block_m + columns) * inner / L2_BYTES_S
        # Of all processors together, one tile after another: whole waves are not counted.
        ends = (PROLOGUE_CYCLES + EPILOGUE_CYCLES[kernel]) / CYCLES_S / HOPPER.num_processors
        tiles_s = padded * outer / (tile.block_m * columns) * (max(operations, l2) + ends)
        return max(tiles_s, 2 * (experts * inner * outer + moved) / card.copy_bytes_s)

    def streamed(numbers: int) -> float:
        return 2 * numbers / card.copy_bytes_s

    forward = product("gate_up", H, 2 * width, rows * (H + 3 * width))
    forward += product("down", width, H, rows * (H + width))
    forward += streamed((rows + T) * H) + FORWARD_LAUNCHES * GAP_S
    backward = product("d_preactivations", H, width, rows * (H + 4 * width))
    backward += product("d_hidden", 2 * width, H, rows * (H + 2 * width))
    backward += streamed((rows + T) * H) + BACKWARD_LAUNCHES * GAP_S
    backward += 6 * T * H * width / card.dense_flop_s  # the graft's weight gradients
    seconds = {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}
    # Each expert's weights, input and output once; Z written in the forward, read in the backward.
    once = {"fwd": 3 * experts * H * width + 2 * T * H + 2 * rows * width}
    once |= {"bwd": once["fwd"], "fwd+bwd": 2 * once["fwd"]}
    floor = {
        what: 1e3 * max(useful_flops(shape, what) / card.dense_flop_s, streamed(numbers))
        for what, numbers in once.items()
    }
    return Prediction(chosen.block_m, padded / rows, floor, {what: 1e3 * value for what, value in seconds.items()})


def lines() -> list[str]:
    columns = ["shape", "T", "rows an expert", "block_m", "padded", "floor fwd", "floor bwd", "predicted fwd"]
    columns += ["predicted bwd", "predicted fwd+bwd", "of the dense rate"]
    found = []
    for card in CARDS:
        rows = []
        for tokens, model in itertools.product(sorted(TOKENS), MODELS):
            own = predict(card, model, tokens)
            cells = [model.name, tokens, tokens * model.top_k // model.num_experts, own.block_m]
            cells += [f"{100 * (own.padding - 1):.0f} %", *(f"{own.floor_ms[what]:.2f}" for what in ("fwd", "bwd"))]
            cells += [f"{own.ms[what]:.2f}" for what in ("fwd", "bwd", "fwd+bwd")]
            useful = useful_flops(replace(model, num_tokens=tokens), "fwd+bwd") / own.ms["fwd+bwd"] * 1e3
            rows.append([*cells, f"{100 * useful / card.dense_flop_s:.0f} %"])
        found += table(columns, rows, f"Predictions for one {card.name}, in milliseconds")
    return found
