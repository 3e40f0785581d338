"""The layer after the router, forward: routed experts, the graft and their sum (paper: K + 1 experts a token).

    Z_r = [G_e; U_e] x_t    A_r = act(Z_gate) * Z_up    Y_r = D_e A_r        for every row r = (t, k) with expert e
    y_t = c_t sum_k w_tk Y_(t,k) + s_t Y_g,t            s = sigmoid(graft_logits), c = 1 (additive) or 1 - s (convex)

Twin: `reference.grafted_experts`. Four launches: schedule, `[G; U]` with gathered rows and the activation in its
epilogue, `D`, combine. The graft is expert number `E` of both GEMMs (rows = tokens in order, a width of its own).
Fused away: the gathered copy of the input (2 R H elements of traffic), and `Z` between GEMM and activation (4 R I, of
which 2 R I remain if the backward pass needs `Z`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flex_kernels.backends.call import LayerCall
from flex_kernels.backends.triton.activations import pass_through
from flex_kernels.backends.triton.combine import combine_rows
from flex_kernels.backends.triton.grouped import (
    Schedule,
    find_weight,
    grouped_rows,
    halve_columns,
    load_rows,
    load_weight,
    locate_tile,
    make_schedule,
    quarter_columns,
    target_and_tiles,
)
from flex_kernels.backends.triton.launch import Target, alignment, cdiv, codes_and_scales, pair_operand, use_tma
from flex_kernels.backends.triton.tile_file import Tile
from flex_kernels.backends.triton.tiles import beside_codes
from flex_kernels.weights import Experts, Stored


@triton.jit
def _activate_columns(
    gate, up, rows, end_row, first_column, width, a_ptr, z_ptr,
    ACTIVATION: tl.constexpr, ACTIVATE: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """The epilogue for a part of a tile's columns: stores A, and Z if the backward pass needs it."""
    columns = first_column + tl.arange(0, gate.shape[1])
    kept = (rows < end_row)[:, None] & (columns < width)[None, :]
    if ACTIVATE:
        a_offsets = rows.to(tl.int64)[:, None] * width + columns[None, :]
        activations = gate * pass_through(gate, ACTIVATION) * up
        tl.store(a_ptr + a_offsets, activations.to(a_ptr.dtype.element_ty), mask=kept)
    if SAVE:
        z_offsets = rows.to(tl.int64)[:, None] * (2 * width) + columns[None, :]
        tl.store(z_ptr + z_offsets, gate.to(z_ptr.dtype.element_ty), mask=kept)
        tl.store(z_ptr + z_offsets + width, up.to(z_ptr.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["num_tokens", "max_row_tiles", "graft_row_tiles"])
def _gate_up_fwd_kernel(
    hidden_states_ptr, sorted_pairs_ptr, gate_up, scales_ptr, graft_gate_up,
    activations_ptr, graft_activations_ptr, preactivations_ptr, graft_preactivations_ptr,
    row_tiles_ptr, num_row_tiles_ptr, max_row_tiles, graft_row_tiles,
    num_tokens, num_experts, top_k, hidden_size, intermediate_size, graft_size,
    ACTIVATION: tl.constexpr, ACTIVATE: tl.constexpr, SAVE: tl.constexpr, HAS_GRAFT: tl.constexpr,
    TMA: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    hidden_size = hidden_size // ALIGN * ALIGN
    intermediate_size = intermediate_size // ALIGN * ALIGN
    graft_size = graft_size // ALIGN * ALIGN
    num_row_tiles = tl.load(num_row_tiles_ptr)
    num_columns = (intermediate_size + BLOCK_N - 1) // BLOCK_N
    graft_num_columns = (graft_size + BLOCK_N - 1) // BLOCK_N
    num_tiles = num_row_tiles * num_columns + graft_row_tiles * graft_num_columns
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        expert, first_row, end_row, column = locate_tile(
            tile, row_tiles_ptr, num_row_tiles, max_row_tiles, num_columns,
            graft_row_tiles, graft_num_columns, num_tokens, num_experts, BLOCK_M, GROUP_M,
        )  # fmt: skip
        rows = first_row + tl.arange(0, BLOCK_M)
        first_column = column * BLOCK_N

        weight = gate_up
        width = intermediate_size
        weight_row = expert * 2 if TMA else expert * 2 * intermediate_size
        a_ptr = activations_ptr
        z_ptr = preactivations_ptr
        tokens = tl.load(sorted_pairs_ptr + rows, mask=(rows < end_row) & (expert < num_experts), other=0) // top_k
        if HAS_GRAFT and expert == num_experts:
            weight = graft_gate_up
            width = graft_size
            weight_row = 0
            a_ptr = graft_activations_ptr
            z_ptr = graft_preactivations_ptr
            tokens = tl.minimum(rows, num_tokens - 1)
        source_ptrs = hidden_states_ptr + tokens.to(tl.int64)[:, None] * hidden_size + tl.arange(0, BLOCK_K)[None, :]
        place = find_weight(
            weight, weight_row, first_column, hidden_size, width, True, TMA, BLOCK_N, BLOCK_K, PAIR=True, FORMAT=FORMAT
        )

        # One operand of twice the columns: one load and half the matrix instructions a step.
        both = tl.zeros((BLOCK_M, 2 * BLOCK_N), dtype=tl.float32)
        for k in range(0, hidden_size, BLOCK_K):
            source = load_rows(source_ptrs, k, hidden_size, EVEN, BLOCK_K)
            pair = load_weight(
                weight, place, k, first_column, hidden_size, width, True, TMA, EVEN, BLOCK_N, BLOCK_K, PAIR=True,
                scales_ptr=scales_ptr, FORMAT=FORMAT, DTYPE=source.dtype,
            )  # fmt: skip
            both = tl.dot(source, pair, both, input_precision="ieee")

        gate, up = halve_columns(both)
        gate_parts, up_parts = quarter_columns(gate), quarter_columns(up)
        for part in tl.static_range(4):
            _activate_columns(
                gate_parts[part], up_parts[part], rows, end_row, first_column + part * (BLOCK_N // 4), width,
                a_ptr, z_ptr, ACTIVATION, ACTIVATE, SAVE,
            )  # fmt: skip


def gate_up_fwd(
    hidden_states: Tensor,
    sorted_pairs: Tensor,
    top_k: int,
    gate_up_proj: Experts,
    graft_gate_up_proj: Tensor | None,
    schedule: Schedule,
    target: Target,
    tile: Tile,
    activation: str,
    save_preactivations: bool,
    activate: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """activations [R, I], graft_activations [T, I_g] or None, preactivations [R or 0, 2I], graft's [T or 0, 2I_g].

    With `activate=False` the first two have no rows. Beside codes the graft, which is dense, has a launch of its own.
    """
    if isinstance(gate_up_proj, Stored):
        tile = beside_codes(target, "gate_up", gate_up_proj.format.name, tile)
    if isinstance(gate_up_proj, Stored) and graft_gate_up_proj is not None:
        rows, rest = (hidden_states, sorted_pairs, top_k), (target, tile, activation, save_preactivations, activate)
        activations, _, preactivations, _ = gate_up_fwd(*rows, gate_up_proj, None, schedule, *rest)
        alone = (graft_gate_up_proj[None], graft_gate_up_proj, schedule.graft_alone())
        _, graft_activations, _, graft_preactivations = gate_up_fwd(*rows, *alone, *rest)
        return activations, graft_activations, preactivations, graft_preactivations
    num_tokens, hidden_size = hidden_states.shape
    num_experts, intermediate_size = gate_up_proj.shape[0], gate_up_proj.shape[1] // 2
    has_graft = graft_gate_up_proj is not None
    graft_size = graft_gate_up_proj.shape[0] // 2 if has_graft else 0
    activations = hidden_states.new_empty(schedule.num_rows if activate else 0, intermediate_size)
    graft_activations = hidden_states.new_empty(num_tokens if activate else 0, graft_size) if has_graft else None
    saved_rows, saved_tokens = (schedule.num_rows, num_tokens) if save_preactivations else (0, 0)
    preactivations = hidden_states.new_empty(saved_rows, 2 * intermediate_size)
    graft_preactivations = hidden_states.new_empty(saved_tokens if has_graft else 0, 2 * graft_size)
    even = hidden_size % tile.block_k == 0
    tma = use_tma(target, gate_up_proj, graft_gate_up_proj)
    codes, scales, format = codes_and_scales(gate_up_proj)
    graft_row_tiles = schedule.graft_row_tiles(has_graft)
    max_tiles = schedule.max_row_tiles * cdiv(intermediate_size, tile.block_n)
    max_tiles += graft_row_tiles * cdiv(graft_size, tile.block_n)
    _gate_up_fwd_kernel[(target.programs(tile, max_tiles),)](
        hidden_states, sorted_pairs,
        pair_operand(codes, intermediate_size, tma, tile), scales,
        pair_operand(graft_gate_up_proj, graft_size, tma, tile),
        activations, graft_activations, preactivations, graft_preactivations,
        schedule.row_tiles, schedule.num_row_tiles, schedule.max_row_tiles, graft_row_tiles,
        num_tokens, num_experts, top_k, hidden_size, intermediate_size, graft_size,
        ACTIVATION=activation, ACTIVATE=activate, SAVE=save_preactivations, HAS_GRAFT=has_graft, TMA=tma, EVEN=even,
        ALIGN=alignment(hidden_size, intermediate_size, graft_size), FORMAT=format,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return activations, graft_activations, preactivations, graft_preactivations


def experts_fwd(call: LayerCall, save_preactivations: bool) -> tuple[Tensor, Tensor, Tensor]:
    """out [T, H], preactivations [T*K, 2I] in plan order, graft_preactivations [T, 2I_g]; see the module's docstring.

    Without `save_preactivations` the last two have no rows. fp32 products run in full precision (`ieee`), as PyTorch's
    own default does.
    """
    call = call.contiguous()
    if len(call.hidden_states) == 0:
        return torch.empty_like(call.hidden_states), *_no_preactivations(call)
    target, tiles = target_and_tiles(call)
    with torch.cuda.device_of(call.hidden_states):
        schedule = make_schedule(call.sorted_pairs, call.expert_offsets, len(call.hidden_states), tiles.block_m)
        activations, graft_activations, *preactivations = gate_up_fwd(
            call.hidden_states, call.sorted_pairs, call.routing_weights.shape[1], call.gate_up_proj,
            call.graft_gate_up_proj, schedule, target, tiles.gate_up, call.activation, save_preactivations,
        )  # fmt: skip
        expert_out = grouped_rows(
            activations, graft_activations, call.down_proj, call.graft_down_proj,
            schedule, target, tiles.down, inner_last=True,
        )  # fmt: skip
        out = combine_rows(
            expert_out, schedule.row_of_pair, call.routing_weights, call.graft_logits, call.combine, call.has_graft
        )
    return out, *preactivations


def preactivations_fwd(call: LayerCall) -> tuple[Tensor, Tensor]:
    """Z alone, for a backward that kept none: preactivations [T*K, 2I] and graft_preactivations [T, 2I_g]."""
    call = call.contiguous()
    if len(call.hidden_states) == 0:
        return _no_preactivations(call)
    target, tiles = target_and_tiles(call)
    with torch.cuda.device_of(call.hidden_states):
        schedule = make_schedule(call.sorted_pairs, call.expert_offsets, len(call.hidden_states), tiles.block_m)
        *_, preactivations, graft_preactivations = gate_up_fwd(
            call.hidden_states, call.sorted_pairs, call.routing_weights.shape[1], call.gate_up_proj,
            call.graft_gate_up_proj, schedule, target, tiles.gate_up, "silu", save_preactivations=True, activate=False,
        )  # fmt: skip
    return preactivations, graft_preactivations


def _no_preactivations(call: LayerCall) -> tuple[Tensor, Tensor]:
    empty = call.hidden_states.new_empty
    return empty(0, call.gate_up_proj.shape[1]), empty(0, 2 * call.graft_width)
