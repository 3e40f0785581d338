"""Scoring pretrained components against a target: `flex::score_experts` and `flex::score_neurons`.

Neither is differentiable: they choose what to train, before training. Order of each operation as in `operation.py`.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from flex_kernels.ops.checks import (
    autocast_off,
    check_activation,
    check_device,
    check_float,
    check_integer,
    check_no_tangents,
    check_same_format,
    check_shape,
)
from flex_kernels.ops.operation import Choose, operation
from flex_kernels.weights import Experts, stored, unwrapped

_COMPONENTS = "Tensor hidden_states, Tensor target, Tensor gate_up_proj, Tensor down_proj"
_SCALES = "Tensor? gate_up_scales=None, Tensor? down_scales=None"  # of quantised experts, whose codes come as weights


def _components(
    hidden_states: Tensor, gate_up_proj: Tensor, down_proj: Tensor, scales: tuple[Tensor | None, ...]
) -> tuple[Experts, Experts]:
    gate_up_scales, down_scales = scales or (None, None)  # the dispatcher leaves trailing defaults out
    gate_up = stored(gate_up_proj, gate_up_scales, hidden_states.shape[1])
    return gate_up, stored(down_proj, down_scales, gate_up_proj.shape[1] // 2)


def _experts(
    choose: Choose,
    hidden_states: Tensor,
    target: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    batch_offsets: Tensor,
    activation: str,
    *scales: Tensor | None,
) -> Tensor:
    with autocast_off(hidden_states):
        backend = choose("score", hidden_states.dtype, gate_up_proj.dtype)
        components = _components(hidden_states, gate_up_proj, down_proj, scales)
        return backend.score_experts(hidden_states, target, *components, batch_offsets, activation)


def _experts_fake(hidden_states: Tensor, target: Tensor, gate_up_proj: Tensor, *rest: Any) -> Tensor:
    torch._check(hidden_states.dim() == 2 and target.shape == hidden_states.shape)
    batch_offsets = rest[1]
    return hidden_states.new_empty(batch_offsets.shape[0] - 1, gate_up_proj.shape[0], 3, dtype=torch.float32)


_score_experts = operation(
    "score_experts",
    f"({_COMPONENTS}, Tensor batch_offsets, str activation, {_SCALES}) -> Tensor",
    _experts,
    _experts_fake,
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
    """How well each expert alone reconstructs the layer's output; twin: `reference.score_experts`.

    `(||F_b - E_i(X_b)||^2, <F_b, E_i(X_b)>, ||E_i(X_b)||^2)` for each calibration batch `b` and expert `i`: from these
    three every criterion of `selection/one_expert.py` follows. `[T, E, H]` is never written. Not differentiable.

    Args:
        hidden_states: [T, H], the layer's input.
        target: [T, H], `F`: the layer's output, or what it is missing.
        gate_up_proj: [E, 2I, H]; down_proj: [E, H, I]; dense, or both a `FrozenWeight`.
        batch_offsets: [B+1] int64 or int32, ascending from 0 to T: batch `b` is tokens `[offsets[b], offsets[b+1])`.
        activation: "silu", "gelu" or "gelu_tanh".

    Returns:
        [B, E, 3] fp32; zeros for an empty batch.

    Raises:
        ValueError: a shape or device that does not fit, offsets that do not ascend from 0 to T. TypeError: a dtype.
    """
    _check(hidden_states, target, gate_up_proj, down_proj, activation)
    check_integer("batch_offsets", batch_offsets)
    check_shape("batch_offsets", batch_offsets, ("B+1",))
    check_device("batch_offsets", batch_offsets, hidden_states.device)
    if not torch.compiler.is_compiling():
        offsets = batch_offsets.tolist()
        ascending = all(a <= b for a, b in itertools.pairwise(offsets))
        if not ascending or len(offsets) < 2 or (offsets[0], offsets[-1]) != (0, len(hidden_states)):
            raise ValueError(
                f"batch_offsets is {offsets}, expected it to ascend from 0 to {len(hidden_states)}, the tokens"
            )
    (gate_up_proj, gate_up_scales), (down_proj, down_scales) = unwrapped(gate_up_proj), unwrapped(down_proj)
    inputs = (hidden_states.contiguous(), target.contiguous(), gate_up_proj, down_proj, batch_offsets, activation)
    with torch.no_grad():
        return _score_experts(*inputs, gate_up_scales, down_scales)


def _neurons(
    choose: Choose,
    hidden_states: Tensor,
    target: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    activation: str,
    *scales: Tensor | None,
) -> Any:
    with autocast_off(hidden_states):
        backend = choose("score", hidden_states.dtype, gate_up_proj.dtype)
        components = _components(hidden_states, gate_up_proj, down_proj, scales)
        return backend.score_neurons(hidden_states, target, *components, activation)


def _neurons_fake(hidden_states: Tensor, target: Tensor, gate_up_proj: Tensor, *_: Any) -> Any:
    torch._check(hidden_states.dim() == 2 and target.shape == hidden_states.shape)
    shape = (gate_up_proj.shape[0], gate_up_proj.shape[1] // 2)
    return hidden_states.new_empty(shape, dtype=torch.float32), hidden_states.new_empty(shape, dtype=torch.float32)


_score_neurons = operation(
    "score_neurons", f"({_COMPONENTS}, str activation, {_SCALES}) -> (Tensor, Tensor)", _neurons, _neurons_fake
)


def score_neurons(
    hidden_states: Tensor, target: Tensor, gate_up_proj: Tensor, down_proj: Tensor, *, activation: str = "silu"
) -> tuple[Tensor, Tensor]:
    """Energy and correlation of every neuron; twin: `reference.score_neurons`.

    Neuron `(e, j)` adds `a_ej(t) d_ej` to the output of expert `e` (`d_ej`: its column of `D_e`):
    `q_ej = sum_t a_ej(t)^2 ||d_ej||^2`, `b_ej = sum_t a_ej(t) <d_ej, F_t>`. Not differentiable.

    Args:
        hidden_states, target, gate_up_proj, down_proj, activation: as in `score_experts`.

    Returns:
        energy [E, I] fp32 and correlation [E, I] fp32; zeros without tokens.

    Raises:
        ValueError: a shape or device that does not fit. TypeError: a dtype that does not.
    """
    _check(hidden_states, target, gate_up_proj, down_proj, activation)
    (gate_up_proj, gate_up_scales), (down_proj, down_scales) = unwrapped(gate_up_proj), unwrapped(down_proj)
    inputs = (hidden_states.contiguous(), target.contiguous(), gate_up_proj, down_proj, activation)
    with torch.no_grad():
        return _score_neurons(*inputs, gate_up_scales, down_scales)


def _check(hidden_states: Tensor, target: Tensor, gate_up_proj: Tensor, down_proj: Tensor, activation: str) -> None:
    check_shape("hidden_states", hidden_states, ("T", "H"))
    check_no_tangents("scoring", hidden_states, target, gate_up_proj, down_proj)
    check_shape("target", target, tuple(hidden_states.shape))
    check_shape("down_proj", down_proj, ("E", hidden_states.shape[1], "I"))
    num_experts, hidden_size, intermediate_size = down_proj.shape
    check_shape("gate_up_proj", gate_up_proj, (num_experts, 2 * intermediate_size, hidden_size))
    check_float("hidden_states", hidden_states)
    named = {"target": target, "gate_up_proj": gate_up_proj, "down_proj": down_proj}
    for name, tensor in named.items():
        check_float(name, tensor)
        check_device(name, tensor, hidden_states.device)
    check_same_format(gate_up_proj, down_proj)
    check_activation(activation)
