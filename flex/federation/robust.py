"""What one site of several can not own: the middle of the clients' values, number by number.

    mean           sum_k n_k w_k / sum_k n_k: one site moves it as far as its values are away
    median         of the w_k, each counted once; for an even number of them the mean of the middle two
    trimmed-mean   the mean of what is left when the `trim` share of the highest and of the lowest values (rounded up,
                   but never all of them) is taken off

Median and trimmed mean stay within the range of the honest values while fewer than half, or fewer than what is trimmed
at an end, are wrong. They count every site once, whatever number of examples it reports. With fewer than three replies
nobody can be outvoted, and all three are a mean.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from flex.federation.messages import Arrays, weighted_mean

if TYPE_CHECKING:
    from flex.federation.flower import Array

FEWEST = 3  # sites a round below which nobody can be outvoted
TRIM = 0.2  # share taken off at each end, unless strategy.trim says another


def center(
    updates: Sequence[Mapping[str, "Array"]], sizes: Sequence[float], aggregate: str = "mean", trim: float = TRIM
) -> Arrays:
    """The middle of the clients' tensors, by name, float32.

    Args:
        sizes: the weights of a mean.
        aggregate: one of `config.AGGREGATES`.
        trim: share of the values that `trimmed-mean` takes off at each end.
    """
    if aggregate == "mean":
        return weighted_mean(updates, sizes)
    return {
        name: middle(np.stack([update[name].numpy() for update in updates]), aggregate, trim) for name in updates[0]
    }


def middle(values: np.ndarray, aggregate: str, trim: float = TRIM) -> np.ndarray:
    """Median or trimmed mean over the first axis of `values` [clients, ...], in their dtype."""
    if aggregate == "median":
        return np.asarray(np.median(values, axis=0), dtype=values.dtype)
    cut = min(math.ceil(trim * len(values)), (len(values) - 1) // 2)
    return np.asarray(np.sort(values, axis=0)[cut : len(values) - cut].mean(axis=0), dtype=values.dtype)
