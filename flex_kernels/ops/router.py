"""The small stages as operations: `flex::route` and `flex::routing_plan` before the experts, `flex::combine` after.

`grafted_experts` does its own combining; `combine` alone serves experts that some other code computes (biased or
transposed layouts, `transformers_plug.py`). Order of each operation as in `operation.py`.
"""

from typing import Any

import torch
from torch import Tensor

from flex_kernels.ops.checks import (
    autocast_off,
    check_combine,
    check_device,
    check_float,
    check_integer,
    check_no_tangents,
    check_shape,
    wide_dtype,
)
from flex_kernels.ops.operation import Choose, operation


def _route_fwd(choose: Choose, router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    return choose("route", router_logits.dtype).route_fwd(router_logits.contiguous(), top_k, renormalize)


def _route_fake(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    torch._check(router_logits.dim() == 2)
    shape = (router_logits.shape[0], top_k)
    weights = router_logits.new_empty(shape, dtype=wide_dtype(router_logits.dtype))
    return weights, router_logits.new_empty(shape, dtype=torch.int64)


_route = operation(
    "route", "(Tensor router_logits, SymInt top_k, bool renormalize) -> (Tensor, Tensor)", _route_fwd, _route_fake
)


def _route_gradient(choose: Choose, d_routing_weights: Tensor, router_logits: Tensor, *rest: Any) -> Tensor:
    backend = choose("route", router_logits.dtype)
    return backend.route_bwd(d_routing_weights.contiguous(), router_logits.contiguous(), *rest)


_route_bwd = operation(
    "route_bwd",
    "(Tensor d_routing_weights, Tensor router_logits, Tensor expert_indices, bool renormalize) -> Tensor",
    _route_gradient,
    lambda _, router_logits, *__: router_logits.new_empty(router_logits.shape),
)


def _route_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    router_logits, _, ctx.renormalize = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(router_logits, output[1])


def _route_backward(ctx: Any, d_routing_weights: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
    if d_routing_weights is None:
        return None, None, None
    return _route_bwd(d_routing_weights, *ctx.saved_tensors, ctx.renormalize), None, None


_route.register_autograd(_route_backward, setup_context=_route_setup)


def route(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """The router: softmax over the experts, then the `top_k` largest; twin: `reference.route`.

    `p = softmax(router_logits)`, `w_tk = p_{t, i_tk}`, divided by `sum_k w_tk` where `renormalize` says so
    (transformers' `norm_topk_prob`). Differentiable in `router_logits`; computed in fp32.

    Args:
        router_logits: [T, E].
        top_k: experts per token, `1 <= top_k <= E`.
        renormalize: whether the kept weights are divided by their sum.

    Returns:
        routing_weights: [T, K] fp32, descending.
        expert_indices: [T, K] int64; ties go to the lower expert index.

    Raises:
        ValueError: `router_logits` is not [T, E] or `top_k` is out of range. TypeError: not floating point.
    """
    check_shape("router_logits", router_logits, ("T", "E"))
    check_no_tangents("route", router_logits)
    check_float("router_logits", router_logits)
    if not 1 <= top_k <= router_logits.shape[1]:
        raise ValueError(f"top_k is {top_k}, expected 1 to {router_logits.shape[1]}, the number of experts")
    return _route(router_logits, top_k, renormalize)


def _plan(choose: Choose, expert_indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return choose("routing_plan", torch.float32).routing_plan(expert_indices, num_experts)


def _plan_fake(expert_indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(expert_indices.dim() == 2)
    sizes = (expert_indices.numel(), num_experts, num_experts + 1)
    return tuple(expert_indices.new_empty(size, dtype=torch.int32) for size in sizes)


_routing_plan = operation(
    "routing_plan", "(Tensor expert_indices, SymInt num_experts) -> (Tensor, Tensor, Tensor)", _plan, _plan_fake
)


def routing_plan(expert_indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the (token, slot) pairs by expert: a stable counting sort, with `pair = token * K + slot`.

    Twin: `reference.routing_plan`. Not differentiable.

    Args:
        expert_indices: [T, K] int64 or int32, not negative. Ids `>= num_experts` mark slots that another rank computes
            (expert parallelism): counted for nobody, at the tail of `sorted_pairs`.
        num_experts: E, at least 1.

    Returns:
        sorted_pairs: [T*K] int32.
        tokens_per_expert: [E] int32; 0 for an idle expert.
        expert_offsets: [E+1] int32, exclusive prefix sum; its last entry is the number of pairs with an expert here.

    Raises:
        ValueError: `expert_indices` is not [T, K] or holds a negative id (on CUDA, where looking would cost a
            synchronisation, a negative id is skipped like one `>= num_experts`).
        TypeError: `expert_indices` is not int64 or int32.
    """
    check_integer("expert_indices", expert_indices)
    check_shape("expert_indices", expert_indices, ("T", "K"))
    if num_experts < 1:
        raise ValueError(f"num_experts is {num_experts}, expected at least 1")
    return _routing_plan(expert_indices, num_experts)


_SUMMED = "Tensor expert_out, Tensor routing_weights, Tensor? graft_out, Tensor? graft_logits, str combine"


def _combine_fwd(choose: Choose, expert_out: Tensor, *rest: Any) -> Tensor:
    with autocast_off(expert_out):
        return choose("combine", expert_out.dtype).combine_fwd(expert_out.contiguous(), *rest)


def _combine_fake(expert_out: Tensor, *_: Any) -> Tensor:
    torch._check(expert_out.dim() == 3)
    return expert_out.new_empty(expert_out.shape[0], expert_out.shape[2])


_combine = operation("combine", f"({_SUMMED}) -> Tensor", _combine_fwd, _combine_fake)


def _combine_gradients(choose: Choose, d_out: Tensor, expert_out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    with autocast_off(expert_out):
        backend = choose("combine", expert_out.dtype)
        return backend.combine_bwd(d_out.contiguous(), expert_out.contiguous(), *rest)


def _combine_gradients_fake(_: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    inputs, needs = rest[:4], rest[5:]
    return tuple(
        x.new_empty(x.shape) if need and x is not None else inputs[index % 2].new_empty(0)
        for index, (x, need) in enumerate(zip(inputs, needs, strict=True))
    )


_combine_bwd = operation(
    "combine_bwd",
    f"(Tensor d_out, {_SUMMED}, bool need_expert_out, bool need_routing_weights, bool need_graft_out, "
    "bool need_graft_logits) -> (Tensor, Tensor, Tensor, Tensor)",
    _combine_gradients,
    _combine_gradients_fake,
)


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.combine = inputs
    ctx.save_for_backward(*tensors)


def _combine_backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:4]
    grads = _combine_bwd(d_out, *ctx.saved_tensors, ctx.combine, *needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None


_combine.register_autograd(_combine_backward, setup_context=_combine_setup)


def combine(
    expert_out: Tensor,
    routing_weights: Tensor,
    graft_out: Tensor | None = None,
    graft_logits: Tensor | None = None,
    combine: str = "additive",
) -> Tensor:
    """The weighted sum over a token's slots, joined with the gated graft; twin: `reference.combine`.

    additive: `y_t = sum_k w_tk E_k(x_t) + s_t E_g(x_t)`, convex: `y_t = (1 - s_t) sum_k w_tk E_k(x_t) + s_t E_g(x_t)`,
    `s_t = sigmoid(graft_logits_t)`. Summed in fp32, differentiable in every tensor.

    Args:
        expert_out: [T, K, H].
        routing_weights: [T, K], used in fp32.
        graft_out: [T, H], cast to the dtype of `expert_out`; graft_logits: [T], used in fp32; both or none.
        combine: "additive" or "convex".

    Returns:
        [T, H] in the dtype of `expert_out`.

    Raises:
        ValueError: a shape, device or name that does not fit. TypeError: a dtype that does not.
    """
    check_shape("expert_out", expert_out, ("T", "K", "H"))
    check_no_tangents("combine", expert_out, routing_weights, graft_out, graft_logits)
    check_shape("routing_weights", routing_weights, tuple(expert_out.shape[:2]))
    check_combine(combine)
    if (graft_out is None) != (graft_logits is None):
        raise ValueError("one of graft_out and graft_logits is missing, expected both or none")
    named = {"expert_out": expert_out, "routing_weights": routing_weights}
    wide = wide_dtype(expert_out.dtype)
    if graft_out is not None:
        check_shape("graft_out", graft_out, (expert_out.shape[0], expert_out.shape[2]))
        check_shape("graft_logits", graft_logits, (expert_out.shape[0],))
        named |= {"graft_out": graft_out, "graft_logits": graft_logits}
    for name, tensor in named.items():
        check_float(name, tensor)
        check_device(name, tensor, expert_out.device)
    if graft_out is not None:
        graft_out, graft_logits = graft_out.to(expert_out.dtype), graft_logits.to(wide)
    return _combine(expert_out, routing_weights.to(wide), graft_out, graft_logits, combine)
