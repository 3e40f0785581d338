"""Checks of the public functions. Each error is one sentence: the name, what it is, what was expected."""

import contextlib

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flex_kernels.reference import ACTIVATIONS, COMBINES
from flex_kernels.weights import FrozenWeight, check_frozen


def check_shape(name: str, tensor: Tensor, expected: tuple[int | str, ...]) -> None:
    """`expected`: a size, or a letter where any size will do."""
    shape = tensor.shape
    if len(shape) != len(expected) or not all(map(_size_fits, expected, shape)):
        raise ValueError(f"{name} has shape {list(shape)}, expected [{', '.join(str(size) for size in expected)}]")


def _size_fits(size: int | str, own: int) -> bool:
    return size.__class__ is str or size == own


def check_float(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} is {tensor.dtype}, expected a floating point tensor")


def check_integer(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} is {tensor.dtype}, expected int64 or int32")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}, where hidden_states is")


def check_same_format(gate_up_proj: Tensor, down_proj: Tensor) -> None:
    """Both matrices are dense, or both of one format and frozen."""
    quantized = isinstance(gate_up_proj, FrozenWeight), isinstance(down_proj, FrozenWeight)
    if not any(quantized):
        return
    if not all(quantized) or gate_up_proj.codes.dtype != down_proj.codes.dtype:
        formats = (
            weight.format if isinstance(weight, FrozenWeight) else "dense" for weight in (gate_up_proj, down_proj)
        )
        raise ValueError(f"gate_up_proj is {' and down_proj '.join(formats)}, expected both of one format")
    check_frozen("gate_up_proj", gate_up_proj)
    check_frozen("down_proj", down_proj)


def check_no_tangents(name: str, *tensors: Tensor | None) -> None:
    """Forward-mode derivatives of these operations do not exist, and torch would take them for zero, silently."""
    if forward_ad._current_level < 0:  # nobody differentiates forward
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            f"{name} has no forward-mode derivative (torch.func.jvp, jacfwd, linearize); expected reverse mode "
            "(backward, torch.autograd.grad)"
        )


def check_combine(combine: str) -> None:
    if combine not in COMBINES:
        raise ValueError(f"combine is {combine!r}, expected one of {', '.join(COMBINES)}")


def check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of the matrix products: autocast's where it is on, else the tensor's own."""
    return torch.get_autocast_dtype(_kind(tensor)) if _autocast_is_on(tensor) else tensor.dtype


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of weights, logits and sums: fp32, and fp64 beside fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, which costs a microsecond where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def autocast_off(tensor: Tensor) -> contextlib.AbstractContextManager:
    """The public functions have already cast; a backend's own products must not be cast again."""
    return torch.autocast(_kind(tensor), enabled=False) if _autocast_is_on(tensor) else _NOTHING


def _autocast_is_on(tensor: Tensor) -> bool:
    # Not asked of torch.amp.is_autocast_available: torch 2.11 cannot compile that.
    return not tensor.is_meta and torch.is_autocast_enabled(_kind(tensor))


_NOTHING = contextlib.nullcontext()


def _kind(tensor: Tensor) -> str:
    """Of its device: `tensor.device.type`, which takes a quarter of a microsecond to make the word."""
    return "cpu" if tensor.is_cpu else tensor.device.type
