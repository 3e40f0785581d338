"""The shared expert by the fused operation computes what the model's own module does, at any size."""

import pytest
import torch

from benchmarks import shared_expert


@pytest.mark.parametrize("dtype", shared_expert.DTYPES, ids=str)
def test_all_ways_compute_the_same_and_have_a_row(dtype: torch.dtype) -> None:
    layer = shared_expert.Layer(dtype, hidden=32, experts=6, width=16)
    found = list(shared_expert.rows(layer, (1, 9), 1))  # holds one against the other first
    assert [row[:2] for row in found] == [[n, str(dtype).removeprefix("torch.")] for n in ("1", "9")]


def test_a_wrong_one_is_noticed() -> None:
    layer = shared_expert.Layer(torch.float32, hidden=32, experts=6, width=16)
    layer.shared.down_proj.data = layer.shared_down[None] + 1
    with pytest.raises(AssertionError, match="prepared differs from apart"):
        layer.check()
