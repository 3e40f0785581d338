"""The last step of the layer: each token gathers its K expert rows and its graft row and adds them, in fp32.

    y_t = c_t sum_k w_tk Y_tk + s_t Y_g,t      s = sigmoid(graft_logits), c = 1 (additive) or 1 - s (convex)

Backward, with `p_tk = <dY_t, Y_tk>`:

    dY_tk = c_t w_tk dY_t    dw_tk = c_t p_tk    dY_g,t = s_t dY_t    dlogit_t = s_t (1 - s_t) (<dY_t, Y_g,t> - [convex] sum_k w_tk p_tk)

Twin: `reference.combine`. A gather, not a scatter-add: no atomics, one order of addition, each row read once and the
output written once. Inside the layer the rows lie in plan order and are found through `row_of_pair`; with no weights the
same kernel is the sum over slots of the input's gradient.
"""  # noqa: E501

import torch
import triton
import triton.language as tl
from torch import Tensor

from flex_kernels.backends.triton.launch import cdiv, contiguous, token_tile


@triton.jit(do_not_specialize=["num_tokens"])
def _combine_fwd_kernel(
    expert_out_ptr, row_of_pair_ptr, routing_weights_ptr, graft_out_ptr, graft_logits_ptr,
    out_ptr,
    num_tokens, hidden_size,
    TOP_K: tl.constexpr, GATHERED: tl.constexpr, WEIGHTED: tl.constexpr, HAS_GRAFT: tl.constexpr,
    CONVEX: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    token_mask = tokens < num_tokens
    mask = token_mask[:, None] & (columns < hidden_size)[None, :]

    total = tl.zeros((BLOCK_T, BLOCK_H), dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        pairs = tokens.to(tl.int64) * TOP_K + slot
        rows = pairs
        row_mask = mask
        if GATHERED:
            rows = tl.load(row_of_pair_ptr + pairs, mask=token_mask, other=-1).to(tl.int64)
            row_mask = mask & (rows >= 0)[:, None]
        row_ptrs = expert_out_ptr + rows[:, None] * hidden_size + columns[None, :]
        row = tl.load(row_ptrs, mask=row_mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            row *= tl.load(routing_weights_ptr + pairs, mask=token_mask, other=0.0).to(tl.float32)[:, None]
        total += row
    offsets = tokens.to(tl.int64)[:, None] * hidden_size + columns[None, :]
    if HAS_GRAFT:
        graft = tl.load(graft_out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            opening = tl.sigmoid(tl.load(graft_logits_ptr + tokens, mask=token_mask, other=0.0).to(tl.float32))[:, None]
            graft *= opening
            if CONVEX:
                total *= 1.0 - opening
        total += graft
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=mask)


def _launch_fwd(
    expert_out: Tensor,
    row_of_pair: Tensor | None,
    routing_weights: Tensor | None,
    graft_out: Tensor | None,
    graft_logits: Tensor | None,
    out: Tensor,
    top_k: int,
    combine: str,
) -> Tensor:
    num_tokens, hidden_size = out.shape
    block_t, block_h, num_warps = token_tile(out.device, hidden_size)
    _combine_fwd_kernel[(cdiv(num_tokens, block_t), cdiv(hidden_size, block_h))](
        expert_out, row_of_pair, routing_weights, graft_out, graft_logits,
        out,
        num_tokens, hidden_size,
        TOP_K=top_k, GATHERED=row_of_pair is not None, WEIGHTED=routing_weights is not None,
        HAS_GRAFT=graft_out is not None, CONVEX=combine == "convex", BLOCK_T=block_t, BLOCK_H=block_h,
        num_warps=num_warps,
    )  # fmt: skip
    return out


def combine_rows(
    rows: Tensor,
    row_of_pair: Tensor,
    routing_weights: Tensor,
    graft_logits: Tensor | None,
    combine: str,
    has_graft: bool,
) -> Tensor:
    """Inside the layer: rows in plan order [R, H], then the graft's T rows; pairs without a row add nothing."""
    num_tokens, top_k = routing_weights.shape
    graft_out = rows[num_tokens * top_k :] if has_graft else None
    out = rows.new_empty(num_tokens, rows.shape[1])
    return _launch_fwd(rows, row_of_pair, routing_weights, graft_out, graft_logits, out, top_k, combine)


def sum_rows(rows: Tensor, row_of_pair: Tensor, num_tokens: int, top_k: int, has_graft: bool) -> Tensor:
    """`combine_rows` with all weights one: the input's gradient, summed over slots and graft."""
    graft_out = rows[num_tokens * top_k :] if has_graft else None
    out = rows.new_empty(num_tokens, rows.shape[1])
    return _launch_fwd(rows, row_of_pair, None, graft_out, None, out, top_k, "additive")


def combine_fwd(
    expert_out: Tensor, routing_weights: Tensor, graft_out: Tensor | None, graft_logits: Tensor | None, combine: str
) -> Tensor:
    """[T, K, H], [T, K], [T, H], [T] -> [T, H]; the graft's two or neither."""
    expert_out, routing_weights = contiguous(expert_out, routing_weights)
    graft_out, graft_logits = contiguous(graft_out, graft_logits)
    num_tokens, top_k, hidden_size = expert_out.shape
    out = expert_out.new_empty(num_tokens, hidden_size)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(expert_out):
        return _launch_fwd(expert_out, None, routing_weights, graft_out, graft_logits, out, top_k, combine)


@triton.jit(do_not_specialize=["num_tokens"])
def _combine_bwd_kernel(
    d_out_ptr, expert_out_ptr, routing_weights_ptr, graft_out_ptr, graft_logits_ptr,
    d_expert_out_ptr, d_routing_weights_ptr, d_graft_out_ptr, d_graft_logits_ptr,
    num_tokens, hidden_size,
    TOP_K: tl.constexpr, HAS_GRAFT: tl.constexpr, CONVEX: tl.constexpr,
    NEED_EXPERT_OUT: tl.constexpr, NEED_WEIGHTS: tl.constexpr, NEED_GRAFT: tl.constexpr, NEED_LOGITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_mask = tokens < num_tokens
    opening = tl.zeros((BLOCK_T,), dtype=tl.float32)
    closing = opening + 1.0
    if HAS_GRAFT:
        opening = tl.sigmoid(tl.load(graft_logits_ptr + tokens, mask=token_mask, other=0.0).to(tl.float32))
        if CONVEX:
            closing = 1.0 - opening

    d_opening = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for slot in range(TOP_K):
        pairs = tokens * TOP_K + slot
        weights = tl.load(routing_weights_ptr + pairs, mask=token_mask, other=0.0).to(tl.float32)
        products = tl.zeros((BLOCK_T,), dtype=tl.float32)
        for first_column in range(0, hidden_size, BLOCK_H):
            columns = first_column + tl.arange(0, BLOCK_H)
            mask = token_mask[:, None] & (columns < hidden_size)[None, :]
            d_out_ptrs = d_out_ptr + tokens[:, None] * hidden_size + columns[None, :]
            d_out = tl.load(d_out_ptrs, mask=mask, other=0.0).to(tl.float32)
            row_offsets = pairs[:, None] * hidden_size + columns[None, :]
            if NEED_WEIGHTS or (NEED_LOGITS and CONVEX):
                row = tl.load(expert_out_ptr + row_offsets, mask=mask, other=0.0).to(tl.float32)
                products += tl.sum(d_out * row, axis=1)
            if NEED_EXPERT_OUT:
                d_row = d_out * (weights * closing)[:, None]
                tl.store(d_expert_out_ptr + row_offsets, d_row.to(expert_out_ptr.dtype.element_ty), mask=mask)
        if NEED_WEIGHTS:
            tl.store(d_routing_weights_ptr + pairs, products * closing, mask=token_mask)
        if CONVEX:
            d_opening -= weights * products

    if NEED_GRAFT or NEED_LOGITS:
        for first_column in range(0, hidden_size, BLOCK_H):
            columns = first_column + tl.arange(0, BLOCK_H)
            mask = token_mask[:, None] & (columns < hidden_size)[None, :]
            offsets = tokens[:, None] * hidden_size + columns[None, :]
            d_out = tl.load(d_out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            if NEED_LOGITS:
                graft = tl.load(graft_out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                d_opening += tl.sum(d_out * graft, axis=1)
            if NEED_GRAFT:
                d_graft = d_out * opening[:, None]
                tl.store(d_graft_out_ptr + offsets, d_graft.to(expert_out_ptr.dtype.element_ty), mask=mask)
    if NEED_LOGITS:
        tl.store(d_graft_logits_ptr + tokens, opening * (1.0 - opening) * d_opening, mask=token_mask)


def combine_bwd(
    d_out: Tensor,
    expert_out: Tensor,
    routing_weights: Tensor,
    graft_out: Tensor | None,
    graft_logits: Tensor | None,
    combine: str,
    need_expert_out: bool,
    need_routing_weights: bool,
    need_graft_out: bool,
    need_graft_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d_expert_out, d_routing_weights, d_graft_out, d_graft_logits; what is not needed is an empty tensor."""
    d_out, expert_out, routing_weights = contiguous(d_out, expert_out, routing_weights)
    graft_out, graft_logits = contiguous(graft_out, graft_logits)
    num_tokens, top_k, hidden_size = expert_out.shape
    has_graft = graft_out is not None
    need_graft_out, need_graft_logits = need_graft_out and has_graft, need_graft_logits and has_graft
    single = routing_weights.new_empty
    d_expert_out = torch.empty_like(expert_out) if need_expert_out else expert_out.new_empty(0)
    d_routing_weights = single(num_tokens, top_k, dtype=torch.float32) if need_routing_weights else single(0)
    d_graft_out = expert_out.new_empty(num_tokens, hidden_size) if need_graft_out else expert_out.new_empty(0)
    d_graft_logits = single(num_tokens, dtype=torch.float32) if need_graft_logits else single(0)
    if num_tokens > 0:
        block_t, block_h, num_warps = token_tile(d_out.device, hidden_size)
        with torch.cuda.device_of(d_out):
            _combine_bwd_kernel[(cdiv(num_tokens, block_t),)](
                d_out, expert_out, routing_weights, graft_out, graft_logits,
                d_expert_out, d_routing_weights, d_graft_out, d_graft_logits,
                num_tokens, hidden_size,
                TOP_K=top_k, HAS_GRAFT=has_graft, CONVEX=combine == "convex" and has_graft,
                NEED_EXPERT_OUT=need_expert_out, NEED_WEIGHTS=need_routing_weights,
                NEED_GRAFT=need_graft_out, NEED_LOGITS=need_graft_logits,
                BLOCK_T=block_t, BLOCK_H=block_h, num_warps=num_warps,
            )  # fmt: skip
    return d_expert_out, d_routing_weights, d_graft_out, d_graft_logits
