"""How a kernel is compared with the specification.

The double rule: both the kernel and the same formula in plain PyTorch of the same dtype are measured against the
specification in fp64; the kernel may err at most twice as much. The error is relative to the whole tensor,
`||x - exact|| / ||exact||`; half a unit in the last place, the price of storing the result, is free, and more where
a tensor has so few entries that PyTorch may just have been lucky.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

NAMES = (
    "out",
    "d_hidden_states",
    "d_routing_weights",
    "d_gate_up_proj",
    "d_down_proj",
    "d_graft_gate_up_proj",
    "d_graft_down_proj",
    "d_graft_logits",
)


class _KeepDouble(TorchFunctionMode):
    """`reference.py` computes in fp32; under this mode its `.float()` leaves fp64 alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Inside, the reference keeps fp64 inputs in fp64 from end to end."""
    with _KeepDouble():
        yield


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def double(inputs: list) -> list:
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]


def forward_and_grads(
    function: Callable[..., Tensor], inputs: list, d_out: Tensor, frozen: tuple[int, ...] = (), **options: Any
) -> list[Tensor | None]:
    """The output, then the gradient of every float input (None for frozen ones)."""
    leaves = []
    for index, x in enumerate(inputs):
        floating = isinstance(x, Tensor) and x.is_floating_point()
        leaves.append(x.detach().clone().requires_grad_(index not in frozen) if floating else x)
    out = function(*leaves, **options)
    out.backward(d_out.to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves if isinstance(x, Tensor) and x.is_floating_point())]


def free_roundings(result: Tensor) -> float:
    """Half a unit; on a GPU fp32 a whole one: the chip's own exponential and division round more than once."""
    return 1.0 if result.is_cuda and result.dtype == torch.float32 else 0.5


def assert_double_rule(
    ours: list, plain: list, truth: list, dtype: torch.dtype, names: tuple[str, ...] = NAMES, power: int = 1
) -> None:
    """`power`: 2 where the results are products of two computed numbers, so that the roundings of both are in them."""
    for name, a, b, t in zip(names, ours, plain, truth, strict=False):
        assert (a is None) == (t is None), f"{name}: {a} against {t}"
        if a is None or a.numel() == 0:
            continue
        assert a.shape == t.shape, f"{name} has shape {list(a.shape)}, want {list(t.shape)}"
        assert a.dtype == b.dtype, f"{name} is {a.dtype}, want {b.dtype}"
        norm = t.norm().clamp_min(1e-30)
        error, allowed = ((a.double() - t).norm() / norm), ((b.double() - t).norm() / norm)
        limit = 2 * allowed + power * free_roundings(a) * torch.finfo(dtype).eps * (1 + 4 * t.numel() ** -0.5)
        assert torch.isfinite(a).all(), f"{name} is not finite: memory that nobody wrote?"
        assert error <= limit, f"{name}: relative error {error:.3g}, plain PyTorch {allowed:.3g}, limit {limit:.3g}"
