"""csrc's experts and scores behind the signatures of `pytorch`: checks, then pointers (see `native.py`).

fp32 and bf16, accumulated in fp32; the experts' weights may have either dtype. Threads are torch's own: as many as
`torch.get_num_threads()`, in torch's OpenMP pool. The same input gives the same bits for any number of threads. The
instruction set is the best one here; the environment variable `FLEX_ISA` (amx, avx512_bf16, avx512, avx2, portable)
forces another.
"""

import torch
from torch import Tensor

from flex_kernels.backends import native_door as native
from flex_kernels.backends.call import LayerInputs

MAX_PAIRS = torch.iinfo(torch.int32).max


def experts_fwd(
    layer: LayerInputs, combine: str, activation: str, save_preactivations: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`pytorch.experts_fwd`: out [T, H], preactivations [T*K, 2I], graft_preactivations [T, 2I_g]."""
    described, kept = _described(layer, combine, activation)
    out = torch.empty_like(kept.hidden_states)
    preactivations, graft_preactivations = _empty_preactivations(layer, save_preactivations)
    native.module().experts_forward(
        described, out.data_ptr(), preactivations.data_ptr(), graft_preactivations.data_ptr(), torch.get_num_threads()
    )
    return out, preactivations, graft_preactivations


def preactivations_fwd(layer: LayerInputs) -> tuple[Tensor, Tensor]:
    """`pytorch.preactivations_fwd`: [T*K, 2I] and [T, 2I_g]."""
    described, _kept = _described(layer, "additive", "silu")  # neither matters before the activation
    preactivations, graft_preactivations = _empty_preactivations(layer, True)
    native.module().experts_forward(
        described, 0, preactivations.data_ptr(), graft_preactivations.data_ptr(), torch.get_num_threads()
    )
    return preactivations, graft_preactivations


def experts_bwd(
    d_out: Tensor,
    layer: LayerInputs,
    preactivations: Tensor,
    graft_preactivations: Tensor,
    combine: str,
    activation: str,
    need_hidden: bool,
    need_routing_weights: bool,
    need_graft: bool,
    need_graft_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`pytorch.experts_bwd`: every gradient but those of the experts' weights; not needed: an empty tensor."""
    described, kept = _described(layer, combine, activation)
    x = kept.hidden_states
    rows = {
        "d_out": (d_out, tuple(x.shape)),
        "preactivations": (preactivations, (len(kept.sorted_pairs), kept.gate_up_proj.shape[1])),
    }
    if layer.has_graft:
        rows["graft_preactivations"] = (graft_preactivations, (len(x), 2 * layer.graft_width))
    inputs = [_checked(name, tensor, x.dtype, shape) for name, (tensor, shape) in rows.items()]

    def wanted(need: bool, like: Tensor | None) -> Tensor:
        return torch.empty_like(like) if need and like is not None else x.new_empty(0)

    grads = (
        wanted(need_hidden, x),
        wanted(need_routing_weights, kept.routing_weights),
        wanted(need_graft, kept.graft_gate_up_proj),
        wanted(need_graft, kept.graft_down_proj),
        wanted(need_graft_logits, kept.graft_logits),
    )
    addresses = [tensor.data_ptr() for tensor in inputs] + [0] * (3 - len(inputs))
    gradients = native.module().Gradients(*(grad.data_ptr() for grad in grads))
    native.module().experts_backward(described, *addresses, gradients, torch.get_num_threads())
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


def _described(layer: LayerInputs, combine: str, activation: str) -> tuple[object, LayerInputs]:
    """The layer as csrc reads it, and the tensors that must live as long as it is used."""
    (num_tokens, hidden_size), top_k = layer.hidden_states.shape, layer.routing_weights.shape[1]
    num_experts, _, width = layer.down_proj.shape
    if num_tokens * top_k > MAX_PAIRS:
        raise ValueError(f"hidden_states has {num_tokens} tokens of {top_k} experts each, want fewer than 2^31 pairs")
    dtype, weight_dtype, graft_width = layer.hidden_states.dtype, layer.gate_up_proj.dtype, layer.graft_width
    expected = {
        "hidden_states": (dtype, (num_tokens, hidden_size)),
        "sorted_pairs": (torch.int32, (num_tokens * top_k,)),
        "expert_offsets": (torch.int32, (num_experts + 1,)),
        "routing_weights": (torch.float32, (num_tokens, top_k)),
        "gate_up_proj": (weight_dtype, (num_experts, 2 * width, hidden_size)),
        "down_proj": (weight_dtype, (num_experts, hidden_size, width)),
    }
    if layer.has_graft:
        expected |= {
            "graft_gate_up_proj": (dtype, (2 * graft_width, hidden_size)),
            "graft_down_proj": (dtype, (hidden_size, graft_width)),
            "graft_logits": (torch.float32, (num_tokens,)),
        }
    kept = layer._replace(**{name: _checked(name, getattr(layer, name), *want) for name, want in expected.items()})
    described = native.module().Layer(
        num_tokens,
        hidden_size,
        num_experts,
        width,
        top_k,
        graft_width if layer.has_graft else -1,
        _scalar(dtype),
        _scalar(weight_dtype),
        combine == "convex",
        _activation(activation),
        *(0 if tensor is None else tensor.data_ptr() for tensor in kept),
    )
    return described, kept


def _empty_preactivations(layer: LayerInputs, wanted: bool) -> tuple[Tensor, Tensor]:
    """For [T*K, 2I] and the graft's [T, 2I_g]; without rows where not wanted."""
    pairs, tokens = (len(layer.sorted_pairs), len(layer.hidden_states)) if wanted else (0, 0)
    empty = layer.hidden_states.new_empty
    return empty(pairs, layer.gate_up_proj.shape[1]), empty(tokens if layer.has_graft else 0, 2 * layer.graft_width)


def _scoring(
    hidden_states: Tensor, target: Tensor, gate_up_proj: Tensor, down_proj: Tensor, activation: str
) -> tuple[object, list[Tensor]]:
    """As `_described`. A target that is wider than the hidden states keeps its precision: both go to fp32."""
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
