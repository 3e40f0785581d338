"""How an operation is told to torch: one body for every device, given the backends that `plan.py` chooses there.

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


def operation(name: str, schema: str, body: Body, fake: Body) -> torch.library.CustomOpDef:
    """`flex::name`: `body(choose, *arguments)` on CUDA and on the CPU, `fake(*arguments)` where nothing is computed.

    The schema stands in exported programs: its names, order and types must not change.
    """
    full_name, devices = f"flex::{name}", {"device_types": "cuda", "mutates_args": ()}
    op = torch.library.custom_op(full_name, lambda *args: body(plan.cuda_backend, *args), schema=schema, **devices)
    op.register_kernel("cpu")(lambda *args: body(plan.cpu_backend, *args))
    op.register_fake(fake)
    return op
