"""The specification: every operation of the library in plain PyTorch, in the order of the paper (arXiv 2506.00965).

Kernels follow this file, never the reverse. It is used three times: as the oracle of the tests, as the fallback where
nothing faster fits, and as a line in the benchmarks. It imports torch and nothing of ours.

Shapes: `T` tokens, `H` hidden size, `I` intermediate size, `E` experts, top-`K`; `I_g` is the graft's own width.
An expert is `E_e(x) = D_e (act(G_e x) * (U_e x))`; `gate_up_proj` stacks the rows of `G_e`, then those of `U_e`.
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
COMBINES = ("additive", "convex")
# The 16 values of NF4 (Dettmers et al., QLoRA, arXiv 2305.14314, appendix E), ascending.
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
NF4_ZERO = 7  # the code of 0.0
NF4_GROUP = 64  # neighbours along a row that share a scale


def route(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Softmax over the experts, then the `top_k` largest; ties go to the lower expert index.

    Args:
        router_logits: [T, E], any float dtype.
        top_k: experts per token, `1 <= top_k <= E`.
        renormalize: divide the kept weights by their sum (transformers' `norm_topk_prob`).
    Returns:
        routing_weights [T, K] fp32 (descending) and expert_indices [T, K] int64.
    """
    probabilities = torch.softmax(router_logits.float(), dim=-1)
    # A stable descending sort is what sends ties to the lower index; `topk` promises nothing about them.
    weights, indices = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    weights, indices = weights[:, :top_k], indices[:, :top_k]
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, indices


def grafted_route(
    hidden_states: Tensor,
    router_weight: Tensor,
    graft_logit_weight: Tensor | None,
    graft_logit_bias: Tensor | None,
    top_k: int,
    renormalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The router from the hidden states on, the graft's gate before its sigmoid, and how many tokens each expert gets.

    The router's logits are rounded to the dtype of `hidden_states`, as a model's own router rounds them.

    Args:
        hidden_states: [T, H]; router_weight: [E, H], of the same dtype.
        graft_logit_weight: [H]; graft_logit_bias: [1]; both or, without a graft, none.
    Returns:
        routing_weights [T, K] fp32, expert_indices [T, K] int64, graft_logits [T] fp32 ([0] without a graft),
        tokens_per_expert [E] int32.
    """
    weights, indices = route(F.linear(hidden_states, router_weight), top_k, renormalize)
    tokens_per_expert = torch.bincount(indices.reshape(-1), minlength=router_weight.shape[0]).to(torch.int32)
    if graft_logit_weight is None:
        return weights, indices, weights.new_empty(0), tokens_per_expert
    return weights, indices, graft_logits(hidden_states, graft_logit_weight, graft_logit_bias), tokens_per_expert


def routing_plan(expert_indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stable counting sort of the (token, slot) pairs by expert.

    A pair is `token * K + slot`. Ids `>= num_experts` mark slots that another rank computes (expert parallelism);
    they are counted for nobody and stand at the tail of `sorted_pairs`.

    Args:
        expert_indices: [T, K], integer, not negative.
    Returns:
        sorted_pairs [T*K] int32, tokens_per_expert [E] int32, expert_offsets [E+1] int32 (exclusive prefix sum; its
        last entry is the number of pairs that have an expert here, `T*K` without expert parallelism).
    """
    flat = expert_indices.reshape(-1).long().clamp(max=num_experts)
    sorted_pairs = torch.sort(flat, stable=True).indices.to(torch.int32)
    tokens_per_expert = torch.bincount(flat, minlength=num_experts + 1)[:num_experts]
    expert_offsets = F.pad(tokens_per_expert.cumsum(0), (1, 0))
    return sorted_pairs, tokens_per_expert.to(torch.int32), expert_offsets.to(torch.int32)


def expert(hidden_states: Tensor, gate_up_proj: Tensor, down_proj: Tensor, activation: str = "silu") -> Tensor:
    """One gated expert: `D (act(G x) * (U x))`. [T, H], [2I, H], [H, I] -> [T, H]."""
    gate, up = F.linear(hidden_states, gate_up_proj).chunk(2, dim=-1)
    return F.linear(ACTIVATIONS[activation](gate) * up, down_proj)


def combine(
    expert_out: Tensor,
    routing_weights: Tensor,
    graft_out: Tensor | None = None,
    graft_logits: Tensor | None = None,
    combine: str = "additive",
) -> Tensor:
    """Weighted sum over a token's slots, joined with the gated graft, in fp32.

    additive: `y_t = sum_k w_tk E_k(x_t) + s_t E_g(x_t)`, convex: `y_t = (1 - s_t) sum_k w_tk E_k(x_t) + s_t E_g(x_t)`,
    with `s_t = sigmoid(graft_logits_t)`.

    Args:
        expert_out: [T, K, H]; routing_weights: [T, K]; graft_out: [T, H]; graft_logits: [T].
    Returns:
        [T, H] in the dtype of `expert_out`.
    """
    routed = (expert_out.float() * routing_weights.float()[..., None]).sum(1)
    if graft_out is not None:
        opening = torch.sigmoid(graft_logits.float())[:, None]
        routed = routed * (1 - opening) if combine == "convex" else routed
        routed = routed + opening * graft_out.float()
    return routed.to(expert_out.dtype)


def graft_logits(hidden_states: Tensor, logit_weight: Tensor, logit_bias: Tensor) -> Tensor:
    """The graft's gate before its sigmoid: [T, H], [H] and [1] -> [T] fp32."""
    return hidden_states.float() @ logit_weight.float() + logit_bias.float()


def grafted_experts(
    hidden_states: Tensor,
    expert_indices: Tensor,
    routing_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    graft_gate_up_proj: Tensor | None = None,
    graft_down_proj: Tensor | None = None,
    graft_logits: Tensor | None = None,
    *,
    combine: str = "additive",
    activation: str = "silu",
) -> Tensor:
    """The whole layer after the router: routed experts, the graft, and their sum. Differentiable in every float input.

    Args:
        hidden_states: [T, H]; expert_indices: [T, K], ids `>= E` are skipped; routing_weights: [T, K].
        gate_up_proj: [E, 2I, H]; down_proj: [E, H, I].
        graft_gate_up_proj: [2I_g, H]; graft_down_proj: [H, I_g]; graft_logits: [T]; all three or none.
    Returns:
        [T, H] in the dtype of `hidden_states`.
    """
    num_tokens, top_k = expert_indices.shape
    expert_out = hidden_states.new_zeros(num_tokens * top_k, hidden_states.shape[1])
    for index in range(gate_up_proj.shape[0]):
        token, slot = torch.where(expert_indices == index)
        rows = expert(hidden_states[token], gate_up_proj[index], down_proj[index], activation)
        expert_out = expert_out.index_put((token * top_k + slot,), rows)
    graft_out = None
    if graft_gate_up_proj is not None:
        graft_out = expert(hidden_states, graft_gate_up_proj, graft_down_proj, activation)
    return _combine(
        expert_out.view(num_tokens, top_k, hidden_states.shape[1]), routing_weights, graft_out, graft_logits, combine
    )


def score_experts(
    hidden_states: Tensor,
    target: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    batch_offsets: Tensor,
    *,
    activation: str = "silu",
) -> Tensor:
    """How well each expert alone reconstructs the layer's output: the three sums that every criterion is made of.

    `(||F_b - E_i(X_b)||^2, <F_b, E_i(X_b)>, ||E_i(X_b)||^2)` for each calibration batch `b` and expert `i`.

    Args:
        hidden_states: [T, H], the layer's input; target: [T, H], `F` (or what the layer is missing).
        gate_up_proj: [E, 2I, H]; down_proj: [E, H, I].
        batch_offsets: [B+1], integer, ascending from 0 to T: batch `b` is the tokens `[offsets[b], offsets[b+1])`.
    Returns:
        [B, E, 3] fp32.
    """
    offsets = batch_offsets.tolist()
    target = target.float()
    scores = []
    for gate_up, down in zip(gate_up_proj, down_proj, strict=True):
        out = expert(hidden_states, gate_up, down, activation).float()
        per_token = torch.stack([((target - out) ** 2).sum(-1), (target * out).sum(-1), (out**2).sum(-1)], dim=-1)
        scores.append(torch.stack([per_token[a:b].sum(0) for a, b in itertools.pairwise(offsets)]))
    return torch.stack(scores, dim=1)


def score_neurons(
    hidden_states: Tensor, target: Tensor, gate_up_proj: Tensor, down_proj: Tensor, *, activation: str = "silu"
) -> tuple[Tensor, Tensor]:
    """Energy and correlation of every neuron: `q_ej = sum_t a_ej(t)^2 ||d_ej||^2`, `b_ej = sum_t a_ej(t) <d_ej, F_t>`.

    Neuron `(e, j)` adds `a_ej(t) d_ej` to the output of expert `e`: `a` is its activation, `d_ej` its column of `D_e`.

    Returns:
        energy [E, I] fp32 and correlation [E, I] fp32.
    """
    energy, correlation = [], []
    for gate_up, down in zip(gate_up_proj, down_proj, strict=True):
        gate, up = F.linear(hidden_states, gate_up).chunk(2, dim=-1)
        activations = (ACTIVATIONS[activation](gate) * up).float()  # [T, I]
        energy.append((activations**2).sum(0) * (down.float() ** 2).sum(0))
        correlation.append((activations * (target.float() @ down.float())).sum(0))
    return torch.stack(energy), torch.stack(correlation)


def quantize(weight: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """A matrix of frozen weights in 8 or 4 bits: codes and scales, of which `dequantize` makes the nearest weights.

    int8: `scale = max |row| / 127`, `code = round(w / scale)`.
    nf4: each row in groups of 64, the last one padded with zeros; `scale = bf16(max |group|)`, `code` the nearest of
    `NF4_VALUES` to `w / scale`; two neighbours share a byte, the earlier one in its low half.

    Args:
        weight: [..., rows, columns], finite; format: "int8" or "nf4".
    Returns:
        int8: codes [..., rows, columns] int8, scales [..., rows] fp32.
        nf4: codes [..., rows, 32 G] uint8, scales [..., rows, G] bf16, with `G = ceil(columns / 64)`.
    """
    weight = weight.float()
    if format == "int8":
        largest = weight.abs().amax(-1) if weight.shape[-1] else weight.new_zeros(weight.shape[:-1])
        scales = (largest / 127).clamp(max=torch.finfo(torch.float32).max / 128)  # 127 of them are still finite
        codes = (weight / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).round()
        return codes.clamp(-127, 127).to(torch.int8), scales
    if format != "nf4":
        raise ValueError(f"format is {format!r}, expected int8 or nf4")
    groups = F.pad(weight, (0, -weight.shape[-1] % NF4_GROUP)).unflatten(-1, (-1, NF4_GROUP))  # [..., rows, G, 64]
    scales = groups.abs().amax(-1).clamp(max=torch.finfo(torch.bfloat16).max).to(torch.bfloat16)
    unit = groups / scales.float().clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    values = nf4_values(weight.device)
    codes = torch.bucketize(unit, (values[1:] + values[:-1]) / 2, out_int32=True).to(torch.uint8).flatten(-2)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scales


def nf4_values(device: torch.device) -> Tensor:
    """[16] fp32."""
    return torch.tensor(NF4_VALUES, dtype=torch.float32, device=device)


def dequantize(codes: Tensor, scales: Tensor, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What codes and scales mean: `code * scale` (int8) or `NF4_VALUES[code] * scale` (nf4), a product in fp32 that is
    rounded to `dtype`. Returns [..., rows, columns]."""
    if codes.dtype == torch.int8:
        return (codes.float() * scales[..., None]).to(dtype)
    both = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)  # [..., rows, 64 G]
    values = nf4_values(codes.device)[both.int()].unflatten(-1, (-1, NF4_GROUP)) * scales.float()[..., None]
    return values.flatten(-2)[..., :columns].to(dtype).contiguous()


_combine = combine  # `grafted_experts` has an argument of the same name
