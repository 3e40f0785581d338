"""The graft's gate before its sigmoid, `l_t = g . x_t + b`, in fp32, with one pass over the hidden states each way.

    forward     l_t = g . x_t + b
    backward    dx_t = dl_t g        dg = sum_t dl_t x_t        db = sum_t dl_t

Twin: `reference.graft_logits`. In PyTorch's own operations bf16 hidden states are written once as fp32 and read again,
forward and backward, and `dx` is written in fp32 before it is cast: 26 T H bytes that are fused away here. `dg` is one
fp32 partial per block of tokens; their sum is PyTorch's: no atomics, bitwise repeatable.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flex_kernels.backends.triton.launch import cdiv, contiguous, target_of, token_tile


@triton.jit(do_not_specialize=["num_tokens"])
def _graft_logits_fwd_kernel(
    hidden_states_ptr, logit_weight_ptr, logit_bias_ptr,
    graft_logits_ptr,
    num_tokens, hidden_size,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_mask = tokens < num_tokens
    products = tl.zeros((BLOCK_T, BLOCK_H), dtype=tl.float32)
    for start in range(0, hidden_size, BLOCK_H):
        columns = start + tl.arange(0, BLOCK_H)
        column_mask = columns < hidden_size
        offsets = tokens[:, None] * hidden_size + columns[None, :]
        mask = token_mask[:, None] & column_mask[None, :]
        states = tl.load(hidden_states_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(logit_weight_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
        products += states * weight[None, :]
    logits = tl.sum(products, axis=1) + tl.load(logit_bias_ptr).to(tl.float32)
    tl.store(graft_logits_ptr + tokens, logits, mask=token_mask)


def graft_logits_fwd(hidden_states: Tensor, logit_weight: Tensor, logit_bias: Tensor) -> Tensor:
    """[T, H], [H] and [1] -> [T] fp32."""
    hidden_states, logit_weight, logit_bias = contiguous(hidden_states, logit_weight, logit_bias)
    num_tokens, hidden_size = hidden_states.shape
    logits = hidden_states.new_empty(num_tokens, dtype=torch.float32)
    if num_tokens > 0:
        block_t, block_h, num_warps = token_tile(hidden_states.device, hidden_size)
        with torch.cuda.device_of(hidden_states):
            _graft_logits_fwd_kernel[(cdiv(num_tokens, block_t),)](
                hidden_states, logit_weight, logit_bias,
                logits,
                num_tokens, hidden_size,
                BLOCK_T=block_t, BLOCK_H=block_h, num_warps=num_warps,
            )  # fmt: skip
    return logits


@triton.jit(do_not_specialize=["num_tokens"])
def _graft_logits_bwd_kernel(
    d_graft_logits_ptr, hidden_states_ptr, logit_weight_ptr,
    d_hidden_states_ptr, partial_d_weight_ptr,
    num_tokens, hidden_size,
    NEED_HIDDEN: tl.constexpr, NEED_WEIGHT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    token_mask, column_mask = tokens < num_tokens, columns < hidden_size
    mask = token_mask[:, None] & column_mask[None, :]
    offsets = tokens[:, None] * hidden_size + columns[None, :]
    d_logits = tl.load(d_graft_logits_ptr + tokens, mask=token_mask, other=0.0).to(tl.float32)
    if NEED_HIDDEN:
        weight = tl.load(logit_weight_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
        d_states = d_logits[:, None] * weight[None, :]
        tl.store(d_hidden_states_ptr + offsets, d_states.to(d_hidden_states_ptr.dtype.element_ty), mask=mask)
    if NEED_WEIGHT:
        states = tl.load(hidden_states_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        partial = tl.sum(d_logits[:, None] * states, axis=0)
        partial_offsets = tl.program_id(0).to(tl.int64) * hidden_size + columns
        tl.store(partial_d_weight_ptr + partial_offsets, partial, mask=column_mask)


def graft_logits_bwd(
    d_graft_logits: Tensor, hidden_states: Tensor, logit_weight: Tensor, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """d_hidden_states [T, H] and d_logit_weight [H] fp32; what is not needed is an empty tensor."""
    d_graft_logits, hidden_states, logit_weight = contiguous(d_graft_logits, hidden_states, logit_weight)
    num_tokens, hidden_size = hidden_states.shape
    d_hidden_states = torch.empty_like(hidden_states) if need_hidden else hidden_states.new_empty(0)
    block_t, block_h = (16, 32) if target_of(hidden_states.device).chip == "interpreter" else (64, 64)
    num_blocks = cdiv(num_tokens, block_t) if need_weight else 0
    partial_d_weight = logit_weight.new_empty(num_blocks, hidden_size)
    if num_tokens > 0 and (need_hidden or need_weight):
        with torch.cuda.device_of(hidden_states):
            _graft_logits_bwd_kernel[(cdiv(num_tokens, block_t), cdiv(hidden_size, block_h))](
                d_graft_logits, hidden_states, logit_weight,
                d_hidden_states, partial_d_weight,
                num_tokens, hidden_size,
                NEED_HIDDEN=need_hidden, NEED_WEIGHT=need_weight, BLOCK_T=block_t, BLOCK_H=block_h,
            )  # fmt: skip
    return d_hidden_states, partial_d_weight.sum(0) if need_weight else logit_weight.new_empty(0)
