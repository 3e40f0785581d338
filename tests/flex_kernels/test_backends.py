"""All backends offer the same: for every stage, functions of the same names, parameters and annotations."""

import inspect
from types import ModuleType

import pytest
from torch import Tensor

from flex_kernels import plan
from flex_kernels.backends import native, pytorch
from flex_kernels.backends.call import LayerCall, Needs
from flex_kernels.backends.triton import stages

STAGES = {
    "routing_plan": ("routing_plan",),
    "experts": ("experts_fwd", "preactivations_fwd", "experts_bwd"),
    "score": ("score_experts", "score_neurons"),
    "grafted_route": ("grafted_route_fwd",),
    "route": ("route_fwd", "route_bwd"),
    "graft_logits": ("graft_logits_fwd", "graft_logits_bwd"),
    "combine": ("combine_fwd", "combine_bwd"),
}
OFFERED = {pytorch: tuple(STAGES), native: tuple(native.STAGES), stages: plan.TRITON_STAGES}


@pytest.mark.parametrize("backend", OFFERED, ids=lambda module: module.__name__.rpartition(".")[2])
def test_the_same_signatures(backend: ModuleType) -> None:
    for stage in OFFERED[backend]:
        for name in STAGES[stage]:
            assert inspect.signature(getattr(backend, name)) == inspect.signature(getattr(pytorch, name)), name


def test_triton_offers_nothing_else() -> None:
    assert sorted(stages.__all__) == sorted(name for names in STAGES.values() for name in names)


def test_what_a_call_needs_of_the_experts() -> None:
    rows = (Tensor(),) * 6
    for needs, additive, convex in (
        (Needs(True, False, False, False), True, True),
        (Needs(False, True, False, False), True, True),
        (Needs(False, False, True, False), False, False),
        (Needs(False, False, True, True), False, True),
    ):
        assert LayerCall(*rows, *rows[:3], needs=needs).routed == additive
        assert LayerCall(*rows, *rows[:3], combine="convex", needs=needs).routed == convex
    without_graft = LayerCall(*rows, combine="convex").contiguous()
    assert without_graft.needs == Needs(graft=False, graft_logits=False)
    assert not without_graft.convex
