"""The layer after the router, backward, with frozen experts: no weight gradient but the graft's.

Only X and the pre-activations Z were saved; A is recomputed in the epilogue. With `c_t` = 1 (additive) or 1 - s_t:

    row r = (t, k):  dA'_r = D_e^T dY_t      p_r = <dA'_r, A_r>      dw_r = c_t p_r      dZ_r = glu'(Z_r; w_r c_t dA'_r)
    graft row t:     dA'_t = D_g^T dY_t      p_t = <dA'_t, A_t>                          dZ_t = glu'(Z_t; s_t dA'_t)
    dlogit_t = s_t (1 - s_t) (p_t - [convex] sum_k w_tk p_tk)        dX_t = sum_k [G_e; U_e]^T dZ_r + [G_g; U_g]^T dZ_t
    d[G_g; U_g] = dZ^T X                                             dD_g = dY^T (s A)

Twin: autograd of `reference.grafted_experts`. Launches: schedule, `D^T` with gathered rows and all of the first two
lines in its epilogue (`p` as one fp32 partial per column tile), reduction of `p` in column order, `[G; U]^T`, sum over
slots, and two dense products for the graft. No atomics: bitwise repeatable. Never stored: the experts' outputs, dA'.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flex_kernels.backends.call import LayerCall
from flex_kernels.backends.triton.activations import activation_slope, pass_through
from flex_kernels.backends.triton.combine import sum_rows
from flex_kernels.backends.triton.grouped import (
    Schedule,
    eighth_columns,
    find_weight,
    grouped_rows,
    load_rows,
    load_weight,
    locate_tile,
    make_schedule,
    quarter_columns,
    target_and_tiles,
)
from flex_kernels.backends.triton.launch import (
    Target,
    alignment,
    cdiv,
    codes_and_scales,
    contiguous,
    next_power_of_2,
    operand,
    reduction_tokens,
    use_tma,
)
from flex_kernels.backends.triton.tile_file import Tile
from flex_kernels.backends.triton.tiles import beside_codes
from flex_kernels.weights import Stored


@triton.jit
def _load_preactivations(z_ptr, rows, row_mask, first_column, width, COLUMNS: tl.constexpr):
    """Gate and up of a part of a tile's columns, as they were saved."""
    columns = first_column + tl.arange(0, COLUMNS)
    kept = row_mask[:, None] & (columns < width)[None, :]
    z_ptrs = z_ptr + rows.to(tl.int64)[:, None] * (2 * width) + columns[None, :]
    return tl.load(z_ptrs, mask=kept, other=0.0), tl.load(z_ptrs + width, mask=kept, other=0.0)


@triton.jit
def _finish_columns(
    d_activations, gate, up, scale, rows, row_mask, first_column, width, is_graft,
    d_z_ptr, opened_activations_ptr,
    ACTIVATION: tl.constexpr, STORE_ROUTED: tl.constexpr, STORE_GRAFT: tl.constexpr, STORE_OPENED: tl.constexpr,
):  # fmt: skip
    """The epilogue for a part of a tile's columns: stores dZ (and s A for the graft), returns this part of `p`."""
    columns = first_column + tl.arange(0, d_activations.shape[1])
    kept = row_mask[:, None] & (columns < width)[None, :]
    z_offsets = rows.to(tl.int64)[:, None] * (2 * width) + columns[None, :]
    stored_type = gate.dtype
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    share = pass_through(gate, ACTIVATION)
    products = tl.sum(tl.where(kept, d_activations * (gate * share * up), 0.0), axis=1)
    if STORE_OPENED:
        opened = gate * share * up * scale[:, None]
        a_offsets = rows.to(tl.int64)[:, None] * width + columns[None, :]
        tl.store(opened_activations_ptr + a_offsets, opened.to(stored_type), mask=kept & is_graft)
    if STORE_ROUTED or STORE_GRAFT:
        if not STORE_ROUTED:
            kept = kept & is_graft
        d_activations *= scale[:, None]
        d_gate = d_activations * up * activation_slope(gate, share, ACTIVATION)
        d_up = d_activations * (gate * share)
        tl.store(d_z_ptr + z_offsets, d_gate.to(stored_type), mask=kept)
        tl.store(d_z_ptr + z_offsets + width, d_up.to(stored_type), mask=kept)
    return products


@triton.jit(do_not_specialize=["num_tokens", "max_row_tiles", "graft_row_tiles"])
def _d_preactivations_kernel(
    d_out_ptr, sorted_pairs_ptr, routing_weights_ptr, graft_logits_ptr, down, scales_ptr, graft_down,
    preactivations_ptr, graft_preactivations_ptr,
    d_preactivations_ptr, d_graft_preactivations_ptr, opened_activations_ptr, products_ptr, graft_products_ptr,
    row_tiles_ptr, num_row_tiles_ptr, max_row_tiles, graft_row_tiles,
    num_tokens, num_experts, top_k, hidden_size, intermediate_size, graft_size,
    ACTIVATION: tl.constexpr, CONVEX: tl.constexpr, HAS_GRAFT: tl.constexpr, ROUTED: tl.constexpr,
    STORE_ROUTED: tl.constexpr, STORE_GRAFT: tl.constexpr, STORE_OPENED: tl.constexpr, PRODUCTS: tl.constexpr,
    TMA: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    hidden_size = hidden_size // ALIGN * ALIGN
    intermediate_size = intermediate_size // ALIGN * ALIGN
    graft_size = graft_size // ALIGN * ALIGN
    num_row_tiles = 0
    if ROUTED:
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
        row_mask = rows < end_row
        first_column = column * BLOCK_N

        pairs = tl.load(sorted_pairs_ptr + rows, mask=row_mask & (expert < num_experts), other=0)
        tokens = pairs // top_k
        weight = down
        width = intermediate_size
        weight_row = expert * hidden_size
        z_ptr = preactivations_ptr
        d_z_ptr = d_preactivations_ptr
        p_ptr = products_ptr
        p_width = num_columns
        if HAS_GRAFT and FORMAT == "dense" and expert == num_experts:
            tokens = tl.minimum(rows, num_tokens - 1)
            weight = graft_down
            width = graft_size
            weight_row = 0
            z_ptr = graft_preactivations_ptr
            d_z_ptr = d_graft_preactivations_ptr
            p_ptr = graft_products_ptr
            p_width = graft_num_columns
        source_ptrs = d_out_ptr + tokens.to(tl.int64)[:, None] * hidden_size + tl.arange(0, BLOCK_K)[None, :]
        place = find_weight(
            weight, weight_row, first_column, hidden_size, width, False, TMA, BLOCK_N, BLOCK_K, FORMAT=FORMAT
        )

        d_activations = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, hidden_size, BLOCK_K):
            source = load_rows(source_ptrs, k, hidden_size, EVEN, BLOCK_K)
            matrix = load_weight(
                weight, place, k, first_column, hidden_size, width, False, TMA, EVEN, BLOCK_N, BLOCK_K,
                scales_ptr=scales_ptr, FORMAT=FORMAT, DTYPE=source.dtype,
            )  # fmt: skip
            d_activations = tl.dot(source, matrix, d_activations, input_precision="ieee")

        is_graft = expert == num_experts
        scale = tl.load(routing_weights_ptr + pairs, mask=row_mask & (expert < num_experts), other=0.0).to(tl.float32)
        if HAS_GRAFT:
            opening = tl.sigmoid(tl.load(graft_logits_ptr + tokens, mask=row_mask, other=0.0).to(tl.float32))
            if CONVEX:
                scale *= 1.0 - opening
            scale = tl.where(is_graft, opening, scale)
        products = tl.zeros((BLOCK_M,), dtype=tl.float32)
        # The compiler moves no load over a store that may hit the same memory, so the next part's are written first.
        PARTS: tl.constexpr = 8 if BLOCK_N >= 64 else 4
        COLUMNS: tl.constexpr = BLOCK_N // PARTS
        parts = eighth_columns(d_activations) if PARTS == 8 else quarter_columns(d_activations)
        next_gate, next_up = _load_preactivations(z_ptr, rows, row_mask, first_column, width, COLUMNS)
        for part in tl.static_range(PARTS):
            part_column = first_column + part * COLUMNS
            gate, up = next_gate, next_up
            if part + 1 < PARTS:
                next_gate, next_up = _load_preactivations(z_ptr, rows, row_mask, part_column + COLUMNS, width, COLUMNS)
            products += _finish_columns(
                parts[part], gate, up, scale, rows, row_mask, part_column, width, is_graft,
                d_z_ptr, opened_activations_ptr,
                ACTIVATION, STORE_ROUTED, STORE_GRAFT, STORE_OPENED,
            )  # fmt: skip
        if PRODUCTS:
            tl.store(p_ptr + rows.to(tl.int64) * p_width + column, products, mask=row_mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _reduce_products_kernel(
    products_ptr, graft_products_ptr, row_of_pair_ptr, routing_weights_ptr, graft_logits_ptr,
    d_routing_weights_ptr, d_graft_logits_ptr,
    num_tokens, top_k, num_columns, graft_num_columns,
    ROUTED: tl.constexpr, CONVEX: tl.constexpr, NEED_WEIGHTS: tl.constexpr, NEED_LOGITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`p` summed over column tiles, always in the same order; then `dw` and `dlogit`."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_mask = tokens < num_tokens
    partials = tl.arange(0, BLOCK_C)
    opening = tl.zeros((BLOCK_T,), dtype=tl.float32)
    if NEED_LOGITS or CONVEX:
        opening = tl.sigmoid(tl.load(graft_logits_ptr + tokens, mask=token_mask, other=0.0).to(tl.float32))
    d_opening = tl.zeros((BLOCK_T,), dtype=tl.float32)
    if ROUTED:
        for slot in range(top_k):
            pairs = tokens * top_k + slot
            rows = tl.load(row_of_pair_ptr + pairs, mask=token_mask, other=-1).to(tl.int64)
            mask = (rows >= 0)[:, None] & (partials < num_columns)[None, :]
            offsets = rows[:, None] * num_columns + partials[None, :]
            product = tl.sum(tl.load(products_ptr + offsets, mask=mask, other=0.0), axis=1)
            if CONVEX:
                weights = tl.load(routing_weights_ptr + pairs, mask=token_mask, other=0.0).to(tl.float32)
                d_opening -= weights * product
                product *= 1.0 - opening
            if NEED_WEIGHTS:
                tl.store(d_routing_weights_ptr + pairs, product, mask=token_mask)
    if NEED_LOGITS:
        mask = token_mask[:, None] & (partials < graft_num_columns)[None, :]
        offsets = tokens[:, None] * graft_num_columns + partials[None, :]
        d_opening += tl.sum(tl.load(graft_products_ptr + offsets, mask=mask, other=0.0), axis=1)
        tl.store(d_graft_logits_ptr + tokens, opening * (1.0 - opening) * d_opening, mask=token_mask)


def d_preactivations(
    call: LayerCall,
    d_out: Tensor,
    preactivations: Tensor,
    graft_preactivations: Tensor,
    schedule: Schedule,
    target: Target,
    tile: Tile,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """dZ [R, 2I], the graft's dZ [T, 2I_g] and s A [T, I_g], and the partials of `p`, [R, columns] and [T, columns]."""
    num_experts, hidden_size, intermediate_size = call.down_proj.shape
    graft_size, has_graft, needs = call.graft_width, call.has_graft, call.needs
    if isinstance(call.down_proj, Stored):
        tile = beside_codes(target, "d_preactivations", call.down_proj.format.name, tile)
    num_columns, graft_num_columns = cdiv(intermediate_size, tile.block_n), cdiv(graft_size, tile.block_n)
    products_wanted = needs.routing_weights or needs.graft_logits
    empty = d_out.new_empty
    d_rows = empty(schedule.num_rows if needs.hidden else 0, 2 * intermediate_size)
    products = empty(schedule.num_rows if products_wanted and call.routed else 0, num_columns, dtype=torch.float32)
    d_graft_rows = opened_activations = graft_products = None
    if has_graft:
        d_graft_rows = empty(schedule.num_tokens, 2 * graft_size)
        opened_activations = empty(schedule.num_tokens if needs.graft else 0, graft_size)
        graft_products = empty(schedule.num_tokens, graft_num_columns, dtype=torch.float32)
    even = hidden_size % tile.block_k == 0
    block_shape = [tile.block_k, tile.block_n]
    launches = [(call.down_proj, call.routed, has_graft)]  # weights, and whose rows: the experts', the graft's
    if isinstance(call.down_proj, Stored):  # beside codes the graft, which is dense, has a launch of its own
        alone = [(call.graft_down_proj[None], False, True)] if has_graft else []
        launches = [(call.down_proj, call.routed, False), *alone]
    for weights, routed, grafted in launches:
        codes, scales, format = codes_and_scales(weights)
        graft_down = call.graft_down_proj if format == "dense" else None
        tma = use_tma(target, weights, graft_down) and even
        graft_row_tiles = schedule.graft_row_tiles(grafted)
        max_tiles = schedule.max_row_tiles * num_columns + graft_row_tiles * graft_num_columns
        _d_preactivations_kernel[(target.programs(tile, max_tiles),)](
            d_out, call.sorted_pairs, call.routing_weights, call.graft_logits,
            operand(codes, tma, block_shape), scales, operand(graft_down, tma, block_shape),
            preactivations, graft_preactivations,
            d_rows, d_graft_rows, opened_activations, products, graft_products,
            schedule.row_tiles, schedule.num_row_tiles, schedule.max_row_tiles, graft_row_tiles,
            schedule.num_tokens, num_experts, call.routing_weights.shape[1], hidden_size, intermediate_size, graft_size,
            ACTIVATION=call.activation, CONVEX=call.convex, HAS_GRAFT=has_graft, ROUTED=routed,
            STORE_ROUTED=needs.hidden, STORE_GRAFT=has_graft and (needs.hidden or needs.graft),
            STORE_OPENED=needs.graft, PRODUCTS=products_wanted, TMA=tma, EVEN=even,
            ALIGN=alignment(hidden_size, intermediate_size, graft_size), FORMAT=format,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return d_rows, d_graft_rows, opened_activations, products, graft_products


def _reduce_products(
    call: LayerCall, schedule: Schedule, products: Tensor, graft_products: Tensor | None
) -> tuple[Tensor, Tensor]:
    """d_routing_weights [T, K] and d_graft_logits [T], fp32; [0] if not needed."""
    (num_tokens, top_k), needs = call.routing_weights.shape, call.needs
    d_routing_weights = products.new_empty((num_tokens, top_k) if needs.routing_weights else 0)
    d_graft_logits = products.new_empty(num_tokens if needs.graft_logits else 0)
    if not (needs.routing_weights or needs.graft_logits):
        return d_routing_weights, d_graft_logits
    num_columns, graft_num_columns = products.shape[1], graft_products.shape[1] if call.has_graft else 0
    block_c = next_power_of_2(max(num_columns, graft_num_columns))
    block_t = reduction_tokens(products.device, block_c)
    _reduce_products_kernel[(cdiv(num_tokens, block_t),)](
        products, graft_products, schedule.row_of_pair, call.routing_weights, call.graft_logits,
        d_routing_weights, d_graft_logits,
        num_tokens, top_k, num_columns, graft_num_columns,
        ROUTED=call.routed, CONVEX=call.convex,
        NEED_WEIGHTS=needs.routing_weights, NEED_LOGITS=needs.graft_logits,
        BLOCK_T=block_t, BLOCK_C=block_c,
    )  # fmt: skip
    return d_routing_weights, d_graft_logits


def experts_bwd(
    d_out: Tensor, call: LayerCall, preactivations: Tensor, graft_preactivations: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """d_hidden_states [T, H], d_routing_weights [T, K] fp32, d_graft_gate_up_proj, d_graft_down_proj, d_graft_logits
    [T] fp32; what is not needed is an empty tensor, and its work is not done."""
    call = call.contiguous()
    hidden_states, has_graft, needs = call.hidden_states, call.has_graft, call.needs
    d_out, preactivations, graft_preactivations = contiguous(d_out, preactivations, graft_preactivations)
    num_tokens, top_k = call.routing_weights.shape
    if num_tokens == 0:
        return _no_tokens(call)
    d_hidden_states, d_graft_gate_up_proj, d_graft_down_proj = (hidden_states.new_empty(0) for _ in range(3))
    target, tiles = target_and_tiles(call)
    with torch.cuda.device_of(hidden_states):
        schedule = make_schedule(call.sorted_pairs, call.expert_offsets, num_tokens, tiles.block_m)
        d_rows, d_graft_rows, opened_activations, products, graft_products = d_preactivations(
            call, d_out, preactivations, graft_preactivations, schedule, target, tiles.d_preactivations
        )
        d_routing_weights, d_graft_logits = _reduce_products(call, schedule, products, graft_products)
        if needs.hidden:
            d_inputs = grouped_rows(
                d_rows, d_graft_rows, call.gate_up_proj, call.graft_gate_up_proj,
                schedule, target, tiles.d_hidden, inner_last=False,
            )  # fmt: skip
            d_hidden_states = sum_rows(d_inputs, schedule.row_of_pair, num_tokens, top_k, has_graft)
        if needs.graft:
            d_graft_gate_up_proj = d_graft_rows.T @ hidden_states
            d_graft_down_proj = d_out.T @ opened_activations
    return d_hidden_states, d_routing_weights, d_graft_gate_up_proj, d_graft_down_proj, d_graft_logits


def _no_tokens(call: LayerCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Every gradient of a batch without tokens: nothing for the tokens, zeros for the graft."""
    needs, empty, wide = call.needs, call.hidden_states.new_empty, call.routing_weights.new_empty
    return (
        empty(call.hidden_states.shape if needs.hidden else 0),
        wide(call.routing_weights.shape if needs.routing_weights else 0, dtype=torch.float32),
        torch.zeros_like(call.graft_gate_up_proj) if needs.graft else empty(0),
        torch.zeros_like(call.graft_down_proj) if needs.graft else empty(0),
        wide(0, dtype=torch.float32),
    )
