"""How an operation is told to torch: one body for every device, given the backends that `plan.py` chooses there.

The order in each file: the body, the fake (what comes out, by shape and dtype) -> the backward as an operation of its
own -> autograd -> the public function with checks and documentation.

A call reaches its body in one of two ways. `torch.ops.flex.name` is the registered operation, which the dispatcher
carries through everything that torch may have switched on: the compiler, export, fake tensors, `torch.func`, modes,
subclasses, the profiler. Where none of that is on, the dispatcher has nothing to do but call the body for the tensors'
device, and takes 20 us for it, six times the arithmetic of a small layer. Such a call goes straight to the body; what
trains passes through an `autograd.Function` of the same body and the same derivative. Bits do not depend on the way.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flex_kernels import plan
from flex_kernels.described import are_plain

Choose = Callable[..., ModuleType]  # plan.cuda_backend or plan.cpu_backend
Body = Callable[..., Any]
_Key, _Keys = torch._C.DispatchKey, torch._C.DispatchKeySet
# What the dispatcher looks at in every thread. A mode, a transform, a tracer each add a key of theirs.
_OTHER_KEYS = ~(_Keys(_Key.BackendSelect) | _Keys(_Key.ADInplaceOrView)).raw_repr()
# By one name each: on the way of every call, and each dot takes its time.
_included_keys = torch._C._dispatch_tls_local_include_set
_function_mode_is_on = torch._C._is_torch_function_mode_enabled
_profiler_is_on = torch._C._autograd._profiler_enabled
_is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded


class Operation:
    """`flex::name`: called like a function."""

    def __init__(self, registered: torch.library.CustomOpDef, body: Body) -> None:
        self.registered, self._body = registered, body
        self._overload = registered._opoverload
        self._differentiable: Body | None = None

    def register_autograd(self, backward: Body, *, setup_context: Body) -> None:
        """As `torch.library.register_autograd`; the first argument of such an operation is a tensor."""
        self.registered.register_autograd(backward, setup_context=setup_context)
        body = self._body

        def forward(ctx: Any, *arguments: Any) -> Any:
            results = body(_chooser(arguments[0]), *arguments)
            setup_context(ctx, arguments, results)
            return results

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        function = type(f"flex_{self.registered._name}", (torch.autograd.Function,), methods)
        # Past `Function.apply` itself, which first looks for what is not there: transforms and what is left of them.
        self._differentiable = super(torch.autograd.Function, function).apply

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or not are_plain(arguments):
            return self._overload(*arguments)
        return self.described(True, *arguments)

    def described(self, description: Any, *arguments: Any) -> Any:
        """A call for whoever has a description (`described.py`) of these arguments, cast or not; None: it has none."""
        if description is None or _something_is_on():
            return self._overload(*arguments)
        place = arguments[0] if arguments[0] is not None else next(x for x in arguments if x is not None)
        if not (place.is_cpu or place.is_cuda):
            return self._overload(*arguments)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
            return self._body(_chooser(place), *arguments)
        if self._differentiable is None or _is_excluded(_Key.AutogradFunctionality):
            return self._overload(*arguments)  # which refuses to be differentiated, or stands in another operation
        return self._differentiable(*arguments)


def _something_is_on() -> bool:
    """A mode, a transform, a tracer, or the profiler, which shows an operation by its name."""
    return _included_keys().raw_repr() & _OTHER_KEYS or _function_mode_is_on() or _profiler_is_on()


def is_bare_call(*tensors: Tensor | None) -> bool:
    """On the CPU, with nothing on, no autocast and nothing that trains: a call may go straight to what computes it.

    Not for code that is being compiled."""
    return (
        tensors[0].is_cpu
        and not (torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors))
        and not _something_is_on()
        and _is_excluded(_Key.AutocastCPU)
        and forward_ad._current_level < 0
    )


def _chooser(tensor: Tensor) -> Choose:
    return plan.cuda_backend if tensor.is_cuda else plan.cpu_backend


def operation(name: str, schema: str, body: Body, fake: Body) -> Operation:
    """`flex::name`: `body(choose, *arguments)` on CUDA and on the CPU, `fake(*arguments)` where nothing is computed.

    The schema stands in exported programs: its names, order and types must not change.
    """
    full_name, devices = f"flex::{name}", {"device_types": "cuda", "mutates_args": ()}
    op = torch.library.custom_op(full_name, lambda *args: body(plan.cuda_backend, *args), schema=schema, **devices)
    op.register_kernel("cpu")(lambda *args: body(plan.cpu_backend, *args))
    op.register_fake(fake)
    return Operation(op, body)
