"""csrc's experts and scores behind the signatures of `torch_experts`: checks, then pointers (see `native.py`).

fp32 and bf16, accumulated in fp32; the experts' weights may have either dtype. Threads are torch's own: as many as
`torch.get_num_threads()`, in torch's OpenMP pool. The same input gives the same bits for any number of threads. The
instruction set is the best one here; the environment variable `FLEX_ISA` (avx512_bf16, avx512, avx2, portable) forces
another.
"""

import torch
from torch import Tensor

from flex_kernels import native

MAX_PAIRS = torch.iinfo(torch.int32).max


def experts_fwd(
    hidden_states: Tensor,
    sorted_pairs: Tensor,
    expert_offsets: Tensor,
    routing_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    graft_gate_up_proj: Tensor | None,
    graft_down_proj: Tensor | None,
    graft_logits: Tensor | None,
    combine: str,
    activation: str,
    save_preactivations: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch_experts.experts_fwd`: out [T, H], preactivations [T*K, 2I], graft_preactivations [T, 2I_g]."""
    layer, kept = _layer(
        hidden_states,
        sorted_pairs,
        expert_offsets,
        routing_weights,
        gate_up_proj,
        down_proj,
        graft_gate_up_proj,
        graft_down_proj,
        graft_logits,
        combine,
        activation,
    )
    out = torch.empty_like(kept[0])
    grafted = graft_gate_up_proj is not None
    preactivations = out.new_empty(sorted_pairs.shape[0] if save_preactivations else 0, gate_up_proj.shape[1])
    graft_preactivations = out.new_empty(
        out.shape[0] if save_preactivations and grafted else 0, graft_gate_up_proj.shape[0] if grafted else 0
    )
    native.module().experts_forward(
        layer, out.data_ptr(), preactivations.data_ptr(), graft_preactivations.data_ptr(), torch.get_num_threads()
    )
    return out, preactivations, graft_preactivations


def preactivations_fwd(
    hidden_states: Tensor,
    sorted_pairs: Tensor,
    expert_offsets: Tensor,
    routing_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    graft_gate_up_proj: Tensor | None,
    graft_down_proj: Tensor | None,
    graft_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`torch_experts.preactivations_fwd`: [T*K, 2I] and [T, 2I_g]."""
    layer, kept = _layer(
        hidden_states,
        sorted_pairs,
        expert_offsets,
        routing_weights,
        gate_up_proj,
        down_proj,
        graft_gate_up_proj,
        graft_down_proj,
        graft_logits,
        "additive",
        "silu",
    )
    grafted = graft_gate_up_proj is not None
    preactivations = kept[0].new_empty(sorted_pairs.shape[0], gate_up_proj.shape[1])
    graft_preactivations = kept[0].new_empty((len(kept[0]), graft_gate_up_proj.shape[0]) if grafted else (0, 0))
    native.module().experts_forward(
        layer, 0, preactivations.data_ptr(), graft_preactivations.data_ptr(), torch.get_num_threads()
    )
    return preactivations, graft_preactivations


def experts_bwd(
    d_out: Tensor,
    hidden_states: Tensor,
    sorted_pairs: Tensor,
    expert_offsets: Tensor,
    routing_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    graft_gate_up_proj: Tensor | None,
    graft_down_proj: Tensor | None,
    graft_logits: Tensor | None,
    preactivations: Tensor,
    graft_preactivations: Tensor,
    combine: str,
    activation: str,
    need_hidden: bool,
    need_routing_weights: bool,
    need_graft: bool,
    need_graft_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`torch_experts.experts_bwd`: every gradient but those of the experts' weights; not needed: an empty tensor."""
    layer, kept = _layer(
        hidden_states,
        sorted_pairs,
        expert_offsets,
        routing_weights,
        gate_up_proj,
        down_proj,
        graft_gate_up_proj,
        graft_down_proj,
        graft_logits,
        combine,
        activation,
    )
    rows = {
        "d_out": (d_out, hidden_states.shape),
        "preactivations": (preactivations, (sorted_pairs.shape[0], gate_up_proj.shape[1])),
    }
    if graft_gate_up_proj is not None:
        rows["graft_preactivations"] = (graft_preactivations, (len(hidden_states), graft_gate_up_proj.shape[0]))
    inputs = [_checked(name, x, hidden_states.dtype, tuple(shape)) for name, (x, shape) in rows.items()]

    def wanted(need: bool, like: Tensor | None) -> Tensor:
        return torch.empty_like(like) if need and like is not None else kept[0].new_empty(0)

    x, _, _, weights, _, _, *graft = kept
    grads = (
        wanted(need_hidden, x),
        wanted(need_routing_weights, weights),
        wanted(need_graft, graft[0]),
        wanted(need_graft, graft[1]),
        wanted(need_graft_logits, graft[2]),
    )
    addresses = [tensor.data_ptr() for tensor in inputs] + [0] * (3 - len(inputs))
    gradients = native.module().Gradients(*(grad.data_ptr() for grad in grads))
    native.module().experts_backward(layer, *addresses, gradients, torch.get_num_threads())
    return grads


def score_experts(
    hidden_states: Tensor,
    target: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    batch_offsets: Tensor,
    activation: str,
) -> Tensor:
    """`reference.score_experts`: [B, E, 3] fp32."""
    scoring, _kept = _scoring(hidden_states, target, gate_up_proj, down_proj, activation)
    offsets = batch_offsets.to("cpu", torch.int64).contiguous()
    scores = torch.empty(len(offsets) - 1, gate_up_proj.shape[0], 3)
    native.module().score_experts(
        scoring, offsets.data_ptr(), len(offsets) - 1, scores.data_ptr(), torch.get_num_threads()
    )
    return scores


def score_neurons(
    hidden_states: Tensor, target: Tensor, gate_up_proj: Tensor, down_proj: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """`reference.score_neurons`: energy [E, I] fp32 and correlation [E, I] fp32."""
    scoring, _kept = _scoring(hidden_states, target, gate_up_proj, down_proj, activation)
    energy = torch.empty(down_proj.shape[0], down_proj.shape[2])
    correlation = torch.empty_like(energy)
    native.module().score_neurons(scoring, energy.data_ptr(), correlation.data_ptr(), torch.get_num_threads())
    return energy, correlation


def _layer(
    hidden_states: Tensor,
    sorted_pairs: Tensor,
    expert_offsets: Tensor,
    routing_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    graft_gate_up_proj: Tensor | None,
    graft_down_proj: Tensor | None,
    graft_logits: Tensor | None,
    combine: str,
    activation: str,
) -> tuple[object, list[Tensor | None]]:
    """The layer as csrc reads it, and the tensors that must live as long as it is used."""
    (num_tokens, hidden_size), top_k = hidden_states.shape, routing_weights.shape[1]
    num_experts, _, width = down_proj.shape
    if num_tokens * top_k > MAX_PAIRS:
        raise ValueError(f"hidden_states has {num_tokens} tokens of {top_k} experts each, want fewer than 2^31 pairs")
    dtype, weight_dtype = hidden_states.dtype, gate_up_proj.dtype
    grafted = graft_gate_up_proj is not None
    graft_width = graft_down_proj.shape[1] if grafted else -1
    tensors = {
        "hidden_states": (hidden_states, dtype, (num_tokens, hidden_size)),
        "sorted_pairs": (sorted_pairs, torch.int32, (num_tokens * top_k,)),
        "expert_offsets": (expert_offsets, torch.int32, (num_experts + 1,)),
        "routing_weights": (routing_weights, torch.float32, (num_tokens, top_k)),
        "gate_up_proj": (gate_up_proj, weight_dtype, (num_experts, 2 * width, hidden_size)),
        "down_proj": (down_proj, weight_dtype, (num_experts, hidden_size, width)),
    }
    if grafted:
        tensors |= {
            "graft_gate_up_proj": (graft_gate_up_proj, dtype, (2 * graft_width, hidden_size)),
            "graft_down_proj": (graft_down_proj, dtype, (hidden_size, graft_width)),
            "graft_logits": (graft_logits, torch.float32, (num_tokens,)),
        }
    kept = [_checked(name, *expected) for name, expected in tensors.items()] + [None] * (9 - len(tensors))
    layer = native.module().Layer(
        num_tokens,
        hidden_size,
        num_experts,
        width,
        top_k,
        graft_width,
        _scalar(dtype),
        _scalar(weight_dtype),
        combine == "convex",
        _activation(activation),
        *(0 if tensor is None else tensor.data_ptr() for tensor in kept),
    )
    return layer, kept


def _scoring(
    hidden_states: Tensor, target: Tensor, gate_up_proj: Tensor, down_proj: Tensor, activation: str
) -> tuple[object, list[Tensor]]:
    """As `_layer`. A target that is wider than the hidden states keeps its precision: both go to fp32."""
    if target.dtype != hidden_states.dtype:
        hidden_states, target = hidden_states.float(), target.float()
    num_experts, hidden_size, width = down_proj.shape
    dtype, weight_dtype, shape = hidden_states.dtype, gate_up_proj.dtype, (len(hidden_states), hidden_size)
    kept = [
        _checked("hidden_states", hidden_states, dtype, shape),
        _checked("target", target, dtype, shape),
        _checked("gate_up_proj", gate_up_proj, weight_dtype, (num_experts, 2 * width, hidden_size)),
        _checked("down_proj", down_proj, weight_dtype, (num_experts, hidden_size, width)),
    ]
    sizes = (len(hidden_states), hidden_size, num_experts, width)
    names = (_scalar(dtype), _scalar(weight_dtype), _activation(activation))
    return native.module().Scoring(*sizes, *names, *(tensor.data_ptr() for tensor in kept)), kept


def _checked(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor, contiguous: from here on only its address is known."""
    if tensor.device.type != "cpu" or tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype} on {tensor.device}, want {dtype} on the CPU")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, want {list(shape)}")
    return tensor.contiguous()


def _scalar(dtype: torch.dtype) -> object:
    scalars = native.module().Scalar
    if dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"csrc computes in float32 and bfloat16, got {dtype}")
    return scalars.float32 if dtype == torch.float32 else scalars.bfloat16


def _activation(activation: str) -> object:
    return getattr(native.module().Activation, activation)
