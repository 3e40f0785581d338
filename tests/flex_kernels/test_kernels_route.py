"""The Triton routing plan, and the router on logits that are no numbers."""

import pytest
import torch
from cases import DEVICE

from flex_kernels import plan, reference
from flex_kernels.backends.triton import route
from flex_kernels.backends.triton import routing_plan as triton_plan
from flex_kernels.backends.triton.routing_plan import routing_plan

pytestmark = pytest.mark.skipif(
    not (plan.INTERPRET or torch.cuda.is_available()), reason="Triton needs a GPU or TRITON_INTERPRET=1"
)


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "highest_id"),
    [
        pytest.param(32, 2, 4, 3, id="one-block"),
        pytest.param(33, 2, 4, 3, id="a-pair-more"),
        pytest.param(20, 2, 60, 63, id="one-block-and-sentinels"),
        pytest.param(3, 8, 128, 127, id="one-block-many-experts"),
        pytest.param(300, 2, 60, 59, id="several-blocks"),
        pytest.param(300, 2, 60, 63, id="sentinels"),
        pytest.param(40, 8, 128, 127, id="more-experts-than-a-rank-table-is-wide"),
        pytest.param(5, 1, 1, 0, id="one-expert"),
        pytest.param(100, 1, 3, 0, id="all-to-one"),
        pytest.param(0, 2, 4, 3, id="no-tokens"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_routing_plan(num_tokens: int, top_k: int, num_experts: int, highest_id: int, dtype: torch.dtype) -> None:
    indices = torch.randint(0, highest_id + 1, (num_tokens, top_k), dtype=dtype, device=DEVICE)
    for ours, wanted in zip(
        routing_plan(indices, num_experts), reference.routing_plan(indices, num_experts), strict=True
    ):
        assert ours.dtype == wanted.dtype
        assert torch.equal(ours, wanted)


def test_a_plan_of_few_pairs_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_plan, "_count_pairs_kernel", None)
    routing_plan(torch.zeros(16, 4, dtype=torch.int64, device=DEVICE), 6)
    with pytest.raises(TypeError, match="not subscriptable"):
        routing_plan(torch.zeros(300, 4, dtype=torch.int64, device=DEVICE), 6)


def test_indices_stay_in_range_whatever_the_logits() -> None:
    logits = torch.randn(4, 6, device=DEVICE)
    logits[0] = float("nan")
    logits[1] = -float("inf")
    logits[2, 1:] = -float("inf")
    _, indices = route.route_fwd(logits, 3, False)
    assert indices.min() >= 0
    assert indices.max() < 6
    assert indices[2].tolist() == [0, 1, 2]
