"""Secure aggregation, what both sides know of it: the numbers under the mask, the mask, and what is asked when.

The server learns sum_k p_k (w_k - w) and no single update. SecAgg+ in four exchanges, the first of which is the round's
turn itself:

    train    with a `mask` record: the site trains, keeps its change p_k (w_k - w), clipped and found finite, and
             answers with two public keys, its update's norm and its change's largest number
    shares   the keys of all; answered with shares of the site's secrets, encrypted for every other site
    mask     the shares that others made for this site, and the range of the numbers; answered with the masked change
    unmask   who answered and who did not; answered with shares of the former's mask seeds and the latter's keys

Keys, shares and their encryption are Flower's own client functions. The masks are not: Flower draws them from a
Mersenne Twister with a seed of 32 bits, which a server can try one by one. Here a mask is the output of SHAKE-128 on
the whole key.

A number x of a change becomes rint(x / range * levels) modulo 2**32, with levels = (2**31 - 1) // sites, so that the
sum of all stays within a signed 32-bit number. That is 4 bytes a number, as without masks, and masks cancel exactly:
the sum depends neither on keys nor on who else was there, and a run that is resumed gives the same bits.
"""

import hashlib
import math
from collections.abc import Mapping

import numpy as np

from flex.errors import FlexError, require
from flex.federation.messages import Arrays

MASK = "mask"  # the record of the protocol in a message or reply
MASKED = "masked"  # the ArrayRecord of masked numbers
SHARES, COLLECT, UNMASK = "shares", "mask", "unmask"  # what is asked after the turn, in this order
FEWEST = 3  # with two, each knows the other's update from the sum and its own
UPDATE_NORM, LARGEST = "update-norm", "largest-change"


def threshold_of(num_sites: int) -> int:
    """How many sites' shares open a secret: more than half, so that no two groups can be asked for different ones."""
    return num_sites // 2 + 1


def levels_of(num_sites: int) -> int:
    """Steps from 0 to the end of the range, such that a sum over all sites is a signed 32-bit number."""
    return (2**31 - 1) // num_sites


def encode(change: np.ndarray, limit: float, levels: int) -> np.ndarray:
    """float32 numbers up to `limit` -> uint32, two's complement, rounded to the nearest level."""
    steps = np.rint(change.astype(np.float64) / limit * levels) if limit else np.zeros(change.shape)
    return np.asarray(steps).astype(np.int64).astype(np.uint32)


def decode(total: np.ndarray, limit: float, levels: int) -> np.ndarray:
    """The sum of encoded numbers -> float64."""
    return total.astype(np.uint32).view(np.int32).astype(np.float64) * limit / levels


def error_bound(num_sites: int, size: int, limit: float, levels: int) -> float:
    """The largest Euclidean length of what rounding can do to the sum of `num_sites` changes of `size` numbers."""
    return num_sites * math.sqrt(size) * 0.5 * limit / levels


def mask_of(key: bytes, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The mask of one tensor, uint32: the output of SHAKE-128 on the key and the tensor's name."""
    count = math.prod(shape)
    stream = hashlib.shake_128(b"flex mask/" + key + b"/" + name.encode()).digest(4 * count)
    return np.frombuffer(stream, dtype="<u4").astype(np.uint32).reshape(shape)


def add_mask(numbers: Arrays, key: bytes, sign: int) -> None:
    """Adds (1) or takes off (-1) the mask of `key`, in place, modulo 2**32."""
    for name, array in numbers.items():
        # `asarray`: of a tensor without dimensions numpy makes a scalar, which warns where it goes round.
        numbers[name] = np.asarray((np.add if sign > 0 else np.subtract)(array, mask_of(key, name, array.shape)))


def sign_of_pair(own: int, other: int) -> int:
    """Of two sites the one with the higher number adds their common mask, the other takes it off."""
    return 1 if own > other else -1


def clipped(update: Arrays, start: Arrays, bound: float, sender: str) -> tuple[Arrays, float]:
    """(change, norm): w_k - w in float64, scaled down to `bound` (0: none) where it is longer; its length before that.

    Raises:
        FlexError: the update is not finite; under a mask nobody else would see it.
    """
    change = {name: update[name].astype(np.float64) - start[name] for name in start}
    for name, array in change.items():
        require(bool(np.isfinite(array).all()), f"{sender} has NaN or infinite values in its update of {name!r}")
    norm = math.sqrt(sum(float(np.vdot(array, array)) for array in change.values()))
    scale = bound / norm if bound and norm > bound else 1.0
    return {name: scale * array for name, array in change.items()}, norm


def largest(change: Mapping[str, np.ndarray]) -> float:
    """The largest number of a change, without its sign."""
    return max((float(np.abs(array).max(initial=0.0)) for array in change.values()), default=0.0)


def check_range(change: Mapping[str, np.ndarray], limit: float, levels: int, num_sites: int) -> None:
    """Raises FlexError where numbers would not fit: the sum would come out wrong and nobody could tell."""
    if not math.isfinite(limit) or largest(change) > limit * (1 + 1e-6):
        raise FlexError(f"the range of the masked numbers is {limit}; expected at least {largest(change):.4g}")
    if not 1 <= levels <= levels_of(num_sites):
        raise FlexError(f"the masked numbers have {levels} levels; expected 1 to {levels_of(num_sites)}")
