"""How an operation is told to torch: one body for every device, given the backends that `plan.py` chooses there.

Not `torch.library.custom_op`, which checks in every call that no output shares memory with an input (3 us of a call's
28). Here tests check it (`opcheck`).

The order in each file: the body, the fake (what comes out, by shape and dtype) -> the backward as an operation of its
own -> autograd -> the public function with checks and documentation.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from flex_kernels import plan

Choose = Callable[..., ModuleType]  # plan.cuda_backend or plan.cpu_backend
Body = Callable[..., Any]


_LIBRARY = torch.library.Library("flex", "DEF")


def operation(name: str, schema: str, body: Body, fake: Body) -> torch._ops.OpOverload:
    """`flex::name`: `body(choose, *arguments)` on CUDA and on the CPU, `fake(*arguments)` where nothing is computed.

    The schema stands in exported programs: its names, order and types must not change.
    """
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, lambda *args: body(plan.cuda_backend, *args), "CUDA")
    _LIBRARY.impl(name, lambda *args: body(plan.cpu_backend, *args), "CPU")
    torch.library.register_fake(f"flex::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.flex, name).default


def differentiable(op: torch._ops.OpOverload, backward: Body, setup_context: Body) -> None:
    """Tells torch the gradient of an operation: `backward(ctx, *gradients of its results)`, and what the forward keeps,
    `setup_context(ctx, inputs, output)`."""
    torch.library.register_autograd(op.name(), backward, setup_context=setup_context, lib=_LIBRARY)
