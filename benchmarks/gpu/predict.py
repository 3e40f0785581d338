"""What arithmetic says before anything is measured: the table of predictions in NOTES.md (`--predict`).

Every product takes the longer of its operations (rows padded to whole tiles) and its bytes; what only streams takes its
bytes; each launch leaves a gap. `floor` is the same without padding, gaps and losses, as the design counts it: useful
operations at the dense rate.
"""

from dataclasses import dataclass, replace

import torch

from benchmarks.gpu.layer_part import useful_flops
from benchmarks.shapes import MODELS, TOKENS, Shape
from benchmarks.tables import table
from flex_kernels.backends.triton import launch, tiles

# One H200, from the design: dense bf16 products of random matrices, and copies.
DENSE_FLOP_S = 788e12
COPY_BYTES_S = 4.3e12
# Assumed: what a plain Triton GEMM reaches of the dense rate inside its tiles, and the gap between two launches.
TILE_EFFICIENCY = 0.75
GAP_S = 2e-6
FORWARD_LAUNCHES, BACKWARD_LAUNCHES = 6, 7
HOPPER = launch.Target("sm90", 132)


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


def predict(model: Shape, num_tokens: int) -> Prediction:
    shape = replace(model, num_tokens=num_tokens)
    T, H, width, experts = num_tokens, shape.hidden_size, shape.intermediate_size, shape.num_experts + 1
    routed = T * shape.top_k
    table = tiles.expert_tiles(HOPPER, torch.bfloat16, routed, shape.num_experts, (H, width, width))
    rows = routed + T
    padded = padded_rows(shape, table.block_m) + -(-T // table.block_m) * table.block_m

    def product(inner: int, outer: int, moved: int) -> float:
        operations = 2 * padded * inner * outer / (TILE_EFFICIENCY * DENSE_FLOP_S)
        return max(operations, 2 * (experts * inner * outer + moved) / COPY_BYTES_S)

    def streamed(numbers: int) -> float:
        return 2 * numbers / COPY_BYTES_S

    forward = product(H, 2 * width, rows * (H + 3 * width)) + product(width, H, rows * (H + width))
    forward += streamed((rows + T) * H) + FORWARD_LAUNCHES * GAP_S
    backward = product(H, width, rows * (H + 4 * width)) + product(2 * width, H, rows * (H + 2 * width))
    backward += streamed((rows + T) * H) + BACKWARD_LAUNCHES * GAP_S
    backward += 6 * T * H * width / DENSE_FLOP_S  # the graft's weight gradients
    seconds = {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}
    floor = {what: 1e3 * useful_flops(shape, what) / DENSE_FLOP_S for what in seconds}
    return Prediction(table.block_m, padded / rows, floor, {what: 1e3 * value for what, value in seconds.items()})


def lines() -> list[str]:
    columns = ["shape", "T", "rows an expert", "block_m", "padded", "floor fwd", "floor bwd", "predicted fwd"]
    columns += ["predicted bwd", "predicted fwd+bwd", "of the dense rate"]
    rows = []
    for tokens in sorted(TOKENS):
        for model in MODELS:
            found = predict(model, tokens)
            cells = [model.name, tokens, tokens * model.top_k // model.num_experts, found.block_m]
            cells += [
                f"{100 * (found.padding - 1):.0f} %",
                f"{found.floor_ms['fwd']:.2f}",
                f"{found.floor_ms['bwd']:.2f}",
            ]
            cells += [f"{found.ms[what]:.2f}" for what in ("fwd", "bwd", "fwd+bwd")]
            rows.append([*cells, f"{100 * found.floor_ms['fwd+bwd'] / found.ms['fwd+bwd']:.0f} %"])
    return table(columns, rows, "Predictions, in milliseconds")
