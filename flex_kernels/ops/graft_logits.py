"""The graft's gate before its sigmoid as an operation, `flex::graft_logits`. Order as in `operation.py`."""

from typing import Any

import torch
from torch import Tensor

from flex_kernels.described import Remembered, describe
from flex_kernels.ops.checks import (
    autocast_off,
    cast,
    check_device,
    check_float,
    check_no_tangents,
    check_shape,
    wide_dtype,
)
from flex_kernels.ops.operation import Choose, operation


def _forward(choose: Choose, hidden_states: Tensor, logit_weight: Tensor, logit_bias: Tensor) -> Tensor:
    with autocast_off(hidden_states):
        return choose("graft_logits", hidden_states.dtype).graft_logits_fwd(hidden_states, logit_weight, logit_bias)


def _forward_fake(hidden_states: Tensor, logit_weight: Tensor, logit_bias: Tensor) -> Tensor:
    torch._check(hidden_states.dim() == 2)
    return logit_weight.new_empty(hidden_states.shape[0])


_graft_logits = operation(
    "graft_logits",
    "(Tensor hidden_states, Tensor logit_weight, Tensor logit_bias) -> Tensor",
    _forward,
    _forward_fake,
)


def _gradients(choose: Choose, d_graft_logits: Tensor, hidden_states: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    with autocast_off(hidden_states):
        return choose("graft_logits", hidden_states.dtype).graft_logits_bwd(d_graft_logits, hidden_states, *rest)


def _gradients_fake(
    _: Tensor, hidden_states: Tensor, logit_weight: Tensor, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    return (
        hidden_states.new_empty(hidden_states.shape if need_hidden else 0),
        logit_weight.new_empty(logit_weight.shape if need_weight else 0),
    )


_graft_logits_bwd = operation(
    "graft_logits_bwd",
    "(Tensor d_graft_logits, Tensor hidden_states, Tensor logit_weight, bool need_hidden, bool need_weight) "
    "-> (Tensor, Tensor)",
    _gradients,
    _gradients_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    hidden_states, logit_weight, _ = inputs
    ctx.save_for_backward(hidden_states, logit_weight)


def _backward(ctx: Any, d_graft_logits: Tensor) -> tuple[Tensor | None, ...]:
    need_hidden, need_weight, need_bias = ctx.needs_input_grad
    d_hidden = d_weight = None
    if need_hidden or need_weight:
        d_hidden, d_weight = _graft_logits_bwd(d_graft_logits, *ctx.saved_tensors, need_hidden, need_weight)
    d_bias = d_graft_logits.sum(0, keepdim=True) if need_bias else None
    return d_hidden if need_hidden else None, d_weight if need_weight else None, d_bias


_graft_logits.register_autograd(_backward, setup_context=_setup_context)


def graft_logits(hidden_states: Tensor, logit_weight: Tensor, logit_bias: Tensor) -> Tensor:
    """The graft's gate before its sigmoid: `l_t = g . x_t + b`; twin: `reference.graft_logits`.

    Differentiable in all three, once. Computed in fp32 whatever the dtypes, also under autocast; for the backward the
    hidden states are kept as they came.

    Args:
        hidden_states: [T, H].
        logit_weight: [H] (`g`), used in fp32.
        logit_bias: [1] (`b`), used in fp32.

    Returns:
        [T] fp32 (fp64 beside fp64). No tokens: [0].

    Raises:
        ValueError: a shape or device that does not fit. TypeError: not floating point.
    """
    tensors = (hidden_states, logit_weight, logit_bias)
    description = describe(tensors)
    if description is None or description not in _CHECKED:
        check_shape("hidden_states", hidden_states, ("T", "H"))
        check_shape("logit_weight", logit_weight, (hidden_states.shape[1],))
        check_shape("logit_bias", logit_bias, (1,))
        for name, tensor in zip(("hidden_states", "logit_weight", "logit_bias"), tensors, strict=True):
            check_float(name, tensor)
            check_device(name, tensor, hidden_states.device)
        if description is not None:
            _CHECKED.put(description)
    check_no_tangents("graft_logits", *tensors)
    wide = wide_dtype(hidden_states.dtype)
    return _graft_logits.described(description, hidden_states, cast(logit_weight, wide), cast(logit_bias, wide))


_CHECKED = Remembered()
