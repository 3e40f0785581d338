"""Every tile that might do, for each of the four grouped GEMMs of the layer, on each shape (`--part sweep`).

A candidate is a figure with provider "128x256x64 w8 s4 g8"; `FILE-sweep.json` ranks them. `block_m` is common to the
four (`tiles.ExpertTiles`), so the ranking also adds up, for each `block_m`, the best of each kernel.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from layers import Layers
from shapes import Shape
from torch import Tensor

from flex_kernels import reference
from flex_kernels.kernels import experts_bwd, tiles
from flex_kernels.kernels.experts import gate_up_fwd
from flex_kernels.kernels.grouped import grouped_rows, make_schedule
from flex_kernels.kernels.tiles import Tile
from gpu.layer_part import check
from gpu.record import OURS, Key
from gpu.session import LEAST_SECONDS, OutOfTime, Session

KERNELS = ("gate_up", "down", "d_preactivations", "d_hidden")
# Of one Hopper processor: shared memory of a program; accumulators that leave a thread registers for the rest.
SHARED_BYTES = 227 << 10
ACCUMULATORS_A_THREAD = 128
SECONDS_A_CANDIDATE = 0.15


def name_of(tile: Tile) -> str:
    return f"{tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.num_warps} s{tile.num_stages} g{tile.group_m}"


def candidates(kernel: str, default: Tile, tiny: bool) -> Iterator[Tile]:
    """The default first, then what fits by arithmetic; the compiler may still refuse one."""
    yield default
    if tiny:
        yield replace(default, block_n=default.block_n // 2)
        return
    pairs = 2 if kernel == "gate_up" else 1
    sizes = itertools.product((64, 128), (64, 128, 256), (64, 128), (4, 8), (3, 4, 5), (8,))
    grouped = [replace(default, group_m=group_m) for group_m in (1, 4, 16, 32)]
    for tile in [*grouped, *itertools.starmap(Tile, sizes)]:
        shared_bytes = 2 * tile.num_stages * tile.block_k * (tile.block_m + pairs * tile.block_n)
        accumulators = pairs * tile.block_m * tile.block_n // (32 * tile.num_warps)
        if tile != default and shared_bytes <= SHARED_BYTES and accumulators <= ACCUMULATORS_A_THREAD:
            yield tile


def gemms(layers: Layers, target: tiles.Target) -> dict[str, Callable[[Tile], Tensor]]:
    """The four on real operands. Each makes its own schedule of row tiles, which is one small launch more."""
    experts, graft, top_k = layers.modules[OURS], layers.graft, layers.shape.top_k
    x, d_out, num_tokens = layers.hidden_states, layers.d_out, layers.shape.num_tokens
    pairs, _, offsets = reference.routing_plan(layers.top_k_index, layers.shape.num_experts)
    gate_up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
    graft_gate_up, graft_down = graft.gate_up_proj.detach(), graft.down_proj.detach()
    width = layers.shape.intermediate_size
    rows, graft_rows = (torch.randn(n, width).to(layers.dtype) for n in (num_tokens * top_k, num_tokens))
    d_rows, d_graft_rows = (torch.randn(n, 2 * width).to(layers.dtype) for n in (num_tokens * top_k, num_tokens))
    backward = experts_bwd._Layer(
        d_out, pairs, layers.top_k_weights.float(), down, graft_down, torch.zeros(num_tokens), d_rows, d_graft_rows,
        activation="silu", convex=False, need_hidden=True, need_routing_weights=True, need_graft=True,
        need_graft_logits=True,
    )  # fmt: skip

    def schedule(tile: Tile):
        return make_schedule(pairs, offsets, num_tokens, tile.block_m)

    return {
        "gate_up": lambda tile: gate_up_fwd(
            x, pairs, top_k, gate_up, graft_gate_up, schedule(tile), target, tile, "silu", True
        )[0],
        "down": lambda tile: grouped_rows(rows, graft_rows, down, graft_down, schedule(tile), target, tile, True),
        "d_preactivations": lambda tile: experts_bwd._d_preactivations(backward, schedule(tile), target, tile)[0],
        "d_hidden": lambda tile: grouped_rows(
            d_rows, d_graft_rows, gate_up, graft_gate_up, schedule(tile), target, tile, False
        ),
    }


def measure(session: Session) -> None:
    if session.device.kind == "cpu" and not tiles.INTERPRET:
        session.record.skip(Key("sweep", "all", 0, "tiles", OURS), "Triton needs a device, or TRITON_INTERPRET=1")
        return
    try:
        for tokens, model in itertools.product(session.tokens, session.models):
            sweep(session, model, tokens)
    finally:
        write_ranking(session)


def sweep(session: Session, model: Shape, tokens: int) -> None:
    layers = session.layers(model, tokens)
    shape = layers.shape
    target = tiles.target_of(layers.hidden_states.device)
    sizes = (shape.hidden_size, shape.intermediate_size, shape.intermediate_size)
    rows = shape.num_tokens * shape.top_k
    defaults = tiles.expert_tiles(target, session.dtype, rows, shape.num_experts, sizes)
    with session.on_device():
        runs = gemms(layers, target)
    for kernel, gemm in runs.items():
        truth = gemm(getattr(defaults, kernel))
        for tile in candidates(kernel, getattr(defaults, kernel), session.tiny):
            key = Key("sweep", shape.name, shape.num_tokens, kernel, name_of(tile))
            if not session.again and (key in session.record.figures or key in session.record.skipped):
                continue
            if session.seconds_left() < LEAST_SECONDS:
                raise OutOfTime

            def measured(tile: Tile = tile, gemm: Callable = gemm, truth: Tensor = truth, kernel: str = kernel) -> dict:
                check([gemm(tile)], [truth], session.dtype, kernel)
                seconds = min(SECONDS_A_CANDIDATE, session.seconds_a_measurement)
                return session.measure({kernel: lambda: gemm(tile)}, seconds)[kernel]

            if (values := session.attempt(key, measured)) is not None:
                session.record.add(key, **values, default=tile == getattr(defaults, kernel))


def ranking(figures: dict[Key, dict]) -> list[dict]:
    """For each shape and number of tokens: all tiles by time, and the best sum for each `block_m`."""
    places: dict[tuple[str, int], dict[str, list]] = {}
    for key, row in figures.items():
        if key.part == "sweep":
            kernels = places.setdefault((key.shape, key.tokens), {})
            kernels.setdefault(key.what, []).append((row["ms"], key.provider, row["default"]))
    found = []
    for (shape, tokens), kernels in places.items():
        best_sum = {}
        for block_m in sorted({int(name.partition("x")[0]) for rows in kernels.values() for _, name, _ in rows}):
            fitting = [[row for row in rows if row[1].startswith(f"{block_m}x")] for rows in kernels.values()]
            if all(fitting):
                best_sum[block_m] = {"ms": sum(min(rows)[0] for rows in fitting), "tiles": [min(r)[1] for r in fitting]}
        ranked = {
            kernel: [{"tile": name, "ms": ms, "default": default} for ms, name, default in sorted(rows)]
            for kernel, rows in kernels.items()
        }
        found.append({"shape": shape, "tokens": tokens, "best_sum_by_block_m": best_sum, "kernels": ranked})
    return found


def write_ranking(session: Session) -> None:
    path = session.record.path.with_name(session.record.path.stem + "-sweep.json")
    content = {"machine": session.record.machine, "ranking": ranking(session.record.figures)}
    path.write_text(json.dumps(content, indent=1) + "\n")
