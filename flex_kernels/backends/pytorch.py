"""The plain torch backend: every stage of the layer, forward and backward, with nothing built and no GPU.

Row `i` belongs to the pair `sorted_pairs[i] = token * K + slot`; the rows of one expert lie side by side, so an expert
is one `mm` on a slice and `[T, E, H]` never exists. Twins: `reference.grafted_experts`, `score_experts`, ...

The backward with frozen experts, by hand (`c_t` is 1, or `1 - s_t` in the convex form; `A = act(Z_gate) * Z_up`):

    row r = (t, k):  dA'_r = D_e^T dY_t      dw_r = c_t <dA'_r, A_r>      dZ_r = glu'(Z_r; w_r c_t dA'_r)
    graft row t:     dA'_t = D_g^T dY_t      ds_t = <dA'_t, A_t>          dZ_t = glu'(Z_t; s_t dA'_t)
    convex:          ds_t -= sum_k w_tk <dA'_r, A_r>
    dlogit_t = s_t (1 - s_t) ds_t            dX_t = sum_k [G_e; U_e]^T dZ_r + [G_g; U_g]^T dZ_t
    d[G_g; U_g] = dZ^T X                     dD_g = (s dY)^T A

so the experts' outputs are never saved: `X` and the pre-activations `Z` are enough, `A` is recomputed.
Matrix products run in the dtype of `hidden_states`, everything between them in fp32 (fp64 stays fp64).
Weights of another dtype are converted, quantised ones dequantised, one expert at a time. Entries of an expert that has
no rows are never touched.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flex_kernels.backends.call import LayerCall
from flex_kernels.reference import ACTIVATIONS
from flex_kernels.weights import Experts, expert_of


def routing_plan(expert_indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.routing_plan` without a host synchronisation: sort, then find where each expert begins."""
    flat = expert_indices.reshape(-1)
    if flat.device.type == "cpu" and flat.numel() > 0 and (lowest := int(flat.min())) < 0:
        raise ValueError(f"expert_indices must not be negative, got {lowest}")
    flat = torch.where((flat < 0) | (flat > num_experts), num_experts, flat)  # a GPU cannot look: it skips them
    sorted_ids, order = torch.sort(flat, stable=True)
    boundaries = torch.arange(num_experts + 1, device=flat.device, dtype=flat.dtype)
    expert_offsets = torch.searchsorted(sorted_ids, boundaries, out_int32=True)  # [E + 1]
    return order.to(torch.int32), expert_offsets.diff(), expert_offsets


def experts_fwd(call: LayerCall, save_preactivations: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Routed experts, graft, and their sum. Returns out [T, H], preactivations [T*K, 2I], graft_preactivations."""
    top_k, activation = call.routing_weights.shape[1], call.activation
    preactivations, graft_preactivations = preactivations_fwd(call)
    counts = call.expert_offsets.diff().tolist()
    expert_out = _grouped_mm(_glu(preactivations, activation), call.down_proj, counts, turned=True)
    out = _sum_over_slots(expert_out, _rows_by_pair(call.sorted_pairs), top_k, call.routing_weights)
    if call.has_graft:
        opening = torch.sigmoid(call.graft_logits)[:, None]
        graft_out = F.linear(_glu(graft_preactivations, activation), call.graft_down_proj)
        out = torch.addcmul(out * (1 - opening) if call.convex else out, opening, _wide(graft_out))
    if not save_preactivations:
        preactivations = preactivations.new_empty(0, preactivations.shape[1])
        graft_preactivations = graft_preactivations.new_empty(0, graft_preactivations.shape[1])
    return out.to(call.hidden_states.dtype), preactivations, graft_preactivations


def preactivations_fwd(call: LayerCall) -> tuple[Tensor, Tensor]:
    """The part of `experts_fwd` that a backward without kept pre-activations repeats: [T*K, 2I] and [T, 2I_g]."""
    rows = call.hidden_states.index_select(0, _tokens(call.sorted_pairs, call.routing_weights.shape[1]))  # [R, H]
    preactivations = _grouped_mm(rows, call.gate_up_proj, call.expert_offsets.diff().tolist(), turned=True)
    if not call.has_graft:
        return preactivations, rows.new_empty(0, 0)
    return preactivations, F.linear(call.hidden_states, call.graft_gate_up_proj)


def experts_bwd(
    d_out: Tensor, call: LayerCall, preactivations: Tensor, graft_preactivations: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Every gradient but those of the experts' weights; what is not needed comes back as an empty tensor."""
    hidden_states, sorted_pairs, _, routing_weights, *_ = call
    activation, needs = call.activation, call.needs
    num_tokens, top_k = routing_weights.shape
    dtype = hidden_states.dtype
    d_hidden, d_graft_gate_up, d_graft_down = (hidden_states.new_empty(0) for _ in range(3))
    d_routing_weights, d_graft_logits = (routing_weights.new_empty(0) for _ in range(2))
    opening = torch.sigmoid(call.graft_logits) if call.has_graft else None  # [T]
    closing = 1 - opening if call.convex else None
    d_opening = None

    if call.routed:
        counts, row_by_pair = call.expert_offsets.diff().tolist(), _rows_by_pair(sorted_pairs)
        d_rows = d_out.index_select(0, _tokens(sorted_pairs, top_k))
        d_activations = _wide(_grouped_mm(d_rows, call.down_proj, counts))  # [R, I]
        if needs.routing_weights or closing is not None:
            products = (d_activations * _glu(preactivations, activation, wide=True)).sum(1)  # [R]
            products[sum(counts) :] = 0  # rows of no expert here
            products = products[row_by_pair].view(num_tokens, top_k)
            if closing is not None:
                d_opening = -(products * routing_weights).sum(1)
                products = products * closing[:, None]
            d_routing_weights = products if needs.routing_weights else d_routing_weights
        if needs.hidden:
            row_weights = _row_weights(routing_weights, closing).flatten().index_select(0, sorted_pairs)
            d_preactivations = _d_glu(d_activations.mul_(row_weights[:, None]), preactivations, activation)
            d_rows = _grouped_mm(d_preactivations, call.gate_up_proj, counts)
            d_hidden = _sum_over_slots(d_rows, row_by_pair, top_k, None)

    if call.has_graft and (needs.hidden or needs.graft or needs.graft_logits):
        d_activations = _wide(d_out @ call.graft_down_proj)  # [T, I_g]
        graft_activations = _glu(graft_preactivations, activation, wide=True)
        if needs.graft_logits:
            graft_part = (d_activations * graft_activations).sum(1)
            d_opening = graft_part if d_opening is None else d_opening + graft_part
            d_graft_logits = opening * (1 - opening) * d_opening
        if needs.hidden or needs.graft:
            d_preactivations = _d_glu(d_activations.mul_(opening[:, None]), graft_preactivations, activation)
            if needs.hidden:
                d_hidden = d_hidden + _wide(d_preactivations @ call.graft_gate_up_proj)
            if needs.graft:
                d_graft_gate_up = d_preactivations.T @ hidden_states
                d_graft_down = (_wide(d_out) * opening[:, None]).to(dtype).T @ graft_activations.to(dtype)
    return d_hidden.to(dtype), d_routing_weights, d_graft_gate_up, d_graft_down, d_graft_logits


def expert_weight_grads(d_out: Tensor, call: LayerCall, preactivations: Tensor) -> tuple[Tensor, Tensor]:
    """The rare case of trained experts: `d[G_e; U_e] = dZ^T X` and `dD_e = (w c dY)^T A`, zero for an idle expert.

    Of the graft only `graft_logits` is read.
    """
    counts = call.expert_offsets.diff().tolist()
    tokens = _tokens(call.sorted_pairs, call.routing_weights.shape[1])
    closing = 1 - torch.sigmoid(call.graft_logits) if call.convex else None
    row_weights = _row_weights(call.routing_weights, closing).flatten().index_select(0, call.sorted_pairs)[:, None]
    d_rows = d_out.index_select(0, tokens)
    d_activations = _wide(_grouped_mm(d_rows, call.down_proj, counts)) * row_weights
    d_preactivations = _d_glu(d_activations, preactivations, call.activation)
    d_rows = (_wide(d_rows) * row_weights).to(d_rows.dtype)
    activations = _glu(preactivations, call.activation)
    d_gate_up, d_down = torch.zeros_like(call.gate_up_proj), torch.zeros_like(call.down_proj)
    rows, start = call.hidden_states.index_select(0, tokens), 0
    for index, count in enumerate(counts):
        own = slice(start, start + count)
        if count > 0:
            d_gate_up[index] = d_preactivations[own].T @ rows[own]
            d_down[index] = d_rows[own].T @ activations[own]
        start += count
    return d_gate_up, d_down


def score_experts(
    hidden_states: Tensor,
    target: Tensor,
    gate_up_proj: Experts,
    down_proj: Experts,
    batch_offsets: Tensor,
    activation: str,
) -> Tensor:
    """`reference.score_experts`, one expert at a time. Returns [B, E, 3] fp32."""
    lengths = batch_offsets.diff().to(torch.int64)
    batches = torch.arange(len(lengths), device=lengths.device)
    batch_of_token = torch.repeat_interleave(batches, lengths, output_size=len(hidden_states))
    batch_of_token = F.one_hot(batch_of_token, len(lengths)).to(_wide(target).dtype)  # [T, B]
    target = _wide(target)
    scores = []
    for index in range(gate_up_proj.shape[0]):
        gate_up, down = (expert_of(weights, index, hidden_states.dtype) for weights in (gate_up_proj, down_proj))
        activations = _glu(F.linear(hidden_states, gate_up), activation)
        out = _wide(F.linear(activations, down))
        sums = torch.stack([(target - out).square().sum(1), (target * out).sum(1), out.square().sum(1)], dim=1)
        scores.append(batch_of_token.T @ sums)
    return torch.stack(scores, dim=1).float()


def score_neurons(
    hidden_states: Tensor, target: Tensor, gate_up_proj: Experts, down_proj: Experts, activation: str
) -> tuple[Tensor, Tensor]:
    """`reference.score_neurons`: energy [E, I] fp32 and correlation [E, I] fp32."""
    energy, correlation = [], []
    for index in range(gate_up_proj.shape[0]):
        gate_up = expert_of(gate_up_proj, index, hidden_states.dtype)
        activations = _glu(F.linear(hidden_states, gate_up), activation, wide=True)
        down = _wide(expert_of(down_proj, index))
        energy.append(activations.square().sum(0) * down.square().sum(0))
        correlation.append((activations * (_wide(target) @ down)).sum(0))
    return torch.stack(energy).float(), torch.stack(correlation).float()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _tokens(sorted_pairs: Tensor, top_k: int) -> Tensor:
    return sorted_pairs if top_k == 1 else sorted_pairs // top_k


def _row_weights(routing_weights: Tensor, closing: Tensor | None) -> Tensor:
    return routing_weights if closing is None else routing_weights * closing[:, None]


def _grouped_mm(rows: Tensor, weights: Experts, counts: list[int], turned: bool = False) -> Tensor:
    """`rows[own] @ weights[e]` for each expert's own slice of rows, or, turned, times its transpose; rows beyond the
    last expert become zero."""
    out = rows.new_empty(rows.shape[0], weights.shape[1 if turned else 2])
    *owns, tail = out.split([*counts, rows.shape[0] - sum(counts)])
    for index, (own, own_out) in enumerate(zip(rows.split([*counts, len(tail)]), owns, strict=False)):
        if own.shape[0] > 0:
            weight = expert_of(weights, index, rows.dtype)
            torch.mm(own, weight.T if turned else weight, out=own_out)
    tail.zero_()
    return out


def _glu(preactivations: Tensor, activation: str, wide: bool = False) -> Tensor:
    gate, up = _wide(preactivations).chunk(2, dim=1)
    activations = ACTIVATIONS[activation](gate).mul_(up)
    return activations if wide else activations.to(preactivations.dtype)


def _d_glu(d_activations: Tensor, preactivations: Tensor, activation: str) -> Tensor:
    """`dZ = [dA * up * act'(gate), dA * act(gate)]` in the dtype of the preactivations."""
    gate, up = _wide(preactivations).chunk(2, dim=1)
    d_preactivations = torch.empty_like(preactivations)
    d_gate, d_up = d_preactivations.chunk(2, dim=1)
    if activation == "silu":
        d_gate.copy_(torch.ops.aten.silu_backward(d_activations * up, gate))
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        d_gate.copy_(torch.ops.aten.gelu_backward(d_activations * up, gate, approximate=approximate))
    d_up.copy_(d_activations.mul_(ACTIVATIONS[activation](gate)))
    return d_preactivations


def _rows_by_pair(sorted_pairs: Tensor) -> Tensor:
    """The inverse permutation: which row holds a pair. [R] int64."""
    rows = torch.arange(sorted_pairs.shape[0], device=sorted_pairs.device)
    return torch.empty_like(rows).scatter_(0, sorted_pairs.long(), rows)


def _sum_over_slots(rows: Tensor, row_by_pair: Tensor, top_k: int, weights: Tensor | None) -> Tensor:
    """Each token gathers its K rows and adds them in slot order, weighted or not: [R, H] -> [T, H] in fp32."""
    by_slot = rows.index_select(0, row_by_pair).unflatten(0, (-1, top_k)).unbind(1)  # K of [T, H]
    out = _wide(by_slot[0]) if weights is None else _wide(by_slot[0]) * weights[:, 0, None]
    for slot in range(1, top_k):
        row = _wide(by_slot[slot])
        out = out + row if weights is None else torch.addcmul(out, row, weights[:, slot, None])
    return out


def combine_fwd(
    expert_out: Tensor, routing_weights: Tensor, graft_out: Tensor | None, graft_logits: Tensor | None, combine: str
) -> Tensor:
    """`reference.combine`: [T, K, H], [T, K], [T, H], [T] -> [T, H]."""
    out = (_wide(expert_out) * routing_weights[..., None]).sum(1)
    if graft_out is not None:
        opening = torch.sigmoid(graft_logits)[:, None]
        out = torch.addcmul(out * (1 - opening) if combine == "convex" else out, opening, _wide(graft_out))
    return out.to(expert_out.dtype)


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
    d_expert_out, d_graft_out = expert_out.new_empty(0), expert_out.new_empty(0)
    d_routing_weights, d_graft_logits = routing_weights.new_empty(0), routing_weights.new_empty(0)
    d_wide, opening, row_weights = _wide(d_out), None, routing_weights
    if graft_out is not None:
        opening = torch.sigmoid(graft_logits)
        row_weights = _row_weights(routing_weights, 1 - opening if combine == "convex" else None)
    if need_expert_out:
        d_expert_out = (d_wide[:, None] * row_weights[..., None]).to(expert_out.dtype)
    if need_routing_weights or (need_graft_logits and combine == "convex"):
        products = (d_wide[:, None] * _wide(expert_out)).sum(-1)  # [T, K]
        if need_routing_weights:
            closed = opening is not None and combine == "convex"
            d_routing_weights = products * (1 - opening)[:, None] if closed else products
    if opening is not None and need_graft_out:
        d_graft_out = (d_wide * opening[:, None]).to(expert_out.dtype)
    if opening is not None and need_graft_logits:
        d_opening = (d_wide * _wide(graft_out)).sum(-1)
        if combine == "convex":
            d_opening = d_opening - (products * routing_weights).sum(-1)
        d_graft_logits = opening * (1 - opening) * d_opening
    return d_expert_out, d_routing_weights, d_graft_out, d_graft_logits


def graft_logits_fwd(hidden_states: Tensor, logit_weight: Tensor, logit_bias: Tensor) -> Tensor:
    """[T, H], [H] and [1] -> [T], in the dtype of the last two."""
    return torch.mv(hidden_states.to(logit_weight.dtype), logit_weight) + logit_bias


def graft_logits_bwd(
    d_graft_logits: Tensor, hidden_states: Tensor, logit_weight: Tensor, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """d_hidden_states [T, H] and d_logit_weight [H]; what is not needed is an empty tensor."""
    d_hidden, d_weight = hidden_states.new_empty(0), logit_weight.new_empty(0)
    if need_hidden:
        d_hidden = torch.outer(d_graft_logits, logit_weight).to(hidden_states.dtype)
    if need_weight:
        d_weight = torch.mv(hidden_states.to(logit_weight.dtype).T, d_graft_logits)
    return d_hidden, d_weight


def route_fwd(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """`reference.route`: routing_weights [T, K] fp32 and expert_indices [T, K] int64."""
    probabilities = torch.softmax(_wide(router_logits), dim=-1)
    weights, indices = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    weights, indices = weights[:, :top_k], indices[:, :top_k].contiguous()
    return weights / weights.sum(-1, keepdim=True) if renormalize else weights.contiguous(), indices


def route_bwd(d_routing_weights: Tensor, router_logits: Tensor, expert_indices: Tensor, renormalize: bool) -> Tensor:
    """d_router_logits [T, E]: `dp = (dw - <dw, w>) / sum p` if renormalised; then the softmax's `p (dp - <dp, p>)`."""
    probabilities = torch.softmax(_wide(router_logits), dim=-1)
    d_kept = d_routing_weights
    if renormalize:
        kept = probabilities.gather(1, expert_indices)
        total = kept.sum(-1, keepdim=True)
        d_kept = (d_kept - (d_kept * kept).sum(-1, keepdim=True) / total) / total
    d_probabilities = torch.zeros_like(probabilities).scatter_(1, expert_indices, d_kept)
    inner = (d_probabilities * probabilities).sum(-1, keepdim=True)
    return (probabilities * (d_probabilities - inner)).to(router_logits.dtype)


def grafted_route_fwd(
    hidden_states: Tensor,
    router_weight: Tensor,
    graft_logit_weight: Tensor | None,
    graft_logit_bias: Tensor | None,
    top_k: int,
    renormalize: bool,
    keep_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The results of `reference.grafted_route`, then the router's logits [T, E] if they are to be kept, else [0, E]."""
    router_logits = F.linear(hidden_states, router_weight)
    weights, indices = route_fwd(router_logits, top_k, renormalize)
    _, tokens_per_expert, _ = routing_plan(indices, len(router_weight))
    logits = weights.new_empty(0)
    if graft_logit_weight is not None:
        logits = graft_logits_fwd(hidden_states, graft_logit_weight, graft_logit_bias)
    return weights, indices, logits, tokens_per_expert, router_logits if keep_logits else router_logits[:0].clone()
