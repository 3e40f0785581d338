"""The layer as one differentiable PyTorch operation, `flex::grafted_experts`.

Kept for the backward: the pre-activations `Z`, and with a graft the input `X`; or `X` alone if the caller says
`recompute`. Under `no_grad` nothing.
Frozen expert weights are plain attributes of the autograd node (no version check, no pinning) and their gradient is
never computed. Trained ones are saved as usual and get their gradient from an operation of its own. Quantised ones
(`weights.py`) arrive as codes and scales; those that are made anew at every access (`experts_made_by`) are not kept.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flex_kernels.backends import pytorch
from flex_kernels.backends.call import LayerCall, Needs
from flex_kernels.described import Remembered, describe
from flex_kernels.ops.checks import (
    autocast_off,
    cast,
    check_activation,
    check_combine,
    check_device,
    check_float,
    check_integer,
    check_no_tangents,
    check_same_format,
    check_shape,
    compute_dtype,
    wide_dtype,
)
from flex_kernels.ops.operation import Choose, operation
from flex_kernels.weights import stored, unwrapped

_EXPERTS = "Tensor routing_weights, Tensor gate_up_proj, Tensor down_proj"
_LAYER = f"{_EXPERTS}, Tensor? graft_gate_up_proj, Tensor? graft_down_proj, Tensor? graft_logits"
_ROWS = "Tensor d_out, Tensor hidden_states, Tensor sorted_pairs, Tensor expert_offsets"
_NAMES = "str combine, str activation"
_SCALES = "Tensor? gate_up_scales=None, Tensor? down_scales=None"  # of quantised experts, whose codes come as weights


def _with_scales(arguments: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """The `count` arguments before the scales, then those: the dispatcher leaves trailing defaults out."""
    return (*arguments, *(None,) * (count + 2 - len(arguments)))


def _forward(choose: Choose, hidden_states: Tensor, expert_indices: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    weights, gate_up, down, *graft, combine, activation, save_preactivations, gate_up_scales, down_scales = (
        _with_scales(rest, 9)
    )
    gate_up_proj = stored(gate_up, gate_up_scales, hidden_states.shape[1])
    layer = (weights, gate_up_proj, stored(down, down_scales, gate_up.shape[1] // 2), *graft)
    planner = choose("routing_plan", hidden_states.dtype)
    backend = choose("experts", hidden_states.dtype, gate_up_proj.dtype)
    with autocast_off(hidden_states):
        sorted_pairs, _, expert_offsets = planner.routing_plan(expert_indices, gate_up_proj.shape[0])
        rows = (hidden_states.contiguous(), sorted_pairs, expert_offsets)
        results = backend.experts_fwd(LayerCall(*rows, *layer, combine, activation), save_preactivations)
    return *results, sorted_pairs, expert_offsets


def _forward_fake(hidden_states: Tensor, expert_indices: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, gate_up_proj, _, graft_gate_up_proj, *_, save_preactivations, _, _ = _with_scales(rest, 9)
    torch._check(hidden_states.dim() == 2 and expert_indices.dim() == 2 and gate_up_proj.dim() == 3)
    num_tokens, num_pairs = hidden_states.shape[0], expert_indices.numel()
    graft_rows, graft_columns = (0, 0) if graft_gate_up_proj is None else (num_tokens, graft_gate_up_proj.shape[0])
    return (
        hidden_states.new_empty(hidden_states.shape),
        hidden_states.new_empty(num_pairs if save_preactivations else 0, gate_up_proj.shape[1]),
        hidden_states.new_empty(graft_rows if save_preactivations else 0, graft_columns),
        expert_indices.new_empty(num_pairs, dtype=torch.int32),
        expert_indices.new_empty(gate_up_proj.shape[0] + 1, dtype=torch.int32),
    )


_grafted_experts = operation(
    "grafted_experts",
    f"(Tensor hidden_states, Tensor expert_indices, {_LAYER}, {_NAMES}, bool save_preactivations, {_SCALES}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)


def _backward(choose: Choose, d_out: Tensor, hidden_states: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *layer, preactivations, graft_preactivations, combine, activation = rest[:12]
    *needs, gate_up_scales, down_scales = _with_scales(rest[12:], 4)
    layer[3] = stored(layer[3], gate_up_scales, hidden_states.shape[1])
    layer[4] = stored(layer[4], down_scales, layer[3].shape[1] // 2)
    call = LayerCall(hidden_states.contiguous(), *layer, combine, activation, Needs(*needs))
    backend = choose("experts", hidden_states.dtype, call.gate_up_proj.dtype)
    with autocast_off(hidden_states):
        kept = _preactivations(backend, call, preactivations, graft_preactivations)
        return backend.experts_bwd(d_out.contiguous(), call, *kept)


def _preactivations(backend: ModuleType, call: LayerCall, *kept: Tensor) -> tuple[Tensor, ...]:
    """Those that the forward kept, or the same once more."""
    return kept if kept[0].shape[0] == call.sorted_pairs.shape[0] else backend.preactivations_fwd(call)


def _backward_fake(_: Tensor, hidden_states: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    routing_weights, (hidden, weights, graft, logits) = rest[2], rest[12:16]
    graft_gate_up_proj, graft_down_proj, graft_logits = rest[5:8]

    def gradient(need: bool, of: Tensor | None, kind: Tensor) -> Tensor:
        return of.new_empty(of.shape) if need and of is not None else kind.new_empty(0)

    return (
        gradient(hidden, hidden_states, hidden_states),
        gradient(weights, routing_weights, routing_weights),
        gradient(graft, graft_gate_up_proj, hidden_states),
        gradient(graft, graft_down_proj, hidden_states),
        gradient(logits, graft_logits, routing_weights),
    )


_grafted_experts_bwd = operation(
    "grafted_experts_bwd",
    f"({_ROWS}, {_LAYER}, Tensor preactivations, Tensor graft_preactivations, {_NAMES}, bool need_hidden, "
    f"bool need_routing_weights, bool need_graft, bool need_graft_logits, {_SCALES}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _backward_weights(_: Choose, d_out: Tensor, hidden_states: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *rows_and_experts, graft_logits, preactivations, combine, activation = rest
    call = LayerCall(
        hidden_states.contiguous(), *rows_and_experts, graft_logits=graft_logits, combine=combine, activation=activation
    )
    with autocast_off(hidden_states):
        preactivations, *_ = _preactivations(pytorch, call, preactivations)
        return pytorch.expert_weight_grads(d_out.contiguous(), call, preactivations)


def _backward_weights_fake(*args: Any) -> tuple[Tensor, Tensor]:
    gate_up_proj, down_proj = args[5:7]
    return gate_up_proj.new_empty(gate_up_proj.shape), down_proj.new_empty(down_proj.shape)


_grafted_experts_bwd_weights = operation(
    "grafted_experts_bwd_weights",
    f"({_ROWS}, {_EXPERTS}, Tensor? graft_logits, Tensor preactivations, {_NAMES}) -> (Tensor, Tensor)",
    _backward_weights,
    _backward_weights_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_states, _, routing_weights, gate_up_proj, down_proj, *graft = inputs[:8]
    ctx.combine, ctx.activation, ctx.saved_z, *scales = _with_scales(inputs[8:], 3)
    _, preactivations, graft_preactivations, sorted_pairs, expert_offsets = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.trains_experts = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    experts = (gate_up_proj, down_proj)
    ctx.frozen_experts = None if ctx.trains_experts else (*experts, *scales)
    ctx.make_experts = None if torch.compiler.is_compiling() else _made_by.get()
    if ctx.make_experts is not None and not ctx.trains_experts:
        ctx.frozen_experts = tuple(weight.dtype for weight in experts)
    input_read = ctx.trains_experts or graft[0] is not None or not ctx.saved_z
    rows = (hidden_states if input_read else None, sorted_pairs, expert_offsets, routing_weights, *graft)
    ctx.save_for_backward(*rows, preactivations, graft_preactivations, *(experts if ctx.trains_experts else ()))


def _autograd_backward(ctx: Any, d_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    if d_out is None:
        return (None,) * len(needs)
    saved = ctx.saved_tensors  # asked for once: under gradient checkpointing a second time is an error
    hidden_states, sorted_pairs, expert_offsets, routing_weights, *graft, z, graft_z = saved[:9]
    hidden_states = d_out if hidden_states is None else hidden_states  # then nothing but its shape and dtype is read
    if ctx.trains_experts:
        experts, scales = saved[9:], (None, None)
    elif ctx.make_experts is not None:
        made = zip(ctx.make_experts(), ctx.frozen_experts, strict=True)
        experts, scales = tuple(weight.to(dtype) for weight, dtype in made), (None, None)
    else:
        experts, scales = ctx.frozen_experts[:2], ctx.frozen_experts[2:]
    rows, names = (d_out, hidden_states, sorted_pairs, expert_offsets), (ctx.combine, ctx.activation)
    wanted = (needs[0], needs[2], needs[5] or needs[6], needs[7])
    d_hidden = d_weights = d_graft_gate_up = d_graft_down = d_graft_logits = d_gate_up = d_down = None
    if any(wanted):
        d_hidden, d_weights, d_graft_gate_up, d_graft_down, d_graft_logits = _grafted_experts_bwd(
            *rows, routing_weights, *experts, *graft, z, graft_z, *names, *wanted, *scales
        )
    if ctx.trains_experts:
        d_gate_up, d_down = _grafted_experts_bwd_weights(*rows, routing_weights, *experts, graft[2], z, *names)
    grads = (d_hidden, None, d_weights, d_gate_up, d_down, d_graft_gate_up, d_graft_down, d_graft_logits)
    gradients = [grad if need else None for grad, need in zip(grads, needs, strict=False)]
    return *gradients, *(None,) * (len(needs) - len(grads))


_grafted_experts.register_autograd(_autograd_backward, setup_context=_setup_context)

_made_by: ContextVar[Callable[[], tuple[Tensor, Tensor]] | None] = ContextVar("made_by", default=None)


@contextlib.contextmanager
def experts_made_by(make: Callable[[], tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Inside, `grafted_experts` keeps no frozen experts for the backward, which calls `make()` for the same once more.

    For weights that are computed at every access, as a parametrisation that dequantises does. Compiled code, which
    cannot call back, keeps them.
    """
    token = _made_by.set(make)
    try:
        yield
    finally:
        _made_by.reset(token)


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
    recompute: bool = False,
) -> Tensor:
    """A Mixture-of-Experts layer after its router, with one extra expert that is always on behind a gate of its own.

    additive: `y_t = sum_k w_tk E_{p_tk}(x_t) + s_t E_g(x_t)`, convex: `y_t = (1 - s_t) sum_k ... + s_t E_g(x_t)`, where
    `E(x) = D (act(G x) * (U x))` and `s_t = sigmoid(graft_logits_t)` (arXiv 2506.00965; twin:
    `reference.grafted_experts`).

    Differentiable in reverse mode, once, in every float argument that requires grad: forward mode, `torch.func` and a
    second derivative are refused; `vmap` of the forward is a loop. Frozen expert weights cost nothing in the backward.
    One that is changed in place between forward and backward gives a wrong gradient, and nothing notices.
    Matrix products run in the dtype of `hidden_states` (under autocast: in autocast's) and everything between them in
    fp32. Expert weights may have another dtype (kept in bf16 beside fp32 activations, say): they are converted one
    expert at a time. Graft weights, usually trained in fp32, are cast as a whole.

    Args:
        hidden_states: [T, H].
        expert_indices: [T, K] int64 or int32, not negative; ids `>= E` are skipped (expert parallelism).
        routing_weights: [T, K], used in fp32.
        gate_up_proj: [E, 2I, H], the rows of G, then those of U; dense or a `FrozenWeight`.
        down_proj: [E, H, I], likewise.
        graft_gate_up_proj: [2I_g, H]; any width I_g.
        graft_down_proj: [H, I_g].
        graft_logits: [T], the graft's gate before the sigmoid, used in fp32. All three of the graft or none.
        combine: "additive" or "convex".
        activation: "silu", "gelu" or "gelu_tanh".
        recompute: whether the backward computes the pre-activations [T * K, 2I] again, a third more work, rather than
            keep them. For experts much wider than the layer, where they are most of what a step keeps.

    Returns:
        [T, H] in the dtype of `hidden_states`. No tokens: [0, H]. An idle expert's weights are not touched.

    Raises:
        ValueError: a shape, device or name that does not fit, part of a graft, a negative id (on CUDA: skipped),
            quantised experts that ask for a gradient or of which one matrix is dense.
        TypeError: a dtype that does not fit.
    """
    graft = (graft_gate_up_proj, graft_down_proj, graft_logits)
    layer = (hidden_states, expert_indices, routing_weights, gate_up_proj, down_proj)
    description = describe((*layer, *graft), combine, activation)
    if description is None or description not in _CHECKED:
        _check_layer(*layer, graft)
        check_combine(combine)
        check_activation(activation)
        if description is not None:
            _CHECKED.put(description)
    check_no_tangents("grafted_experts", hidden_states, routing_weights, gate_up_proj, down_proj, *graft)
    dtype = compute_dtype(hidden_states)
    wide = wide_dtype(dtype)
    (gate_up_proj, gate_up_scales), (down_proj, down_scales) = unwrapped(gate_up_proj), unwrapped(down_proj)
    if gate_up_scales is not None:
        pass  # computed in any dtype
    elif dtype != hidden_states.dtype:  # autocast
        gate_up_proj, down_proj = cast(gate_up_proj, dtype), cast(down_proj, dtype)
    elif gate_up_proj.dtype != down_proj.dtype:
        down_proj = down_proj.to(gate_up_proj.dtype)
    if graft_gate_up_proj is not None:
        graft = (cast(graft_gate_up_proj, dtype), cast(graft_down_proj, dtype), cast(graft_logits, wide))
    floats = (cast(hidden_states, dtype), cast(routing_weights, wide), gate_up_proj, down_proj, *graft)
    save = not recompute and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in floats)
    scales = () if gate_up_scales is None else (gate_up_scales, down_scales)  # a dense call is what it always was
    arguments = (floats[0], expert_indices, *floats[1:], combine, activation, save, *scales)
    out = _grafted_experts.described(description, *arguments)[0]
    return cast(out, hidden_states.dtype)


_CHECKED = Remembered()


def _check_layer(
    hidden_states: Tensor,
    expert_indices: Tensor,
    routing_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    graft: tuple[Tensor | None, ...],
) -> None:
    check_shape("hidden_states", hidden_states, ("T", "H"))
    num_tokens, hidden_size = hidden_states.shape
    check_shape("expert_indices", expert_indices, (num_tokens, "K"))
    check_integer("expert_indices", expert_indices)
    check_shape("routing_weights", routing_weights, tuple(expert_indices.shape))
    check_shape("down_proj", down_proj, ("E", hidden_size, "I"))
    num_experts, _, intermediate_size = down_proj.shape
    check_shape("gate_up_proj", gate_up_proj, (num_experts, 2 * intermediate_size, hidden_size))
    named = {"routing_weights": routing_weights, "gate_up_proj": gate_up_proj, "down_proj": down_proj}
    graft_names = ("graft_gate_up_proj", "graft_down_proj", "graft_logits")
    missing = [name for name, tensor in zip(graft_names, graft, strict=True) if tensor is None]
    if not missing:
        check_shape("graft_down_proj", graft[1], (hidden_size, "I_g"))
        check_shape("graft_gate_up_proj", graft[0], (2 * graft[1].shape[1], hidden_size))
        check_shape("graft_logits", graft[2], (num_tokens,))
        named |= zip(graft_names, graft, strict=True)
    elif len(missing) < 3:
        raise ValueError(f"{' and '.join(missing)} missing, expected all of {', '.join(graft_names)} or none of them")
    check_float("hidden_states", hidden_states)
    check_device("expert_indices", expert_indices, hidden_states.device)
    for name, tensor in named.items():
        check_float(name, tensor)
        check_device(name, tensor, hidden_states.device)
    check_same_format(gate_up_proj, down_proj)
