"""The sign-flip test, its interval, and Holm's correction, against counts that can be made by hand."""

import itertools

import numpy as np
import pytest

from flex.evaluation.paired import holm, paired_test, sign_flip


def scores(*by_seed: list[float]) -> dict:
    return {(seed, f"client {i}"): v for seed, values in enumerate(by_seed) for i, v in enumerate(values)}


def test_p_counts_the_patterns_that_are_as_far_from_zero() -> None:
    # Of the eight patterns of (1, 2, 4): sums ±7 alone are as far as 7.
    assert sign_flip(np.array([1.0, 2.0, 4.0])) == pytest.approx(2 / 8)
    assert sign_flip(np.array([1.0, 2.0, -4.0])) == pytest.approx(8 / 8)  # |sum| is 1, the least there is
    assert sign_flip(np.array([2.0, 2.0, -1.0])) == pytest.approx(4 / 8)  # |sum| 3; the others are 5, 3, 1, 1
    assert sign_flip(np.zeros(4)) == 1


def test_many_pairs_are_drawn_and_come_near_the_exact_value() -> None:
    differences = np.random.default_rng(3).normal(0.5, 1, 16)
    signs = np.array(list(itertools.product((1, -1), repeat=16)))
    exact = (np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12).mean()
    assert sign_flip(differences) == pytest.approx(exact, abs=0.005)
    assert sign_flip(differences) == sign_flip(differences)


def test_pairs_are_of_one_seed_and_client() -> None:
    first, second = scores([3, 5], [4, 4], [9, 9]), scores([1, 2], [5, 5])
    test = paired_test(first, second)
    assert (test.num_pairs, test.num_seeds, test.ahead) == (4, 2, 1)
    assert test.mean == pytest.approx((2 + 3 - 1 - 1) / 4)
    assert paired_test(second, first).mean == -test.mean
    assert paired_test(first, {(7, "client 0"): 1.0}) is None
    assert paired_test(first, {(0, "client 0"): float("nan")}) is None


def test_the_interval_holds_what_the_test_does_not_reject() -> None:
    differences = np.random.default_rng(5).normal(2, 1, 12)
    test = paired_test(scores(list(differences)), scores([0.0] * 12))
    assert test.low < differences.mean() < test.high
    assert sign_flip(differences - test.low) > 0.05 >= sign_flip(differences - test.low + 1e-3)
    assert sign_flip(differences - test.high) > 0.05 >= sign_flip(differences - test.high - 1e-3)
    standard = differences.std(ddof=1) / 12**0.5
    assert test.high - test.low == pytest.approx(2 * 2.2 * standard, rel=0.15)  # as the t interval of eleven degrees


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng, inside = np.random.default_rng(0), 0
    for _ in range(200):
        test = paired_test(scores(list(rng.normal(1, 2, 8))), scores([0.0] * 8))
        inside += test.low <= 1 <= test.high
    assert 0.9 <= inside / 200 <= 0.99


def test_five_pairs_bound_nothing() -> None:
    test = paired_test(scores([1, 2, 3, 4, 5]), scores([0] * 5))
    assert test.p == pytest.approx(2 / 32)
    assert test.low is test.high is None


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1, 1])
    assert holm([]) == []
