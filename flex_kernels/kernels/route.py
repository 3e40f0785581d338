"""The router after its logits, in one pass: softmax, top-k, renormalisation, the graft's logit and a histogram.

    p = softmax(l)    w_k, i_k = the k-th largest p, ties to the lower index    [renormalised] w_k <- w_k / sum_j w_j
    graft logit  g . x_t + b        tokens_per_expert: how often each expert was chosen

Backward (`S` is the sum of the kept p; `dp` is zero where an expert was not chosen):

    dp_ik = dw_k   or, renormalised,   (dw_k - sum_j dw_j w_j) / S          dl = p * (dp - sum_e dp_e p_e)

Twin: `reference.route`. PyTorch's own way writes and reads the [T, E] probabilities, their sort and its indices; here
the logits are read once and only [T, K] is written. Counts are integer atomics, sums of floats are not.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flex_kernels.kernels.tiles import cdiv, contiguous, next_power_of_2, reduction_tokens, target_of

NOT_AN_EXPERT = tl.constexpr(-2.0)  # below every probability, and below TAKEN
TAKEN = tl.constexpr(-1.0)


@triton.jit
def _probabilities(router_logits_ptr, tokens, token_mask, experts, num_experts):
    """Softmax of a block of rows, fp32 [T, E]; zero in columns that are no expert."""
    offsets = tokens[:, None] * num_experts + experts[None, :]
    mask = token_mask[:, None] & (experts < num_experts)[None, :]
    logits = tl.load(router_logits_ptr + offsets, mask=mask, other=-float("inf")).to(tl.float32)
    # Rows past the end are all -inf: their maximum is taken as 0 so that no NaN arises.
    largest = tl.where(token_mask, tl.max(logits, axis=1), 0.0)
    exponentials = tl.exp(logits - largest[:, None])
    total = tl.where(token_mask, tl.sum(exponentials, axis=1), 1.0)
    return exponentials / total[:, None]


@triton.jit(do_not_specialize=["num_tokens"])
def _route_fwd_kernel(
    router_logits_ptr, hidden_states_ptr, logit_weight_ptr, logit_bias_ptr,
    routing_weights_ptr, expert_indices_ptr, tokens_per_expert_ptr, graft_logits_ptr,
    num_tokens, num_experts, hidden_size,
    TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr, COUNT: tl.constexpr, HAS_GRAFT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    token_mask = tokens < num_tokens

    probabilities = _probabilities(router_logits_ptr, tokens, token_mask, experts, num_experts)
    candidates = tl.where((experts < num_experts)[None, :], probabilities, NOT_AN_EXPERT)
    slots = tl.arange(0, BLOCK_K)
    weights = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
    indices = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.int32)
    for slot in range(TOP_K):
        largest = tl.max(candidates, axis=1)
        # A row of NaN has no largest entry: it takes the last expert, so that an index is never out of range.
        matches = tl.where(candidates == largest[:, None], experts[None, :], num_experts - 1)
        chosen = tl.min(matches, axis=1)
        candidates = tl.where(experts[None, :] == chosen[:, None], TAKEN, candidates)
        weights = tl.where((slots == slot)[None, :], largest[:, None], weights)
        indices = tl.where((slots == slot)[None, :], chosen[:, None], indices)
    if RENORMALIZE:
        weights /= tl.sum(weights, axis=1)[:, None]
    kept = token_mask[:, None] & (slots < TOP_K)[None, :]
    out_offsets = tokens[:, None] * TOP_K + slots[None, :]
    tl.store(routing_weights_ptr + out_offsets, weights, mask=kept)
    tl.store(expert_indices_ptr + out_offsets, indices.to(tl.int64), mask=kept)
    if COUNT:
        taken = (candidates == TAKEN) & token_mask[:, None]
        counts = tl.sum(taken.to(tl.int32), axis=0)
        tl.atomic_add(tokens_per_expert_ptr + experts, counts, mask=experts < num_experts)
    if HAS_GRAFT:
        graft_logits = tl.zeros((BLOCK_T,), dtype=tl.float32)
        for start in range(0, hidden_size, BLOCK_H):
            columns = start + tl.arange(0, BLOCK_H)
            column_mask = columns < hidden_size
            offsets = tokens[:, None] * hidden_size + columns[None, :]
            mask = token_mask[:, None] & column_mask[None, :]
            states = tl.load(hidden_states_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            weight = tl.load(logit_weight_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
            graft_logits += tl.sum(states * weight[None, :], axis=1)
        graft_logits += tl.load(logit_bias_ptr).to(tl.float32)
        tl.store(graft_logits_ptr + tokens, graft_logits, mask=token_mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _route_bwd_kernel(
    d_routing_weights_ptr, router_logits_ptr, expert_indices_ptr,
    d_router_logits_ptr,
    num_tokens, num_experts,
    TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    token_mask = tokens < num_tokens

    probabilities = _probabilities(router_logits_ptr, tokens, token_mask, experts, num_experts)
    d_kept = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
    kept = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
    for slot in range(TOP_K):
        pairs = tokens * TOP_K + slot
        indices = tl.load(expert_indices_ptr + pairs, mask=token_mask, other=-1)
        d_weights = tl.load(d_routing_weights_ptr + pairs, mask=token_mask, other=0.0).to(tl.float32)
        chosen = experts[None, :] == indices[:, None]
        kept = tl.where(chosen, 1.0, kept)
        d_kept = tl.where(chosen, d_weights[:, None], d_kept)
    if RENORMALIZE:
        kept_total = tl.where(token_mask, tl.sum(probabilities * kept, axis=1), 1.0)
        inner = tl.sum(d_kept * probabilities, axis=1) / kept_total  # sum_j dw_j w_j
        d_kept = kept * (d_kept - inner[:, None]) / kept_total[:, None]
    inner = tl.sum(d_kept * probabilities, axis=1)
    d_logits = probabilities * (d_kept - inner[:, None])
    offsets = tokens[:, None] * num_experts + experts[None, :]
    mask = token_mask[:, None] & (experts < num_experts)[None, :]
    tl.store(d_router_logits_ptr + offsets, d_logits.to(d_router_logits_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _graft_logits_bwd_kernel(
    d_graft_logits_ptr, hidden_states_ptr, logit_weight_ptr,
    d_hidden_states_ptr, partial_d_weight_ptr,
    num_tokens, hidden_size,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """`dx_t = dlogit_t g`, and this block of tokens' part of `dg = sum_t dlogit_t x_t`."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    token_mask, column_mask = tokens < num_tokens, columns < hidden_size
    mask = token_mask[:, None] & column_mask[None, :]
    d_logits = tl.load(d_graft_logits_ptr + tokens, mask=token_mask, other=0.0).to(tl.float32)
    weight = tl.load(logit_weight_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
    offsets = tokens[:, None] * hidden_size + columns[None, :]
    states = tl.load(hidden_states_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    d_states = d_logits[:, None] * weight[None, :]
    tl.store(d_hidden_states_ptr + offsets, d_states.to(d_hidden_states_ptr.dtype.element_ty), mask=mask)
    partial = tl.sum(d_logits[:, None] * states, axis=0)
    partial_offsets = tl.program_id(0).to(tl.int64) * hidden_size + columns
    tl.store(partial_d_weight_ptr + partial_offsets, partial, mask=column_mask)


def route_fwd(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """routing_weights [T, K] fp32, descending, and expert_indices [T, K] int64."""
    weights, indices, _, _ = _launch_route_fwd(router_logits, top_k, renormalize, None)
    return weights, indices


def route_grafted_fwd(
    router_logits: Tensor,
    hidden_states: Tensor,
    logit_weight: Tensor,
    logit_bias: Tensor,
    top_k: int,
    renormalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`route_fwd`, and in the same pass tokens_per_expert [E] int32 and graft_logits [T] fp32 (`x . g + b`)."""
    return _launch_route_fwd(router_logits, top_k, renormalize, contiguous(hidden_states, logit_weight, logit_bias))


def _launch_route_fwd(
    router_logits: Tensor, top_k: int, renormalize: bool, graft: tuple[Tensor, Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    (router_logits,) = contiguous(router_logits)
    num_tokens, num_experts = router_logits.shape
    new, has_graft = router_logits.new_empty, graft is not None
    weights, indices = new(num_tokens, top_k, dtype=torch.float32), new(num_tokens, top_k, dtype=torch.int64)
    counts = torch.zeros(num_experts, dtype=torch.int32, device=weights.device) if has_graft else None
    graft_logits = new(num_tokens, dtype=torch.float32) if has_graft else None
    if num_tokens > 0:
        hidden_states, logit_weight, logit_bias = graft if has_graft else (None, None, None)
        block_e = next_power_of_2(num_experts)
        block_t = reduction_tokens(weights.device, block_e)
        with torch.cuda.device_of(router_logits):
            _route_fwd_kernel[(cdiv(num_tokens, block_t),)](
                router_logits, hidden_states, logit_weight, logit_bias,
                weights, indices, counts, graft_logits,
                num_tokens, num_experts, hidden_states.shape[1] if has_graft else 0,
                TOP_K=top_k, RENORMALIZE=renormalize, COUNT=has_graft, HAS_GRAFT=has_graft,
                BLOCK_T=block_t, BLOCK_E=block_e, BLOCK_K=next_power_of_2(top_k),
                BLOCK_H=64,
            )  # fmt: skip
    return weights, indices, counts, graft_logits


def route_bwd(d_routing_weights: Tensor, router_logits: Tensor, expert_indices: Tensor, renormalize: bool) -> Tensor:
    """d_router_logits [T, E] in the dtype of the logits."""
    d_routing_weights, router_logits, expert_indices = contiguous(d_routing_weights, router_logits, expert_indices)
    num_tokens, num_experts = router_logits.shape
    d_router_logits = torch.empty_like(router_logits)
    if num_tokens > 0:
        block_e = next_power_of_2(num_experts)
        block_t = reduction_tokens(router_logits.device, block_e)
        with torch.cuda.device_of(router_logits):
            _route_bwd_kernel[(cdiv(num_tokens, block_t),)](
                d_routing_weights, router_logits, expert_indices,
                d_router_logits,
                num_tokens, num_experts,
                TOP_K=expert_indices.shape[1], RENORMALIZE=renormalize,
                BLOCK_T=block_t, BLOCK_E=block_e,
            )  # fmt: skip
    return d_router_logits


def graft_logits_bwd(
    d_graft_logits: Tensor, hidden_states: Tensor, logit_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """d_hidden_states [T, H], d_logit_weight [H] fp32, d_logit_bias [] fp32; partial sums are added in token order."""
    d_graft_logits, hidden_states, logit_weight = contiguous(d_graft_logits, hidden_states, logit_weight)
    num_tokens, hidden_size = hidden_states.shape
    d_hidden_states = torch.empty_like(hidden_states)
    block_t, block_h = (16, 32) if target_of(hidden_states.device).chip == "interpreter" else (64, 64)
    num_blocks = cdiv(num_tokens, block_t)
    partial_d_weight = hidden_states.new_empty(num_blocks, hidden_size, dtype=torch.float32)
    if num_tokens > 0:
        with torch.cuda.device_of(hidden_states):
            _graft_logits_bwd_kernel[(num_blocks, cdiv(hidden_size, block_h))](
                d_graft_logits, hidden_states, logit_weight,
                d_hidden_states, partial_d_weight,
                num_tokens, hidden_size,
                BLOCK_T=block_t, BLOCK_H=block_h,
            )  # fmt: skip
    return d_hidden_states, partial_d_weight.sum(0), d_graft_logits.float().sum()
