"""`flex::routing_plan`: the native counting sort, and its twins in plain torch, against the specification."""

import warnings
from collections.abc import Callable

import pytest
import torch
from cases import CASES, DEVICE, Case, expert_indices
from torch import Tensor

import flex_kernels
from flex_kernels import plan, reference
from flex_kernels.backends import native, pytorch

PLANNERS = [flex_kernels.routing_plan, pytorch.routing_plan]
if plan.INTERPRET or DEVICE == "cuda":
    from flex_kernels.backends.triton.routing_plan import routing_plan as triton_routing_plan

    PLANNERS.append(triton_routing_plan)
planners = pytest.mark.parametrize("planner", PLANNERS, ids=["op", "torch", "triton"][: len(PLANNERS)])


def assert_same(ours: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours, want, strict=True):
        assert a.dtype == torch.int32
        assert torch.equal(a.cpu(), b.cpu())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@planners
def test_equals_the_reference(planner: Callable, case: Case, dtype: torch.dtype) -> None:
    ids = expert_indices(case).to(DEVICE, dtype)
    assert_same(planner(ids, case.num_experts), reference.routing_plan(ids, case.num_experts))


@planners
def test_a_large_plan_is_a_permutation_in_order(planner: Callable) -> None:
    ids = torch.randint(0, 61, (9001, 4), device=DEVICE)  # id 60 is a sentinel
    pairs, counts, offsets = planner(ids, 60)
    assert torch.equal(pairs.long().sort().values, torch.arange(ids.numel(), device=DEVICE))
    by_expert = ids.flatten()[pairs.long()]
    assert (by_expert.diff() >= 0).all()
    same = by_expert.diff() == 0
    assert (pairs.diff()[same] > 0).all()  # stable: pairs of one expert stay in order
    assert torch.equal(offsets.diff(), counts)
    assert int(offsets[-1]) == int((ids < 60).sum())


@pytest.mark.parametrize("shape", [(0, 2), (0, 1), (1, 1)])
@planners
def test_next_to_nothing(planner: Callable, shape: tuple[int, int]) -> None:
    ids = torch.zeros(shape, dtype=torch.int64, device=DEVICE)
    assert_same(planner(ids, 3), reference.routing_plan(ids, 3))


@planners
def test_ids_of_any_stride(planner: Callable) -> None:
    ids = torch.randint(0, 5, (3, 40), device=DEVICE).T
    assert_same(planner(ids, 5), reference.routing_plan(ids, 5))
    same = torch.tensor([[2]], device=DEVICE).expand(6, 3)
    assert_same(planner(same, 5), reference.routing_plan(same, 5))


@planners
def test_an_id_far_out_of_range_is_another_ranks(planner: Callable) -> None:
    ids = torch.tensor([[2**62, 1]], device=DEVICE)
    pairs, counts, offsets = planner(ids, 2)
    assert pairs.tolist() == [1, 0]
    assert counts.tolist() == [0, 1]
    assert offsets.tolist() == [0, 0, 1]


@pytest.mark.skipif(DEVICE == "cpu", reason="on the CPU a negative id is an error")
@planners
def test_a_negative_id_is_skipped_on_a_gpu(planner: Callable) -> None:
    ids = torch.tensor([[0, -1], [1, 0]], device=DEVICE)
    assert_same(planner(ids, 2), reference.routing_plan(ids.where(ids >= 0, 2), 2))


@pytest.mark.skipif(DEVICE != "cpu", reason="on CUDA, where nobody can look, a negative id is skipped")
@pytest.mark.parametrize("planner", PLANNERS[:2], ids=["op", "torch"])
@pytest.mark.parametrize("bad", [-1, -(2**62)])
def test_a_negative_id_is_an_error_and_no_crash(planner: Callable, bad: int) -> None:
    with pytest.raises(ValueError, match=f"must not be negative, got {bad}"):
        planner(torch.tensor([[0, 1], [1, bad]]), 2)


@pytest.mark.parametrize(
    ("ids", "num_experts", "error", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), 2, ValueError, r"shape \[4\], expected \[T, K\]"),
        (torch.zeros(4, 2), 2, TypeError, "torch.float32, expected int64 or int32"),
        (torch.zeros(4, 2, dtype=torch.int64), 0, ValueError, "num_experts is 0"),
    ],
    ids=["shape", "dtype", "no experts"],
)
def test_bad_input(ids: Tensor, num_experts: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        flex_kernels.routing_plan(ids, num_experts)


def test_the_native_door_checks_before_it_hands_out_addresses() -> None:
    with pytest.raises(TypeError, match="expected int32 or int64 on the CPU"):
        native.routing_plan(torch.zeros(2, 2, device="meta", dtype=torch.int64), 2)


def test_opcheck() -> None:
    ids = torch.randint(0, 4, (7, 2), device=DEVICE)
    for given in (ids, ids.T.contiguous().T, ids[:1].expand(7, 2)):
        torch.library.opcheck(torch.ops.flex.routing_plan.default, (given, 4))


def test_compiles_whole() -> None:
    torch._dynamo.reset()
    ids = torch.randint(0, 4, (7, 2), device=DEVICE)
    compiled = torch.compile(flex_kernels.routing_plan, fullgraph=True, dynamic=True, backend="aot_eager")
    assert_same(compiled(ids, 4), reference.routing_plan(ids, 4))


def test_without_the_native_module_torch_takes_over_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(native.importlib, "import_module", missing)
    native.module.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="PyTorch computes instead") as record:
            plans = [flex_kernels.routing_plan(torch.tensor([[1, 0]]), 2) for _ in range(2)]
        assert len(record) == 1
        assert plans[0][0].tolist() == plans[1][0].tolist() == [1, 0]
    finally:
        monkeypatch.undo()
        native.module.cache_clear()
        with warnings.catch_warnings(action="ignore"):
            native.module()
