"""The shared expert as further experts computes what the model's own does, at any size."""

import pytest
import torch

from benchmarks import shared_expert


@pytest.mark.parametrize("dtype", shared_expert.DTYPES, ids=str)
def test_both_ways_compute_the_same_and_have_a_row(dtype: torch.dtype) -> None:
    layer = shared_expert.Layer(dtype, hidden=32, experts=6, width=16)
    found = list(shared_expert.rows(layer, (1, 9), 1))  # holds one against the other first
    assert [row[:2] for row in found] == [[n, str(dtype).removeprefix("torch.")] for n in ("1", "9")]


def test_a_wrong_one_is_noticed() -> None:
    layer = shared_expert.Layer(torch.float32, hidden=32, experts=6, width=16)
    layer.shared_down[0] += 1
    with pytest.raises(AssertionError, match="joined differs from apart"):
        layer.check()
