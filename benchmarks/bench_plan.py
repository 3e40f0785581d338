"""The routing plan in C++ beside `torch.sort` + `bincount` and beside PyTorch's whole plan; the best round counts.

`flex` is what `plan.py` chooses on a CPU. `sort + bincount` is the part of the plan that PyTorch has as functions;
`torch` is all of it (`pytorch.routing_plan`), what runs where nothing could be built.
"""

from functools import partial

import pytest
import torch

from benchmarks.gpu.plan_part import sort_and_bincount
from benchmarks.results import PlanRow
from benchmarks.shapes import Shape
from flex_kernels import plan, reference
from flex_kernels.backends import pytorch

ROUNDS = 200


@pytest.mark.parametrize("provider", ["flex", "sort + bincount", "torch"])
def test_plan(plan_shape: Shape, provider: str, benchmark, plan_rows: list[PlanRow]) -> None:
    shape = plan_shape
    indices = torch.rand(shape.num_tokens, shape.num_experts).topk(shape.top_k).indices
    makers = {
        "flex": plan.cpu_backend("routing_plan", torch.float32).routing_plan,
        "sort + bincount": sort_and_bincount,
        "torch": pytorch.routing_plan,
    }
    if provider != "sort + bincount":
        truth = reference.routing_plan(indices, shape.num_experts)
        for ours, wanted in zip(makers[provider](indices, shape.num_experts), truth, strict=True):
            assert torch.equal(ours, wanted), "not the reference's plan"
    run = partial(makers[provider], indices, shape.num_experts)
    if not benchmark.enabled:
        benchmark(run)
        return
    benchmark.group = f"{shape.name} plan"
    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=5)
    plan_rows.append(PlanRow(shape, provider, benchmark.stats.stats.min))
