"""Several experts as one graft: both rules against every subset, each run on its own through the reference."""

import itertools
import math
import time

import pytest
import torch
from cases import DEVICE
from memory import HAS_PEAK, Largest, peak_growth_bytes
from torch import Tensor

import flex_kernels
from flex_kernels import reference
from flex_kernels.selection import subsets
from flex_kernels.selection.subsets import ExpertGram, RenormalizedLosses, Subset, best_scaled_subset, expert_gram

TOKENS, HIDDEN, WIDTH, TOP_K = 23, 10, 6, 2
SIZES = [(5, 1), (7, 2), (12, 1), (12, 2), (12, 3), (3, 3)]


def layer(num_experts: int, num_tokens: int = TOKENS, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """hidden_states, target (what the routed layer gives), gate_up_proj, down_proj, router_logits."""
    x, router = torch.randn(num_tokens, HIDDEN), torch.randn(num_experts, HIDDEN)
    gate_up = torch.randn(num_experts, 2 * WIDTH, HIDDEN) * 0.5
    down = torch.randn(num_experts, HIDDEN, WIDTH) * torch.rand(num_experts, 1, 1)
    logits = 2 * x @ router.T
    weights, indices = reference.route(logits, min(TOP_K, num_experts), True)
    target = reference.grafted_experts(x, indices, weights, gate_up, down)
    return [tensor.to(DEVICE, dtype) for tensor in (x, target, gate_up, down, logits)]


def run_every_subset(inputs: list[Tensor], size: int, scaled: bool) -> dict[tuple[int, ...], float]:
    """Subset -> loss, one subset at a time: its experts, their weights (or best constants), the error's norm."""
    x, target, gate_up, down, logits = (tensor.double() for tensor in inputs)
    losses = {}
    for experts in itertools.combinations(range(len(gate_up)), size):
        outputs = torch.stack([reference.expert(x, gate_up[i], down[i]) for i in experts])  # [r, T, H]
        if scaled:
            columns = outputs.flatten(1).T
            constants = torch.linalg.lstsq(columns, target.flatten()[:, None]).solution
            out = (columns @ constants).view_as(target)
        else:
            weights = torch.softmax(logits[:, list(experts)], dim=1)  # [T, r]
            out = torch.einsum("tr,rth->th", weights, outputs)
        losses[experts] = float((target - out).square().sum())
    return losses


def added(inputs: list[Tensor], size: int, *cuts: int) -> RenormalizedLosses:
    losses = RenormalizedLosses(len(inputs[2]), size)
    x, target, gate_up, down, logits = inputs
    for a, b in itertools.pairwise((0, *cuts, len(x))):
        losses.add(x[a:b], target[a:b], gate_up, down, logits[a:b])
    return losses


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("num_experts", "size"), SIZES)
def test_constant_scales_by_enumeration(num_experts: int, size: int, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = layer(num_experts)
    enumerated = run_every_subset(inputs, size, scaled=True)
    best = best_scaled_subset(expert_gram(*inputs[:4]), size)
    assert best.experts == min(enumerated, key=enumerated.__getitem__)
    assert best.loss == pytest.approx(enumerated[best.experts], rel=1e-6)
    x, target, gate_up, down, _ = inputs
    out = sum(
        scale * reference.expert(x, gate_up[i], down[i]) for i, scale in zip(best.experts, best.scales, strict=True)
    )
    assert float((target - out).square().sum()) == pytest.approx(best.loss, rel=1e-6)  # the scales are what it says


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("num_experts", "size"), SIZES)
def test_the_papers_weights_by_enumeration(num_experts: int, size: int, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = layer(num_experts)
    enumerated = run_every_subset(inputs, size, scaled=False)
    ours = added(inputs, size)
    assert [tuple(row) for row in ours.subsets.tolist()] == list(enumerated)
    assert ours.losses().tolist() == pytest.approx(list(enumerated.values()), rel=1e-6)
    best = ours.best()
    assert best.experts == min(enumerated, key=enumerated.__getitem__)
    assert best.scales == (1.0,) * size
    assert best.loss == pytest.approx(enumerated[best.experts], rel=1e-6)


def test_a_summed_gram_would_not_do_for_the_papers_weights() -> None:
    """The reason for two rules: two experts whose tokens the router parts are together perfect, no constants are."""
    x, target, gate_up, down, logits = layer(3)
    down /= down.flatten(1).norm(dim=1)[:, None, None]  # none much louder than the other
    parted = torch.arange(TOKENS, device=DEVICE)[:, None] % 2
    target = torch.where(parted == 0, *(reference.expert(x, gate_up[i], down[i]) for i in (0, 1)))
    logits = torch.where(parted == 0, *(torch.tensor(row, device=DEVICE).double() for row in ([90, 0, 0], [0, 90, 0])))
    best = added([x, target, gate_up, down, logits], 2).best()
    assert best.experts == (0, 1)
    assert best.loss < 1e-12 * float(target.square().sum())
    sums = expert_gram(x, target, gate_up, down)
    assert best_scaled_subset(sums, 2).loss > 0.1 * float(sums.energy)


def test_one_expert_is_the_paper_for_one() -> None:
    inputs = layer(5)
    scores = flex_kernels.score_experts(*inputs[:4], torch.tensor([0, TOKENS], device=DEVICE))
    torch.testing.assert_close(added(inputs, 1).losses().float(), scores[0, :, 0])
    best = best_scaled_subset(expert_gram(*inputs[:4]), 1)
    assert best.loss == pytest.approx(float(flex_kernels.scaled(scores).min()), rel=1e-4)
    assert best.experts == (flex_kernels.choose(flex_kernels.scaled(scores)),)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
    ids=["fp32", "fp32-bf16", "bf16"],
)
def test_dtypes(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x, target, gate_up, down, logits = layer(6, dtype=dtype)
    rounded = [x, target, gate_up.to(weight_dtype), down.to(weight_dtype), logits]
    exact = [tensor.double() for tensor in rounded]
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    ours, truth = expert_gram(*rounded[:4]), expert_gram(*exact[:4])
    for a, b in zip(ours, truth, strict=True):
        assert a.dtype == torch.float64
        assert float((a - b).norm() / b.norm()) < tolerance
    torch.testing.assert_close(added(rounded, 2).losses(), added(exact, 2).losses(), rtol=2 * tolerance, atol=0)


def test_batches_add_up() -> None:
    inputs = layer(6)
    whole, parts = expert_gram(*inputs[:4]), None
    for a, b in [(0, 1), (1, 15), (15, TOKENS)]:
        part = expert_gram(inputs[0][a:b], inputs[1][a:b], *inputs[2:4])
        parts = part if parts is None else flex_kernels.merged(parts, part)
    assert isinstance(parts, ExpertGram)
    torch.testing.assert_close(tuple(parts), tuple(whole))
    torch.testing.assert_close(tuple(expert_gram(*inputs[:4], chunk=4)), tuple(whole))
    torch.testing.assert_close(added(inputs, 3, 1, 15).losses(), added(inputs, 3).losses())


def test_blocks_and_chunks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = layer(8)
    whole, best = added(inputs, 3).losses(), best_scaled_subset(expert_gram(*inputs[:4]), 3)
    monkeypatch.setattr(subsets, "BLOCK_NUMBERS", 50)  # a few subsets together
    monkeypatch.setattr(subsets, "MOST_TOKENS", 5)
    torch.testing.assert_close(added(inputs, 3).losses(), whole)
    again = best_scaled_subset(expert_gram(*inputs[:4]), 3)
    assert (again.experts, again.scales) == (best.experts, pytest.approx(best.scales))


def test_sixty_experts_need_fifty_times_fewer_evaluations_than_enumeration(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 0
    real = subsets.grafted_experts

    def counted(hidden_states: Tensor, expert_indices: Tensor, *args: Tensor, **options: str) -> Tensor:
        nonlocal rows
        rows += expert_indices.numel()
        return real(hidden_states, expert_indices, *args, **options)

    monkeypatch.setattr(subsets, "grafted_experts", counted)
    inputs = layer(60, num_tokens=7)
    for size in (2, 3):
        rows = 0
        losses = added(inputs, size)
        assert losses.num_tokens == 7
        assert rows == 60 * 7  # an expert applied to a token; enumeration would need `r` of them for every subset
        assert math.comb(60, size) * size * 7 >= 50 * rows
    picked = losses.subsets[[0, 777, 34_219]].tolist()  # and right, where looking at all of them takes too long
    for experts, loss in zip(picked, losses.losses()[[0, 777, 34_219]].tolist(), strict=True):
        own = [inputs[0], inputs[1], inputs[2][experts], inputs[3][experts], inputs[4][:, experts]]
        assert loss == pytest.approx(run_every_subset(own, 3, scaled=False)[0, 1, 2], rel=1e-6)


def test_every_triple_of_sixty_in_under_a_second() -> None:
    sums = expert_gram(*layer(60, num_tokens=40)[:4])
    seconds = []
    for _ in range(3):  # the best of three: the machine may be busy
        start = time.perf_counter()
        best_scaled_subset(sums, 3)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1


def test_twins_silent_experts_and_ties() -> None:
    x, target, gate_up, down, logits = layer(5)
    down[3] = 0  # silent
    gate_up[4], down[4] = gate_up[1], -2 * down[1]  # the same direction
    inputs = [x, target, gate_up, down, logits]
    sums = expert_gram(*inputs[:4])
    enumerated = run_every_subset(inputs, 1, scaled=True)
    for size in (1, 2, 3, 4, 5):
        best = best_scaled_subset(sums, size)
        assert all(math.isfinite(scale) for scale in best.scales)
        out = sum(s * reference.expert(x, gate_up[i], down[i]) for i, s in zip(best.experts, best.scales, strict=True))
        assert float((target - out).square().sum()) == pytest.approx(best.loss, rel=1e-6)
        if 1 in best.experts and size < 4:
            assert 4 not in best.experts  # nothing gained by it
    assert enumerated[1,] == pytest.approx(enumerated[4,])
    twins = [tensor[[1, 4]] for tensor in (gate_up, down)]
    assert best_scaled_subset(expert_gram(x, reference.expert(x, gate_up[1], down[1]), *twins), 1).experts == (0,)
    same = [gate_up[[1, 1, 1]], down[[1, 1, 1]], logits[:, [1, 1, 1]]]
    losses = RenormalizedLosses(3, 2)
    losses.add(x, target, *same)
    assert losses.best().experts == (0, 1)
    assert best_scaled_subset(ExpertGram(sums.gram * 0, sums.inner * 0, sums.energy), 2) == Subset(
        (0, 1), (0.0, 0.0), pytest.approx(float(sums.energy))
    )


def test_far_apart_logits_leave_one_expert() -> None:
    """Experts that the router finds out of the question still share the weight among themselves."""
    inputs = layer(4)
    inputs[4] = torch.tensor([0.0, -2000.0, -4000.0, -4000.0], device=DEVICE).expand(TOKENS, 4).double()
    losses = added(inputs, 2)
    enumerated = run_every_subset(inputs, 2, scaled=False)
    assert losses.losses().tolist() == pytest.approx(list(enumerated.values()), rel=1e-6)


@pytest.mark.parametrize("rule", ["constants", "paper"])
def test_memory_does_not_grow_with_the_tokens(rule: str, backend: str) -> None:
    num_experts, num_tokens = 6, 2100
    inputs = layer(num_experts, num_tokens, torch.float32)
    with Largest() as largest:
        if rule == "constants":
            expert_gram(*inputs[:4], chunk=64)
        else:
            added(inputs, 3)
    whole = num_tokens * num_experts * HIDDEN
    assert 0 < largest.numel < whole / 5


@pytest.mark.skipif(not HAS_PEAK or DEVICE != "cpu", reason="the peak is read from Linux, of memory on the CPU")
def test_peak_memory() -> None:
    body = (
        "flex_kernels.expert_gram(x, target, GATE_UP, DOWN); "
        "flex_kernels.RenormalizedLosses(40, 2).add(x, target, GATE_UP, DOWN, x[:, :40])"
    )
    growth = peak_growth_bytes(body, "native", num_tokens=16384, hidden_size=256, num_experts=40, width=16)
    assert growth < 16384 * 40 * 256 * 4 / 2  # [T, E, H] in fp32


def test_of_fewer_tokens_where_the_experts_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = layer(6)
    want = expert_gram(*inputs[:4])
    monkeypatch.setattr(subsets, "WORKING_BYTES", 1)
    with Largest() as largest:
        ours = expert_gram(*inputs[:4])
    assert largest.numel <= max(tensor.numel() for tensor in inputs)
    torch.testing.assert_close(tuple(ours), tuple(want))


def test_trained_weights_and_autocast_change_nothing() -> None:
    inputs = layer(4, dtype=torch.float32)
    want = expert_gram(*inputs[:4])
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = expert_gram(*(tensor.requires_grad_() for tensor in inputs[:4]))
    assert not ours.gram.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(ours, want, strict=True))


@pytest.mark.parametrize(
    ("size", "message"),
    [(0, "size is 0, expected 1 to 4"), (5, "size is 5, expected 1 to 4"), (-1, "size is -1, expected 1 to 4")],
)
def test_subsets_that_do_not_exist_are_refused(size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        best_scaled_subset(expert_gram(*layer(4)[:4]), size)
    with pytest.raises(ValueError, match=message):
        RenormalizedLosses(4, size)


def test_too_many_subsets_are_refused() -> None:
    with pytest.raises(
        ValueError, match="size is 5, expected one with at most 5,000,000 subsets; this one has 264,566,400"
    ):
        RenormalizedLosses(128, 5)


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_tokens_that_are_not_numbers_are_refused(position: int, value: float) -> None:
    inputs = layer(4)
    inputs[position][3, 2] = value
    message = f"{('hidden_states', 'target')[position]} holds NaN or infinity, expected finite numbers"
    with pytest.raises(ValueError, match=message):
        expert_gram(*inputs[:4])
    with pytest.raises(ValueError, match=message):
        added(inputs, 2)


def test_experts_that_are_not_numbers_are_refused() -> None:
    inputs = layer(4)
    inputs[3][2, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"ExpertGram.gram holds NaN or infinity"):
        best_scaled_subset(expert_gram(*inputs[:4]), 2)
    with pytest.raises(ValueError, match="the losses holds NaN or infinity"):
        added(inputs, 2).best()


def test_no_tokens_are_refused() -> None:
    inputs = layer(4, num_tokens=1)
    none = [inputs[0][:0], inputs[1][:0], *inputs[2:4], inputs[4][:0]]
    with pytest.raises(ValueError, match="hidden_states has no tokens, expected at least one"):
        expert_gram(*none[:4])
    losses = RenormalizedLosses(4, 2)
    with pytest.raises(ValueError, match="hidden_states has no tokens, expected at least one"):
        losses.add(*none)
    with pytest.raises(ValueError, match="no tokens were added, expected at least one"):
        losses.best()


def test_bad_shapes_are_refused() -> None:
    x, target, gate_up, down, logits = layer(4)
    with pytest.raises(ValueError, match="target has shape"):
        expert_gram(x, target[1:], gate_up, down)
    with pytest.raises(ValueError, match="gate_up_proj has shape"):
        expert_gram(x, target, gate_up[:, 1:], down)
    with pytest.raises(ValueError, match="chunk is 0, expected at least one token"):
        expert_gram(x, target, gate_up, down, chunk=0)
    with pytest.raises(ValueError, match="activation is 'relu', expected one of"):
        expert_gram(x, target, gate_up, down, activation="relu")
    with pytest.raises(ValueError, match=r"gate_up_proj has shape .* expected .5, 2I, H"):
        RenormalizedLosses(5, 2).add(x, target, gate_up, down, logits)
    with pytest.raises(ValueError, match="router_logits has shape"):
        RenormalizedLosses(4, 2).add(x, target, gate_up, down, logits[:, 1:])
    small, large = expert_gram(x, target, gate_up[:2], down[:2]), expert_gram(x, target, gate_up, down)
    with pytest.raises(ValueError, match=r"gram has shape .2, 2. and .4, 4., expected sums of the same components"):
        flex_kernels.merged(small, large)
    with pytest.raises(TypeError, match="the sums are of kind ExpertGram and NeuronSums, expected two of one kind"):
        flex_kernels.merged(small, flex_kernels.neuron_sums(x, target, gate_up[0]))
