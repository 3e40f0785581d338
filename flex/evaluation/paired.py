"""Is one method better than another? The paired sign-flip test, and what is to be said when several are compared."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

EXACT = 15  # pairs up to which every pattern of signs is looked at; beyond, so many drawn ones are
DRAWN = 100_000
KEPT_PAIRS = 200  # up to so many pairs the drawn signs stay in memory for the next comparison
LEVEL = 0.05
FEWEST_SEEDS = 3  # for a verdict

Pair = tuple[int, str]  # seed, client


@dataclass(frozen=True)
class PairedTest:
    """What pairs of scores say. `low`, `high`: the 95 % interval of the mean, None where the pairs are too few to bound
    it; `ahead`: in how many seeds the first has the higher mean."""

    mean: float
    low: float | None
    high: float | None
    p: float
    ahead: int
    num_seeds: int
    num_pairs: int


def paired_test(first: dict[Pair, float], second: dict[Pair, float]) -> PairedTest | None:
    """Compares two methods on the pairs (seed, client) that both have, with the same data and seed each.

    The p-value is of the two-sided sign-flip test: the share of patterns of signs that make the mean difference at
    least as far from zero; exact up to 15 pairs, 100,000 drawn patterns beyond. The interval holds the means that the
    same test would not reject at 5 %. Clients of one seed share what is averaged, so the pairs are not quite
    independent: in how many seeds the first is ahead stands beside, and fewer than three seeds settle nothing.

    Returns:
        None where the two have no pair in common, or a score is not finite.
    """
    common = sorted(first.keys() & second.keys())
    differences = np.array([first[pair] - second[pair] for pair in common])
    if not common or not np.isfinite(differences).all():
        return None
    seeds = sorted({seed for seed, _ in common})
    by_seed = [np.mean([d for d, (own, _) in zip(differences, common, strict=True) if own == seed]) for seed in seeds]
    flipped, whole = _flips(differences)
    low, high = _interval(differences, flipped, whole)
    return PairedTest(
        mean=float(differences.mean()),
        low=low,
        high=high,
        p=_p(differences, flipped, whole, 0.0),
        ahead=sum(value > 0 for value in by_seed),
        num_seeds=len(seeds),
        num_pairs=len(common),
    )


def smallest_p(num_pairs: int) -> float:
    """The smallest p-value that so many pairs can give."""
    return 2.0 ** (1 - num_pairs) if num_pairs <= EXACT else 1 / DRAWN


def sign_flip(differences: np.ndarray) -> float:
    """The p-value alone, see `paired_test`."""
    return _p(differences, *_flips(differences), 0.0)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values for all of several comparisons together (Holm 1979): if all that are at most 5 % are called real, the
    chance that any of them is not is at most 5 %."""
    adjusted, highest = [0.0] * len(ps), 0.0
    for place, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        highest = max(highest, min(1.0, (len(ps) - place) * ps[index]))
        adjusted[index] = highest
    return adjusted


def _flips(differences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each pattern of signs: the sum of the differences with these signs, and the sum of the signs."""
    parts = [(signs @ differences, signs.sum(1)) for signs in _patterns(len(differences))]
    return np.concatenate([flipped for flipped, _ in parts]), np.concatenate([whole for _, whole in parts])


def _patterns(count: int) -> Iterable[np.ndarray]:
    """[patterns, count] of +1 and -1, in parts; the first is that of the data."""
    return _kept_patterns(count) if count <= KEPT_PAIRS else _drawn_patterns(count)


@lru_cache(maxsize=4)
def _kept_patterns(count: int) -> list[np.ndarray]:
    if count <= EXACT:
        return [np.array(list(itertools.product((1.0, -1.0), repeat=count)))]
    return list(_drawn_patterns(count))


def _drawn_patterns(count: int, rows: int = 10_000) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    for part in range(DRAWN // rows):
        signs = rng.choice((1.0, -1.0), size=(rows, count))
        if part == 0:
            signs[0] = 1
        yield signs


def _p(differences: np.ndarray, flipped: np.ndarray, whole: np.ndarray, shift: float) -> float:
    """The p-value of the differences minus `shift`."""
    sums = np.abs(flipped - shift * whole)
    return float((sums >= abs(differences.sum() - shift * len(differences)) - 1e-12).mean())


def _interval(differences: np.ndarray, flipped: np.ndarray, whole: np.ndarray) -> tuple[float | None, float | None]:
    """The shifts that are not rejected: p falls from 1 at the mean towards the smallest that these pairs can give."""
    mean, reach = float(differences.mean()), float(np.ptp(differences)) or abs(float(differences.mean())) or 1.0
    ends: list[float | None] = []
    for direction in (-1, 1):
        inside, outside = mean, mean + direction * 10 * reach
        if _p(differences, flipped, whole, outside) > LEVEL:
            ends.append(None)
            continue
        for _ in range(50):
            middle = (inside + outside) / 2
            if _p(differences, flipped, whole, middle) > LEVEL:
                inside = middle
            else:
                outside = middle
        ends.append(inside)
    return ends[0], ends[1]
