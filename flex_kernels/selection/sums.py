"""Sums over calibration tokens: they add up over batches, and inputs that cannot be summed are refused.

`ExpertGram` (`subsets.py`) and `NeuronSums` (`neurons.py`) are NamedTuples of fp64 tensors, each entry a sum over
tokens. So a calibration set of any length takes the memory of one batch.
"""

from typing import TypeVar

import torch
from torch import Tensor

from flex_kernels.ops.checks import check_device, check_float, check_shape

Sums = TypeVar("Sums", bound=tuple)

# A component counts as a combination of others when less than this part of its energy lies outside their span. Outputs
# in fp32 are known to 1e-7, their squares to 1e-14; a constant fitted to the rest would be one of rounding errors.
DEPENDENT = 1e-10


def merged(a: Sums, b: Sums) -> Sums:
    """The sums over the tokens of `a` and of `b`: two ExpertGram, or two NeuronSums, of the same components.

    Raises:
        TypeError: not sums of one kind. ValueError: sums of different sizes.
    """
    if type(a) is not type(b):
        raise TypeError(f"the sums are of kind {type(a).__name__} and {type(b).__name__}, expected two of one kind")
    for name, x, y in zip(type(a)._fields, a, b, strict=True):
        if x.shape != y.shape:
            raise ValueError(
                f"{name} has shape {list(x.shape)} and {list(y.shape)}, expected sums of the same components"
            )
    return type(a)(*(x + y for x, y in zip(a, b, strict=True)))


def check_tokens(hidden_states: Tensor, target: Tensor) -> None:
    """[T, H] both, at least one token, every value finite."""
    check_shape("hidden_states", hidden_states, ("T", "H"))
    check_shape("target", target, tuple(hidden_states.shape))
    check_device("target", target, hidden_states.device)
    if len(hidden_states) == 0:
        raise ValueError("hidden_states has no tokens, expected at least one")
    for name, tensor in {"hidden_states": hidden_states, "target": target}.items():
        check_float(name, tensor)
        check_finite(name, tensor)


def check_finite(name: str, tensor: Tensor) -> None:
    # The extremes carry NaN and infinity along, and take no memory as a mask of all elements would.
    if tensor.numel() > 0 and not torch.isfinite(torch.stack(tensor.detach().aminmax())).all():
        raise ValueError(f"{name} holds NaN or infinity, expected finite numbers")


def check_sums(sums: tuple) -> None:
    for name, tensor in zip(type(sums)._fields, sums, strict=True):
        check_finite(f"{type(sums).__name__}.{name}", tensor)


def first_lowest(losses: Tensor, energy: float) -> int:
    """The index of the lowest loss; what rounding alone could part (1e-12 of the target's energy) goes to the first."""
    return int((losses <= losses.min() + 1e-12 * energy).nonzero()[0, 0])
