"""The router and the graft's gate in one kernel, which reads the hidden states once.

    l = round(x W^T)      p = softmax(l)      w_k, i_k = the k-th largest p      s = g . x + b      counts of i

Twin: `reference.grafted_route`. What follows the product works on a block of logits that is still in
registers. PyTorch's own sequence reads `x` twice and once more as the fp32 copy that it writes for the gate (12 T H
bytes in bf16, here 2 T H), and writes and reads the logits, the probabilities, their sort and its indices, each [T, E].

The product is `tl.dot`, accumulated in fp32 and rounded to the dtype of `x`, as the model's own router rounds it. The
gate is a sum of fp32 products beside it: its weight would lose its precision in a column of `W`. The counts are
integers, so that atomics give the same sums in any order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flex_kernels.backends import pytorch
from flex_kernels.backends.triton.launch import cdiv, contiguous, next_power_of_2, target_of
from flex_kernels.backends.triton.route import choose_top_k, softmax, store_routes

# Of the experts' weights in one column: more of them, and a row of probabilities does not fit the registers. PyTorch
# computes those.
MOST_COLUMN_BYTES = 1024
# The operands of one step. Three of them are in shared memory at a time, of which the smallest chip has 64 KB.
STEP_BYTES, STEPS_AHEAD = 20 << 10, 3


@triton.jit(do_not_specialize=["num_tokens"])
def _grafted_route_fwd_kernel(
    hidden_states_ptr, router_weight_ptr, graft_logit_weight_ptr, graft_logit_bias_ptr,
    routing_weights_ptr, expert_indices_ptr, graft_logits_ptr, tokens_per_expert_ptr, router_logits_ptr,
    num_tokens, hidden_size, num_experts,
    TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr, HAS_GRAFT: tl.constexpr, KEEP_LOGITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    token_mask, expert_mask = tokens < num_tokens, experts < num_experts

    accumulator = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
    gate_products = tl.zeros((BLOCK_T, BLOCK_H), dtype=tl.float32)
    for start in range(0, hidden_size, BLOCK_H):
        columns = start + tl.arange(0, BLOCK_H)
        column_mask = columns < hidden_size
        states = tl.load(
            hidden_states_ptr + tokens[:, None] * hidden_size + columns[None, :],
            mask=token_mask[:, None] & column_mask[None, :],
            other=0.0,
        )
        weights = tl.load(
            router_weight_ptr + experts[None, :] * hidden_size + columns[:, None],
            mask=expert_mask[None, :] & column_mask[:, None],
            other=0.0,
        )
        accumulator = tl.dot(states, weights, accumulator, input_precision="ieee")
        if HAS_GRAFT:
            gate = tl.load(graft_logit_weight_ptr + columns, mask=column_mask, other=0.0)
            gate_products += states.to(tl.float32) * gate[None, :]

    logits = accumulator.to(hidden_states_ptr.dtype.element_ty)
    if KEEP_LOGITS:
        logit_offsets = tokens[:, None] * num_experts + experts[None, :]
        tl.store(router_logits_ptr + logit_offsets, logits, mask=token_mask[:, None] & expert_mask[None, :])
    if HAS_GRAFT:
        graft_logits = tl.sum(gate_products, axis=1) + tl.load(graft_logit_bias_ptr)
        tl.store(graft_logits_ptr + tokens, graft_logits, mask=token_mask)
    masked = tl.where(expert_mask[None, :], logits.to(tl.float32), -float("inf"))
    top_weights, top_indices, times_chosen = choose_top_k(
        softmax(masked, token_mask), experts, num_experts, TOP_K, RENORMALIZE, BLOCK_T, BLOCK_E, BLOCK_K
    )
    store_routes(routing_weights_ptr, expert_indices_ptr, top_weights, top_indices, tokens, token_mask, TOP_K, BLOCK_K)
    counts = tl.sum(tl.where(token_mask[:, None], times_chosen, 0), axis=0)
    tl.atomic_add(tokens_per_expert_ptr + experts, counts, mask=expert_mask & (counts > 0), sem="relaxed")


def _tile(device: torch.device, num_experts: int, element_size: int) -> tuple[int, int, int, int, int]:
    """(BLOCK_T, BLOCK_E, BLOCK_H, warps, stages): 16 tokens and 16 columns are the least that `tl.dot` takes."""
    block_e = max(16, next_power_of_2(num_experts))
    if target_of(device).chip == "interpreter":
        return 16, block_e, 32, 1, 1
    wide = element_size == 4  # products without tensor cores: fewer of them a thread, or they do not fit its registers
    block_t = 16 if wide or block_e > 128 else 32
    column_bytes = (block_e + block_t) * element_size
    block_h = 32 if wide else 64
    while block_h > 16 and block_h * column_bytes > STEP_BYTES:
        block_h //= 2
    stages = STEPS_AHEAD + 1 if block_h * column_bytes <= STEP_BYTES else 2
    return block_t, block_e, block_h, min(16, max(4, block_e // (16 if wide else 64))), stages


def grafted_route_fwd(
    hidden_states: Tensor,
    router_weight: Tensor,
    graft_logit_weight: Tensor | None,
    graft_logit_bias: Tensor | None,
    top_k: int,
    renormalize: bool,
    keep_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """routing_weights, expert_indices, graft_logits, tokens_per_expert, and router_logits [T, E] or [0, E]."""
    inputs = contiguous(hidden_states, router_weight, graft_logit_weight, graft_logit_bias)
    hidden_states, router_weight = inputs[:2]
    (num_tokens, hidden_size), num_experts = hidden_states.shape, router_weight.shape[0]
    if num_experts * hidden_states.element_size() > MOST_COLUMN_BYTES:
        return pytorch.grafted_route_fwd(*inputs, top_k, renormalize, keep_logits)
    new, has_graft = hidden_states.new_empty, graft_logit_weight is not None
    weights, indices = new(num_tokens, top_k, dtype=torch.float32), new(num_tokens, top_k, dtype=torch.int64)
    logits = new(num_tokens if has_graft else 0, dtype=torch.float32)
    tokens_per_expert = hidden_states.new_zeros(num_experts, dtype=torch.int32)
    router_logits = new(num_tokens if keep_logits else 0, num_experts)
    if num_tokens > 0:
        device, element_size = hidden_states.device, hidden_states.element_size()
        block_t, block_e, block_h, num_warps, num_stages = _tile(device, num_experts, element_size)
        with torch.cuda.device_of(hidden_states):
            _grafted_route_fwd_kernel[(cdiv(num_tokens, block_t),)](
                *inputs,
                weights, indices, logits, tokens_per_expert, router_logits,
                num_tokens, hidden_size, num_experts,
                TOP_K=top_k, RENORMALIZE=renormalize, HAS_GRAFT=has_graft, KEEP_LOGITS=keep_logits,
                BLOCK_T=block_t, BLOCK_E=block_e, BLOCK_H=block_h, BLOCK_K=next_power_of_2(top_k),
                num_warps=num_warps, num_stages=num_stages,
            )  # fmt: skip
    return weights, indices, logits, tokens_per_expert, router_logits
