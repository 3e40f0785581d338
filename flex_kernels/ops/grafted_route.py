"""The router and the graft's gate as one operation, `flex::grafted_route`. Order as in `operation.py`.

Kept for the backward: the hidden states and the router's logits [T, E], in the dtype of the hidden states; nothing
where nothing trains. The backward is made of the gradients of `route` and `graft_logits` and a product or two:

    dl = route's gradient of d_routing_weights      dx = dl W + ds g      dW = dl^T x      dg = sum_t ds_t x_t
"""

from typing import Any

import torch
from torch import Tensor

from flex_kernels import plan
from flex_kernels.backends import native
from flex_kernels.described import Remembered, describe
from flex_kernels.ops.checks import (
    autocast_off,
    cast,
    check_device,
    check_float,
    check_no_tangents,
    check_shape,
    compute_dtype,
    wide_dtype,
)
from flex_kernels.ops.operation import Choose, is_bare_call, operation

_GATE = "Tensor? graft_logit_weight, Tensor? graft_logit_bias"


def _forward(choose: Choose, hidden_states: Tensor, router_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    backend = choose("grafted_route", hidden_states.dtype, router_weight.dtype)
    with autocast_off(hidden_states):
        return backend.grafted_route_fwd(hidden_states.contiguous(), router_weight.contiguous(), *rest)


def _forward_fake(hidden_states: Tensor, router_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    graft_logit_weight, _, top_k, _, keep_logits = rest
    torch._check(hidden_states.dim() == 2 and router_weight.dim() == 2)
    new, num_tokens, num_experts = hidden_states.new_empty, hidden_states.shape[0], router_weight.shape[0]
    wide = wide_dtype(hidden_states.dtype)
    return (
        new(num_tokens, top_k, dtype=wide),
        new(num_tokens, top_k, dtype=torch.int64),
        new(0 if graft_logit_weight is None else num_tokens, dtype=wide),
        new(num_experts, dtype=torch.int32),
        new(num_tokens if keep_logits else 0, num_experts),
    )


_grafted_route = operation(
    "grafted_route",
    f"(Tensor hidden_states, Tensor router_weight, {_GATE}, SymInt top_k, bool renormalize, bool keep_logits) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)


def _gradients(
    choose: Choose,
    d_routing_weights: Tensor | None,
    d_graft_logits: Tensor | None,
    hidden_states: Tensor | None,
    router_weight: Tensor,
    graft_logit_weight: Tensor | None,
    router_logits: Tensor,
    expert_indices: Tensor,
    renormalize: bool,
    need_hidden: bool,
    need_router: bool,
    need_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    d_hidden, d_router, d_gate = (router_weight.new_empty(0) for _ in range(3))
    with autocast_off(router_weight):
        if d_graft_logits is not None:
            stage, d_logits = choose("graft_logits", router_weight.dtype), d_graft_logits.contiguous()
            d_hidden, d_gate = stage.graft_logits_bwd(
                d_logits, hidden_states, graft_logit_weight, need_hidden, need_gate
            )
        if d_routing_weights is not None:
            stage, d_weights = choose("route", router_weight.dtype), d_routing_weights.contiguous()
            d_logits = stage.route_bwd(d_weights, router_logits, expert_indices, renormalize)
            if need_hidden:
                # Not addmm: a sum over many experts that begins with the gate's large part rounds at every step.
                product = torch.mm(d_logits, router_weight)
                d_hidden = product if d_graft_logits is None else d_hidden.add_(product)
            if need_router:
                d_router = torch.mm(d_logits.T, hidden_states)
    return d_hidden, d_router, d_gate


def _gradients_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    router_weight, graft_logit_weight, _, expert_indices, _, hidden, router, gate = args[3:]
    new, (num_experts, hidden_size) = router_weight.new_empty, router_weight.shape
    return (
        new((expert_indices.shape[0], hidden_size) if hidden else 0),
        new((num_experts, hidden_size) if router else 0),
        graft_logit_weight.new_empty(hidden_size) if gate else new(0),
    )


_grafted_route_bwd = operation(
    "grafted_route_bwd",
    "(Tensor? d_routing_weights, Tensor? d_graft_logits, Tensor? hidden_states, Tensor router_weight, "
    "Tensor? graft_logit_weight, Tensor router_logits, Tensor expert_indices, bool renormalize, bool need_hidden, "
    "bool need_router, bool need_gate) -> (Tensor, Tensor, Tensor)",
    _gradients,
    _gradients_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_states, router_weight, graft_logit_weight, _, _, ctx.renormalize, _ = inputs
    _, expert_indices, graft_logits, tokens_per_expert, router_logits = output
    has_graft, trains_router = graft_logit_weight is not None, ctx.needs_input_grad[1]
    ctx.mark_non_differentiable(
        expert_indices, tokens_per_expert, router_logits, *(() if has_graft else (graft_logits,))
    )
    ctx.set_materialize_grads(False)
    # A frozen weight is a plain attribute, as in `experts.py`.
    ctx.frozen_router = None if trains_router else router_weight
    kept = (hidden_states if has_graft or trains_router else None, router_weight if trains_router else None)
    ctx.save_for_backward(*kept, graft_logit_weight, router_logits, expert_indices)


def _backward(
    ctx: Any, d_routing_weights: Tensor | None, _indices: None, d_graft_logits: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    hidden, router, gate, bias = ctx.needs_input_grad[:4]
    router, gate = router and d_routing_weights is not None, gate and d_graft_logits is not None
    hidden = hidden and not (d_routing_weights is None and d_graft_logits is None)
    d_hidden = d_router = d_gate = d_bias = None
    if hidden or router or gate:
        hidden_states, trained_router, *rest = ctx.saved_tensors
        router_weight = ctx.frozen_router if trained_router is None else trained_router
        # What only the gate's weight needs does not pass through the router, and the other way round.
        d_weights = d_routing_weights if hidden or router else None
        d_logits = d_graft_logits if hidden or gate else None
        d_hidden, d_router, d_gate = _grafted_route_bwd(
            d_weights, d_logits, hidden_states, router_weight, *rest, ctx.renormalize, hidden, router, gate
        )
    if bias and d_graft_logits is not None:
        d_bias = d_graft_logits.sum(0, keepdim=True)
    grads = (d_hidden if hidden else None, d_router if router else None, d_gate if gate else None, d_bias)
    return *grads, None, None, None


_grafted_route.register_autograd(_backward, setup_context=_setup_context)


def grafted_route(
    hidden_states: Tensor,
    router_weight: Tensor,
    graft_logit_weight: Tensor | None,
    graft_logit_bias: Tensor | None,
    top_k: int,
    renormalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The router from the hidden states on, and the graft's gate, in one pass; twin: `reference.grafted_route`.

    `l_t = W x_t`, `p_t = softmax(l_t)`, `w_tk` the `top_k` largest of `p_t`, divided by their sum where `renormalize`
    says so, and `graft_logits_t = g . x_t + b`: the same as `F.linear` and `route`, `graft_logits`, and the counts that
    a plan begins with.

    The router's logits are rounded to the dtype of `hidden_states`, as a model's own router rounds them before its
    softmax in fp32. The sum behind a logit may be taken in another order than there: near the middle between two
    numbers it may then be rounded to the other one. The gate is computed in fp32 from start to end. Under autocast
    hidden states and router weight are cast to its dtype first, as `F.linear` would cast them.

    Differentiable, once, in hidden_states, router_weight and the gate's weight and bias; of a frozen router weight no
    gradient is computed.

    Args:
        hidden_states: [T, H].
        router_weight: [E, H] (`W`), of the dtype of `hidden_states`.
        graft_logit_weight: [H] (`g`); graft_logit_bias: [1] (`b`); used in fp32; both or, without a graft, None.
        top_k: experts per token, `1 <= top_k <= E`.
        renormalize: whether the kept weights are divided by their sum.

    Returns:
        routing_weights: [T, K] fp32 (fp64 beside fp64), descending.
        expert_indices: [T, K] int64; ties go to the lower expert index.
        graft_logits: [T] fp32 (fp64 beside fp64); [0] without a graft.
        tokens_per_expert: [E] int32, 0 for an idle expert; they sum to T*K.

    Raises:
        ValueError: a shape or device that does not fit, `top_k` out of range, one of the gate's two missing.
        TypeError: not floating point, or a router weight of another dtype than the hidden states.
    """
    found = _plain_route(hidden_states, router_weight, graft_logit_weight, graft_logit_bias, top_k, renormalize, False)
    if found is not None:
        return found
    return grafted_route_with_logits(
        hidden_states, router_weight, graft_logit_weight, graft_logit_bias, top_k, renormalize, False
    )[:4]


def grafted_route_with_logits(
    hidden_states: Tensor,
    router_weight: Tensor,
    graft_logit_weight: Tensor | None,
    graft_logit_bias: Tensor | None,
    top_k: int,
    renormalize: bool,
    keep_logits: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`grafted_route`, then the router's rounded logits [T, E], without a gradient; [0, E] where nobody needs them."""
    tensors = (hidden_states, router_weight, graft_logit_weight, graft_logit_bias)
    if keep_logits and (found := _plain_route(*tensors, top_k, renormalize, True)) is not None:
        return found
    dtype = compute_dtype(hidden_states)
    description = describe(tensors, top_k, dtype)
    if description is None or description not in _CHECKED:
        _check(*tensors, top_k, dtype)
        if description is not None:
            _CHECKED.put(description)
    check_no_tangents("grafted_route", *tensors)
    if graft_logit_weight is not None:
        wide = wide_dtype(dtype)
        graft_logit_weight, graft_logit_bias = cast(graft_logit_weight, wide), cast(graft_logit_bias, wide)
    keep_logits |= torch.is_grad_enabled() and (hidden_states.requires_grad or router_weight.requires_grad)
    states, weight = cast(hidden_states, dtype), cast(router_weight, dtype)
    gate = (graft_logit_weight, graft_logit_bias)
    return _grafted_route.described(description, states, weight, *gate, top_k, renormalize, keep_logits)


_CHECKED = Remembered()


def _plain_route(
    hidden_states: Tensor,
    router_weight: Tensor,
    graft_logit_weight: Tensor | None,
    graft_logit_bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...] | None:
    """The results where csrc takes the tensors as they are and nothing else is to be done, else None.

    For one token the rest, from the checks to the way through `Operation`, takes longer than the arithmetic. csrc looks
    at the same things as `_check`, and says no where that would say why.
    """
    if torch.compiler.is_compiling() or not is_bare_call(
        hidden_states, router_weight, graft_logit_weight, graft_logit_bias
    ):
        return None
    if plan.cpu_backend("grafted_route", torch.float32) is not native:
        return None
    return native.plain_grafted_route(hidden_states, router_weight, graft_logit_weight, graft_logit_bias, *rest)


def _check(
    hidden_states: Tensor,
    router_weight: Tensor,
    graft_logit_weight: Tensor | None,
    graft_logit_bias: Tensor | None,
    top_k: int,
    dtype: torch.dtype,
) -> None:
    """`dtype`: that of the products, autocast's where it is on."""
    check_shape("hidden_states", hidden_states, ("T", "H"))
    hidden_size, device = hidden_states.shape[1], hidden_states.device
    check_shape("router_weight", router_weight, ("E", hidden_size))
    check_float("hidden_states", hidden_states)
    check_float("router_weight", router_weight)
    check_device("router_weight", router_weight, device)
    num_experts = router_weight.shape[0]
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}, expected 1 to {num_experts}, the number of experts")
    if router_weight.dtype != hidden_states.dtype and dtype == hidden_states.dtype:
        raise TypeError(f"router_weight is {router_weight.dtype}, expected {dtype}, the dtype of hidden_states")
    if (graft_logit_weight is None) != (graft_logit_bias is None):
        raise ValueError("one of graft_logit_weight and graft_logit_bias is missing, expected both or none")
    if graft_logit_weight is None:
        return
    gate = {"graft_logit_weight": (graft_logit_weight, hidden_size), "graft_logit_bias": (graft_logit_bias, 1)}
    for name, (tensor, size) in gate.items():
        check_shape(name, tensor, (size,))
        check_float(name, tensor)
        check_device(name, tensor, device)
