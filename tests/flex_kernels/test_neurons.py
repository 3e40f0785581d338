"""Neurons of many experts as one graft: gathered, summed, and chosen, against experts run whole and every choice."""

import itertools
import math

import pytest
import torch
from cases import DEVICE
from memory import Largest
from torch import Tensor

import flex_kernels
from flex_kernels import reference
from flex_kernels.selection import neurons
from flex_kernels.selection.neurons import NeuronSums, gather_neurons, greedy_neurons, neuron_sums, prefilter

TOKENS, HIDDEN = 29, 7


def pool(
    num_neurons: int, num_tokens: int = TOKENS, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden_states, target, gate_up_proj [2n, H], down_proj [H, n]: candidates that overlap, as real ones do."""
    x, target = torch.randn(num_tokens, HIDDEN), torch.randn(num_tokens, HIDDEN)
    gate_up, down = torch.randn(2 * num_neurons, HIDDEN) * 0.5, torch.randn(HIDDEN, num_neurons)
    down = down + down.mean(1, keepdim=True) * 3
    target = target + reference.expert(x, gate_up, down)
    return tuple(tensor.to(DEVICE, dtype) for tensor in (x, target, gate_up, down))


def outputs_of(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """[n, T * H]: what each neuron adds, each run as an expert of its own."""
    count = down.shape[1]
    return torch.stack(
        [reference.expert(x, gate_up[[j, count + j]], down[:, [j]]).flatten() for j in range(count)]
    ).double()


def least(outputs: Tensor, target: Tensor) -> float:
    """The loss of these neurons at their best constants, by least squares on the outputs themselves."""
    constants = torch.linalg.lstsq(outputs.T, target.flatten()[:, None]).solution
    return float((target.flatten() - (outputs.T @ constants)[:, 0]).square().sum())


def exhaustive(x: Tensor, target: Tensor, gate_up: Tensor, down: Tensor, width: int) -> tuple[tuple[int, ...], float]:
    outputs = outputs_of(x, gate_up, down)
    losses = {
        chosen: least(outputs[list(chosen)], target) for chosen in itertools.combinations(range(down.shape[1]), width)
    }
    best = min(losses, key=losses.__getitem__)
    return best, losses[best]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("num_neurons", "width"), [(4, 4), (7, 2), (7, 3), (9, 4), (10, 5)])
def test_tiny_cases_by_exhaustive_search(num_neurons: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, target, gate_up, down = pool(num_neurons)
    choice = greedy_neurons(neuron_sums(x, target, gate_up), down, width)
    for size in range(1, width + 1):
        best, loss = exhaustive(x, target, gate_up, down, size)
        assert float(choice.losses[size]) == pytest.approx(loss, rel=1e-6)
    assert tuple(sorted(choice.order.tolist())) == best
    assert float(choice.losses[0]) == pytest.approx(float(target.square().sum()))


@pytest.mark.parametrize("seed", range(3))
def test_each_greedy_step_takes_what_leaves_least(seed: int) -> None:
    torch.manual_seed(seed)
    x, target, gate_up, down = pool(neurons.SMALL_POOL + 3)
    choice = greedy_neurons(neuron_sums(x, target, gate_up), down, 4)
    outputs, taken = outputs_of(x, gate_up, down), []
    for step, pick in enumerate(choice.order.tolist()):
        others = [j for j in range(len(outputs)) if j not in taken]
        losses = {j: least(outputs[[*taken, j]], target) for j in others}
        assert pick == min(losses, key=losses.__getitem__)
        assert float(choice.losses[step + 1]) == pytest.approx(losses[pick], rel=1e-6)
        taken.append(pick)


@pytest.mark.parametrize(("num_neurons", "width"), [(6, 6), (40, 20), (300, 120)])
def test_the_graft_leaves_what_was_promised(num_neurons: int, width: int) -> None:
    """The chosen neurons as a dense expert, their constants folded into the down projection, run on the tokens."""
    x, target, gate_up, down = pool(num_neurons, num_tokens=90)
    choice = greedy_neurons(neuron_sums(x, target, gate_up), down, width)
    assert len(set(choice.order.tolist())) == width
    own_gate_up, own_down = gather_neurons(gate_up[None], down[None], choice.order)
    out = reference.expert(x, own_gate_up, own_down * choice.scales)
    assert float((target - out).square().sum()) == pytest.approx(float(choice.losses[-1]), rel=1e-6)


@pytest.mark.parametrize(("num_neurons", "width"), [(20, 20), (64, 30), (400, 350)])
def test_more_width_never_raises_the_loss(num_neurons: int, width: int) -> None:
    x, target, gate_up, down = pool(num_neurons, num_tokens=60)
    losses = greedy_neurons(neuron_sums(x, target, gate_up), down, width).losses
    assert losses.shape == (width + 1,)
    assert (losses.diff() <= 0).all()
    assert (losses >= 0).all()
    assert losses[-1] < 0.5 * losses[0]


def test_a_narrower_greedy_choice_is_the_beginning_of_a_wider_one() -> None:
    x, target, gate_up, down = pool(100)
    sums = neuron_sums(x, target, gate_up)
    wide, narrow = greedy_neurons(sums, down, 40), greedy_neurons(sums, down, 15)
    assert torch.equal(wide.order[:15], narrow.order)
    torch.testing.assert_close(wide.losses[:16], narrow.losses)


@pytest.mark.parametrize("num_neurons", [6, 90])
def test_neurons_that_depend_on_each_other_come_last_with_scale_zero(num_neurons: int) -> None:
    x, target, gate_up, down = pool(num_neurons)
    half = num_neurons // 2
    twice = gate_up.view(2, num_neurons, HIDDEN)
    twice[:, half:] = twice[:, :half]  # the second half fires as the first does ...
    down[:, half:] = -3 * down[:, :half]  # ... along the same line
    down[:, 1] = 0  # and one is silent, with its twin
    down[:, half + 1] = 0
    choice = greedy_neurons(neuron_sums(x, target, gate_up), down, num_neurons)
    assert sorted(choice.order.tolist()) == list(range(num_neurons))
    assert torch.isfinite(choice.scales).all()
    assert int((choice.scales != 0).sum()) == half - 1
    outputs = outputs_of(x, gate_up, down)
    own = [j for j in range(half) if j != 1]
    assert float(choice.losses[-1]) == pytest.approx(least(outputs[own], target), rel=1e-6)
    if num_neurons > neurons.SMALL_POOL:
        assert (choice.scales[: half - 1] != 0).all()
        assert choice.order[half - 1 :].tolist() == sorted(choice.order[half - 1 :].tolist())


def test_ties_go_to_the_lower_id() -> None:
    x, target, gate_up, down = pool(70)
    gate_up, down = gate_up.view(2, 70, HIDDEN)[:, [5] * 70].reshape(140, HIDDEN), down[:, [5] * 70]
    assert greedy_neurons(neuron_sums(x, target, gate_up), down, 3).order.tolist() == [0, 1, 2]


@pytest.mark.parametrize("num_neurons", [5, 80])
def test_silent_neurons_explain_nothing(num_neurons: int) -> None:
    x, target, gate_up, down = pool(num_neurons)
    choice = greedy_neurons(neuron_sums(x, target, gate_up * 0), down, 3)
    assert choice.order.tolist() == [0, 1, 2]
    assert choice.scales.tolist() == [0, 0, 0]
    torch.testing.assert_close(choice.losses, target.square().sum().expand(4))


def test_a_target_of_zeros_takes_nothing() -> None:
    x, target, gate_up, down = pool(80)
    choice = greedy_neurons(neuron_sums(x, target * 0, gate_up), down, 5)
    assert torch.equal(choice.losses, torch.zeros_like(choice.losses))
    assert torch.equal(choice.scales, torch.zeros_like(choice.scales))


def test_sums_are_those_of_the_activations() -> None:
    x, target, gate_up, _ = pool(12)
    sums = neuron_sums(x, target, gate_up, activation="gelu")
    gate, up = (x @ gate_up.T).chunk(2, dim=1)
    activations = torch.nn.functional.gelu(gate) * up
    torch.testing.assert_close(sums.gram, activations.T @ activations)
    torch.testing.assert_close(sums.cross, activations.T @ target)
    torch.testing.assert_close(sums.energy, target.square().sum())


def test_batches_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    x, target, gate_up, _ = pool(12)
    whole = neuron_sums(x, target, gate_up)
    parts = neuron_sums(x[:11], target[:11], gate_up)
    parts = flex_kernels.merged(parts, neuron_sums(x[11:], target[11:], gate_up))
    assert isinstance(parts, NeuronSums)
    torch.testing.assert_close(tuple(parts), tuple(whole))
    monkeypatch.setattr(neurons, "CHUNK_BYTES", 8 * (12 + HIDDEN) * 3)  # three tokens at a time
    torch.testing.assert_close(tuple(neuron_sums(x, target, gate_up)), tuple(whole))


def test_memory_does_not_grow_with_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    x, target, gate_up, _ = pool(50, num_tokens=3000, dtype=torch.float32)
    monkeypatch.setattr(neurons, "CHUNK_BYTES", 8 * (50 + HIDDEN) * 64)
    with Largest() as largest:
        neuron_sums(x, target, gate_up)
    assert 0 < largest.numel <= max(x.numel(), 64 * 100)
    assert largest.numel < 3000 * 50 / 5


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
    ids=["fp32", "fp32-bf16", "bf16"],
)
def test_dtypes(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """Sums of bf16 tokens and weights are as exact as those of fp32: nothing is rounded on the way."""
    x, target, gate_up, down = pool(80, dtype=dtype)
    gate_up, down = gate_up.to(weight_dtype), down.to(weight_dtype)
    ours, truth = neuron_sums(x, target, gate_up), neuron_sums(x.double(), target.double(), gate_up.double())
    for a, b in zip(ours, truth, strict=True):
        assert a.dtype == torch.float64
        assert float((a - b).norm() / b.norm()) < 1e-6
    choice, exact = greedy_neurons(ours, down, 10), greedy_neurons(truth, down.double(), 10)
    assert torch.equal(choice.order, exact.order)
    torch.testing.assert_close(choice.losses, exact.losses, rtol=1e-5, atol=0)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert all(
            torch.equal(a, b) for a, b in zip(neuron_sums(x, target, gate_up.requires_grad_()), ours, strict=True)
        )


def test_prefilter_takes_the_best_alone() -> None:
    experts, width = 5, 6
    x, target = torch.randn(TOKENS, HIDDEN, device=DEVICE), torch.randn(TOKENS, HIDDEN, device=DEVICE)
    gate_up = torch.randn(experts, 2 * width, HIDDEN, device=DEVICE)
    down = torch.randn(experts, HIDDEN, width, device=DEVICE)
    down[2, :, 3] = 0
    ids = prefilter(*flex_kernels.score_neurons(x, target, gate_up, down), experts * width)
    assert ids.dtype == torch.int64
    assert sorted(ids.tolist()) == list(range(experts * width))
    assert int(ids[-1]) == 2 * width + 3  # silent
    losses = []
    for flat in ids.tolist():
        own = gather_neurons(gate_up, down, torch.tensor([flat], device=DEVICE))
        losses.append(least(outputs_of(x.double(), *(weight.double() for weight in own)), target.double()))
    assert losses == sorted(losses)
    few = prefilter(*flex_kernels.score_neurons(x, target, gate_up, down), 4)
    assert torch.equal(few, ids[:4])


def test_prefilter_breaks_ties_by_id_and_puts_silent_neurons_last() -> None:
    energy = torch.tensor([[0.0, 1.0, 1.0], [4.0, 0.0, 1.0]], device=DEVICE)
    correlation = torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.0, 0.0]], device=DEVICE)
    assert prefilter(energy, correlation, 6).tolist() == [1, 2, 3, 5, 0, 4]


def test_gathered_neurons_are_the_experts_they_come_from() -> None:
    experts, width = 4, 5
    x = torch.randn(TOKENS, HIDDEN, device=DEVICE)
    gate_up = torch.randn(experts, 2 * width, HIDDEN, device=DEVICE)
    down = torch.randn(experts, HIDDEN, width, device=DEVICE)
    ids = torch.arange(2 * width, 3 * width, device=DEVICE)
    own_gate_up, own_down = gather_neurons(gate_up, down, ids)
    assert torch.equal(own_gate_up, gate_up[2])
    assert torch.equal(own_down, down[2])
    assert own_gate_up.data_ptr() != gate_up[2].data_ptr()
    mixed = torch.tensor([19, 0, 7], device=DEVICE)
    whole = sum(reference.expert(x, gate_up[e][[j, width + j]], down[e][:, [j]]) for e, j in ((3, 4), (0, 0), (1, 2)))
    torch.testing.assert_close(reference.expert(x, *gather_neurons(gate_up, down, mixed)), whole)
    none = gather_neurons(gate_up, down, mixed[:0])
    assert (none[0].shape, none[1].shape) == ((0, HIDDEN), (HIDDEN, 0))


def test_from_all_neurons_to_a_graft() -> None:
    """The whole way, on the layer's own output: fewer neurons than an expert has beat each expert at its best scale."""
    experts, width = 6, 16
    x = torch.randn(200, HIDDEN, device=DEVICE)
    gate_up = torch.randn(experts, 2 * width, HIDDEN, device=DEVICE) * 0.5
    down = torch.randn(experts, HIDDEN, width, device=DEVICE) * 0.3
    weights, indices = reference.route(x @ torch.randn(HIDDEN, experts, device=DEVICE), 2, True)
    target = reference.grafted_experts(x, indices, weights, gate_up, down)
    ids = prefilter(*flex_kernels.score_neurons(x, target, gate_up, down), 60)
    candidates = gather_neurons(gate_up, down, ids)
    choice = greedy_neurons(neuron_sums(x, target, candidates[0]), candidates[1], 12)
    graft = gather_neurons(gate_up, down, ids[choice.order])
    left = (target - reference.expert(x, graft[0], graft[1] * choice.scales.float())).square().sum()
    torch.testing.assert_close(left.double(), choice.losses[-1], rtol=1e-4, atol=0)
    scores = flex_kernels.score_experts(x, target, gate_up, down, torch.tensor([0, 200], device=DEVICE))
    assert left < flex_kernels.scaled(scores).min()


@pytest.mark.parametrize("width", [0, -1, 9])
def test_widths_that_do_not_exist_are_refused(width: int) -> None:
    x, target, gate_up, down = pool(8)
    with pytest.raises(ValueError, match=f"width is {width}, expected 1 to 8, the number of neurons to choose from"):
        greedy_neurons(neuron_sums(x, target, gate_up), down, width)


def test_bad_input_is_refused() -> None:
    x, target, gate_up, down = pool(8)
    sums = neuron_sums(x, target, gate_up)
    with pytest.raises(ValueError, match="hidden_states has no tokens, expected at least one"):
        neuron_sums(x[:0], target[:0], gate_up)
    with pytest.raises(ValueError, match="target holds NaN or infinity, expected finite numbers"):
        neuron_sums(x, target * math.nan, gate_up)
    with pytest.raises(ValueError, match="target has shape"):
        neuron_sums(x, target[:, 1:], gate_up)
    with pytest.raises(ValueError, match="gate_up_proj has 15 rows, expected two for each neuron"):
        neuron_sums(x, target, gate_up[1:])
    with pytest.raises(ValueError, match="activation is 'relu'"):
        neuron_sums(x, target, gate_up, activation="relu")
    with pytest.raises(ValueError, match="down_proj has shape"):
        greedy_neurons(sums, down[:, 1:], 2)
    with pytest.raises(ValueError, match=r"NeuronSums.gram holds NaN or infinity, expected finite numbers"):
        greedy_neurons(neuron_sums(x, target, gate_up * math.inf), down, 2)
    with pytest.raises(ValueError, match="ids reach from 0 to 8, expected 0 to 7"):
        gather_neurons(gate_up[None], down[None], torch.tensor([0, 8], device=DEVICE))
    with pytest.raises(TypeError, match=r"ids is torch.float32, expected int64 or int32"):
        gather_neurons(gate_up[None], down[None], torch.zeros(2, device=DEVICE))
    energy = torch.ones(2, 4, device=DEVICE)
    with pytest.raises(ValueError, match="count is 9, expected 1 to 8, the number of neurons"):
        prefilter(energy, energy, 9)
    with pytest.raises(ValueError, match="correlation holds NaN"):
        prefilter(energy, energy * math.nan, 2)
    with pytest.raises(ValueError, match="correlation has shape"):
        prefilter(energy, energy[1:], 2)
