"""The router after its logits, in one pass: softmax, top-k, renormalisation.

    p = softmax(l)    w_k, i_k = the k-th largest p, ties to the lower index    [renormalised] w_k <- w_k / sum_j w_j

Backward (`S` is the sum of the kept p; `dp` is zero where an expert was not chosen):

    dp_ik = dw_k   or, renormalised,   (dw_k - sum_j dw_j w_j) / S          dl = p * (dp - sum_e dp_e p_e)

Twin: `reference.route`. PyTorch's own way writes and reads the [T, E] probabilities, their sort and its indices; here
the logits are read once and only [T, K] is written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flex_kernels.backends.triton.launch import cdiv, contiguous, next_power_of_2, reduction_tokens

NOT_AN_EXPERT = tl.constexpr(-2.0)  # below every probability, and below TAKEN
TAKEN = tl.constexpr(-1.0)


@triton.jit
def _probabilities(router_logits_ptr, tokens, token_mask, experts, num_experts):
    """Softmax of a block of rows, fp32 [T, E]; zero in columns that are no expert."""
    offsets = tokens[:, None] * num_experts + experts[None, :]
    mask = token_mask[:, None] & (experts < num_experts)[None, :]
    return softmax(tl.load(router_logits_ptr + offsets, mask=mask, other=-float("inf")).to(tl.float32), token_mask)


@triton.jit
def softmax(logits, token_mask):
    """Of rows in fp32; -inf in columns that are no expert."""
    # Rows past the end are all -inf: their maximum is taken as 0 so that no NaN arises.
    largest = tl.where(token_mask, tl.max(logits, axis=1), 0.0)
    exponentials = tl.exp(logits - largest[:, None])
    total = tl.where(token_mask, tl.sum(exponentials, axis=1), 1.0)
    return exponentials / total[:, None]


@triton.jit
def choose_top_k(
    probabilities, experts, num_experts,
    TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """weights [T, K], indices [T, K], and how often a token chose an expert, [T, E]."""
    candidates = tl.where((experts < num_experts)[None, :], probabilities, NOT_AN_EXPERT)
    slots = tl.arange(0, BLOCK_K)
    weights = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
    indices = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.int32)
    times_chosen = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.int32)
    for slot in range(TOP_K):
        largest = tl.max(candidates, axis=1)
        # A row of NaN has no largest entry: it takes the last expert, so that an index is never out of range.
        matches = tl.where(candidates == largest[:, None], experts[None, :], num_experts - 1)
        chosen = tl.min(matches, axis=1)
        is_chosen = experts[None, :] == chosen[:, None]
        candidates = tl.where(is_chosen, TAKEN, candidates)
        times_chosen += is_chosen.to(tl.int32)
        weights = tl.where((slots == slot)[None, :], largest[:, None], weights)
        indices = tl.where((slots == slot)[None, :], chosen[:, None], indices)
    if RENORMALIZE:
        weights /= tl.sum(weights, axis=1)[:, None]
    return weights, indices, times_chosen


@triton.jit
def store_routes(
    routing_weights_ptr, expert_indices_ptr, weights, indices, tokens, token_mask,
    TOP_K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    slots = tl.arange(0, BLOCK_K)
    kept = token_mask[:, None] & (slots < TOP_K)[None, :]
    offsets = tokens[:, None] * TOP_K + slots[None, :]
    tl.store(routing_weights_ptr + offsets, weights, mask=kept)
    tl.store(expert_indices_ptr + offsets, indices.to(tl.int64), mask=kept)


@triton.jit(do_not_specialize=["num_tokens"])
def _route_fwd_kernel(
    router_logits_ptr,
    routing_weights_ptr, expert_indices_ptr,
    num_tokens, num_experts,
    TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    token_mask = tokens < num_tokens

    probabilities = _probabilities(router_logits_ptr, tokens, token_mask, experts, num_experts)
    weights, indices, _ = choose_top_k(
        probabilities, experts, num_experts, TOP_K, RENORMALIZE, BLOCK_T, BLOCK_E, BLOCK_K
    )
    store_routes(routing_weights_ptr, expert_indices_ptr, weights, indices, tokens, token_mask, TOP_K, BLOCK_K)


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


def route_fwd(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """routing_weights [T, K] fp32, descending, and expert_indices [T, K] int64."""
    (router_logits,) = contiguous(router_logits)
    num_tokens, num_experts = router_logits.shape
    weights = router_logits.new_empty(num_tokens, top_k, dtype=torch.float32)
    indices = router_logits.new_empty(num_tokens, top_k, dtype=torch.int64)
    if num_tokens > 0:
        block_e = next_power_of_2(num_experts)
        block_t = reduction_tokens(weights.device, block_e)
        with torch.cuda.device_of(router_logits):
            _route_fwd_kernel[(cdiv(num_tokens, block_t),)](
                router_logits,
                weights, indices,
                num_tokens, num_experts,
                TOP_K=top_k, RENORMALIZE=renormalize,
                BLOCK_T=block_t, BLOCK_E=block_e, BLOCK_K=next_power_of_2(top_k),
            )  # fmt: skip
    return weights, indices


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
