"""What the experts' kernels promise below the operations: tiles, schedules, both ways of reading, and far rows.

`test_experts.py` holds the operations against the reference on every backend; here the launchers run by themselves.
"""

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from cases import DEVICE, DTYPES, Case, expert_indices, layer_inputs
from compare import assert_double_rule, double, exact, forward_and_grads
from torch import Tensor

from flex_kernels import plan, reference
from flex_kernels.backends.call import LayerCall, Needs
from flex_kernels.backends.triton import experts_bwd, experts_fwd, grouped, launch, stages, tiles

pytestmark = pytest.mark.skipif(
    not (plan.INTERPRET or torch.cuda.is_available()), reason="Triton needs a GPU or TRITON_INTERPRET=1"
)
CASES = (
    Case("several-tiles", 70, 2, 96, 80, 3, 72, "row, column and inner tiles in the plural, each with a tail"),
    Case("even", 40, 2, 64, 64, 4, 64, "all sizes multiples of their tiles: the paths without masks"),
    Case("uneven-graft", 20, 2, 64, 64, 4, 40, "only the graft's width leaves a tail"),
)
FAR = 2**25  # times 64 columns: just past 2^31 elements
PLAIN_EXPERTS = (3, 4)


def forward_and_backward(inputs: list, d_out: Tensor, combine: str) -> list[Tensor | None]:
    """The launchers, and their results in the order of `compare.NAMES`."""
    hidden_states, indices, weights, gate_up, down, *graft = inputs
    pairs, _, offsets = reference.routing_plan(indices, gate_up.shape[0])
    call = LayerCall(hidden_states, pairs, offsets, weights, gate_up, down, *graft, combine)
    out, *saved = stages.experts_fwd(call, True)
    d_hidden, d_weights, *d_graft = stages.experts_bwd(d_out, call, *saved)
    return [out, d_hidden, d_weights, None, None, *d_graft]


@pytest.fixture
def target() -> Iterator[None]:
    yield
    launch.force_target(None)


@pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_ways_of_reading(
    case: Case, dtype: torch.dtype, descriptors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not descriptors:
        for module in (experts_fwd, experts_bwd, grouped):
            monkeypatch.setattr(module, "use_tma", lambda *_: False)
    inputs, d_out = layer_inputs(case, dtype), torch.randn(case.num_tokens, case.hidden_size).to(DEVICE, dtype)
    plain = forward_and_grads(reference.grafted_experts, inputs, d_out, PLAIN_EXPERTS, combine="convex")
    with exact():
        truth = forward_and_grads(
            reference.grafted_experts, double(inputs), d_out.double(), PLAIN_EXPERTS, combine="convex"
        )
    assert_double_rule(forward_and_backward(inputs, d_out, "convex"), plain, truth, dtype)


def test_preactivations_alone_are_the_same_bits() -> None:
    hidden_states, indices, weights, gate_up, down, *graft = layer_inputs(CASES[0])
    pairs, _, offsets = reference.routing_plan(indices, gate_up.shape[0])
    call = LayerCall(hidden_states, pairs, offsets, weights, gate_up, down, *graft)
    _, *kept = stages.experts_fwd(call, True)
    again = stages.preactivations_fwd(call)
    for a, b in zip(kept, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not plan.INTERPRET, reason="forces the interpreter's target")
def test_bits_do_not_depend_on_the_number_of_programs(target: None) -> None:
    inputs, d_out = layer_inputs(CASES[0]), torch.randn(70, 96)
    results = []
    for num_processors in (1, 5, 10_000):
        launch.force_target(launch.Target("interpreter", num_processors))
        results.append(forward_and_backward(inputs, d_out, "additive"))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("routing", ["random", "two", "last", "sentinels", "elsewhere"])
def test_schedule_covers_every_row_once(routing: str, block_m: int) -> None:
    case = Case("schedule", 50, 2, 0, 0, 7, 0, "50 tokens", routing)
    pairs, counts, offsets = (x.to(DEVICE) for x in reference.routing_plan(expert_indices(case), case.num_experts))
    schedule = grouped.make_schedule(pairs, offsets, case.num_tokens, block_m)
    num_rows = int(offsets[-1])
    visits, expert_of_row = torch.zeros(num_rows, dtype=torch.int64), torch.full((num_rows,), -1)
    for expert, first, end in schedule.row_tiles[:, : int(schedule.num_row_tiles)].T.tolist():
        assert 0 < end - first <= block_m
        visits[first:end] += 1
        expert_of_row[first:end] = expert
    assert visits.eq(1).all()
    assert expert_of_row.tolist() == torch.repeat_interleave(torch.arange(7), counts.cpu()).tolist()
    rows = torch.arange(len(pairs), device=DEVICE, dtype=torch.int32)
    assert torch.equal(schedule.row_of_pair[pairs.long()], torch.where(rows < num_rows, rows, -1))


@triton.jit
def _visit_kernel(visits_ptr, row_tiles_ptr, num_row_tiles, num_columns, graft_row_tiles, graft_columns, num_tiles):
    for tile in range(num_tiles):
        expert, first_row, end_row, column = grouped.locate_tile(
            tile, row_tiles_ptr, num_row_tiles, num_row_tiles, num_columns,
            graft_row_tiles, graft_columns, 1000, 99, BLOCK_M=16, GROUP_M=4,
        )  # fmt: skip
        place = visits_ptr + tile * 4
        tl.store(place, expert)
        tl.store(place + 1, first_row)
        tl.store(place + 2, end_row)
        tl.store(place + 3, column)


@pytest.mark.parametrize(("num_row_tiles", "graft_row_tiles"), [(11, 3), (1, 0), (0, 5), (4, 4)])
def test_every_tile_is_found_once(num_row_tiles: int, graft_row_tiles: int) -> None:
    num_columns, graft_columns = 3, 2
    experts_of_tiles = torch.arange(num_row_tiles, dtype=torch.int32, device=DEVICE)
    row_tiles = torch.stack([experts_of_tiles, experts_of_tiles * 10, experts_of_tiles * 10 + 7])
    num_tiles = num_row_tiles * num_columns + graft_row_tiles * graft_columns
    visits = torch.empty(num_tiles, 4, dtype=torch.int32, device=DEVICE)
    _visit_kernel[(1,)](visits, row_tiles, num_row_tiles, num_columns, graft_row_tiles, graft_columns, num_tiles)
    routed = {(e, 10 * e, 10 * e + 7, c) for e in range(num_row_tiles) for c in range(num_columns)}
    graft = {(99, 16 * g, 1000, c) for g in range(graft_row_tiles) for c in range(graft_columns)}
    assert sorted(map(tuple, visits.tolist())) == sorted(routed | graft)


@pytest.fixture
def untouched_memory() -> Iterator[None]:
    """`torch.empty` hands out pages that nobody touches: tensors larger than the machine's memory cost nothing."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


def far_schedule(num_rows: int) -> grouped.Schedule:
    """The only rows anybody computes are the last few, past 2^31 elements."""
    row_tiles = torch.tensor([[1], [FAR + 3], [num_rows]], dtype=torch.int32, device=DEVICE)
    one = torch.ones(1, dtype=torch.int32, device=DEVICE)
    return grouped.Schedule(row_tiles, one, one, num_tokens=8, num_rows=num_rows, block_m=32)


@pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
def test_rows_past_two_to_the_31(descriptors: bool, untouched_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if not descriptors:
        for module in (experts_fwd, experts_bwd, grouped):
            monkeypatch.setattr(module, "use_tma", lambda *_: False)
    dtype, num_rows = torch.float16, FAR + 20
    new = {"dtype": dtype, "device": DEVICE}
    here = slice(FAR + 3, num_rows)
    schedule, target = far_schedule(num_rows), launch.target_of(torch.device(DEVICE))
    tile = tiles.expert_tiles(target, dtype, 100, 2, (64, 32)).gate_up
    schedule = grouped.Schedule(**{**vars(schedule), "block_m": tile.block_m})

    # Down: rows [R, 64] by [64, 64].
    rows, weights = torch.empty(num_rows, 64, **new), torch.randn(2, 64, 64).to(**new)
    rows[here] = torch.randn(17, 64).to(**new)
    out = grouped.grouped_rows(rows, None, weights, None, schedule, target, tile, inner_last=True)
    torch.testing.assert_close(out[here], rows[here] @ weights[1].T, rtol=1e-2, atol=5e-2)

    # Gate-up: Z is [R, 2 * 32].
    hidden_states, pairs = torch.randn(8, 64).to(**new), torch.empty(num_rows, dtype=torch.int32, device=DEVICE)
    pairs[here] = torch.arange(17, dtype=torch.int32) % 16
    tokens = (pairs[here] // 2).long()
    gate_up = (torch.randn(2, 64, 64) / 8).to(**new)
    activations, _, z, _ = experts_fwd.gate_up_fwd(
        hidden_states, pairs, 2, gate_up, None, schedule, target, tile, "silu", save_preactivations=True
    )
    gate, up = (hidden_states[tokens] @ gate_up[1].T).chunk(2, dim=1)
    torch.testing.assert_close(z[here], torch.cat([gate, up], dim=1), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(activations[here], torch.nn.functional.silu(gate) * up, rtol=1e-2, atol=1e-2)

    # Backward of the activation: dZ is [R, 2 * 32].
    down, d_out, routing_weights = torch.randn(2, 64, 32).to(**new), torch.randn(8, 64).to(**new), torch.rand(8, 2)
    needs = Needs(graft=False, graft_logits=False)
    call = LayerCall(hidden_states, pairs, pairs[:3], routing_weights.to(DEVICE), gate_up, down, needs=needs)
    d_z, *_ = experts_bwd.d_preactivations(call, d_out, z, z[:0], schedule, target, tile)
    saved = z[here].float().requires_grad_()
    gate, up = saved.chunk(2, dim=1)
    scale = call.routing_weights.flatten()[pairs[here].long()][:, None]
    (torch.nn.functional.silu(gate) * up).backward(scale * (d_out[tokens].float() @ down[1].float()))
    torch.testing.assert_close(d_z[here].float(), saved.grad, rtol=1e-2, atol=1e-2)
