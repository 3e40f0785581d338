"""The fitted down projection against least squares, against gradient descent's own condition, and on other tokens."""

import math

import pytest
import torch
from cases import DEVICE
from torch import Tensor

import flex_kernels
from flex_kernels import reference
from flex_kernels.selection.refit import refit_down, unexplained

TOKENS, HIDDEN = 60, 9


def problem(num_neurons: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden_states, target, gate_up_proj [2n, H], down_proj [H, n]."""
    x = torch.randn(TOKENS, HIDDEN)
    gate_up, down = torch.randn(2 * num_neurons, HIDDEN) * 0.5, torch.randn(HIDDEN, num_neurons)
    target = torch.randn(TOKENS, HIDDEN) + 0.3 * reference.expert(x, gate_up, down)
    return tuple(tensor.to(DEVICE, dtype) for tensor in (x, target, gate_up, down))


def activations_of(x: Tensor, gate_up: Tensor) -> Tensor:
    """[T, n], through experts whose down projection is the identity."""
    return reference.expert(x, gate_up, torch.eye(len(gate_up) // 2, dtype=x.dtype, device=x.device))


def share(x: Tensor, target: Tensor, gate_up: Tensor, down: Tensor) -> float:
    left = target - reference.expert(x, gate_up, down.to(x.dtype))
    return float(left.square().sum() / target.square().sum())


@pytest.mark.parametrize("num_neurons", [1, 5, 30])
def test_without_a_ridge_it_is_least_squares(num_neurons: int) -> None:
    x, target, gate_up, down = problem(num_neurons)
    refit = refit_down(flex_kernels.neuron_sums(x, target, gate_up), down, 0.0)
    want = torch.linalg.lstsq(activations_of(x, gate_up), target).solution.T
    torch.testing.assert_close(refit.down_proj, want, rtol=1e-8, atol=1e-8)
    assert refit.before == pytest.approx(share(x, target, gate_up, down), rel=1e-9)
    assert refit.after == pytest.approx(share(x, target, gate_up, want), rel=1e-9)
    assert refit.after < refit.before


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 1.0, 30.0])
def test_with_a_ridge_the_gradient_vanishes(ridge: float) -> None:
    x, target, gate_up, down = problem(12)
    fitted = refit_down(flex_kernels.neuron_sums(x, target, gate_up), down, ridge).down_proj.requires_grad_()
    activations = activations_of(x, gate_up)
    penalty = ridge * activations.square().sum(0).mean()

    def loss(projection: Tensor) -> Tensor:
        return (target - activations @ projection.T).square().sum() + penalty * (projection - down).square().sum()

    (gradient,) = torch.autograd.grad(loss(fitted), fitted)
    start = down.clone().requires_grad_()
    (at_start,) = torch.autograd.grad(loss(start), start)
    assert gradient.norm() < 1e-10 * at_start.norm()
    # The same as stacked rows in one least squares problem.
    root = penalty.sqrt()
    rows = torch.cat([activations, root * torch.eye(12, dtype=x.dtype, device=x.device)])
    want = torch.linalg.lstsq(rows, torch.cat([target, root * down.T])).solution.T
    torch.testing.assert_close(fitted.detach(), want, rtol=1e-8, atol=1e-8)


def test_the_ridge_leads_from_the_fit_to_the_given_projection() -> None:
    x, target, gate_up, down = problem(20)
    sums = flex_kernels.neuron_sums(x, target, gate_up)
    refits = [refit_down(sums, down, ridge) for ridge in (0.0, 1e-3, 1e-1, 1.0, 100.0, 1e9)]
    after = [refit.after for refit in refits]
    assert after == sorted(after)
    distance = [float((refit.down_proj - down).norm()) for refit in refits]
    assert distance == sorted(distance, reverse=True)
    torch.testing.assert_close(refits[-1].down_proj, down, rtol=1e-6, atol=1e-6)
    assert all(refit.before == refits[0].before for refit in refits)
    assert after[-1] == pytest.approx(refits[0].before, rel=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 1e-18])
def test_dependent_and_silent_neurons_move_as_little_as_they_can(ridge: float) -> None:
    x, target, gate_up, down = problem(6)
    rows = gate_up.view(2, 6, HIDDEN)
    rows[:, 4] = rows[:, 1]  # fires as another does
    rows[1, 5] = 0  # never fires
    refit = refit_down(flex_kernels.neuron_sums(x, target, gate_up), down, ridge)
    want = torch.linalg.lstsq(activations_of(x, gate_up)[:, :4], target).solution.T
    assert refit.after == pytest.approx(share(x, target, gate_up[[0, 1, 2, 3, 6, 7, 8, 9]], want), rel=1e-8)
    change = refit.down_proj - down
    torch.testing.assert_close(change[:, 4], change[:, 1])
    torch.testing.assert_close(refit.down_proj[:, 5], down[:, 5])
    silent = refit_down(flex_kernels.neuron_sums(x, target, gate_up * 0), down, 0.5)
    torch.testing.assert_close(silent.down_proj, down)
    assert (silent.before, silent.after) == (1.0, 1.0)


def test_an_expert_finds_its_own_projection_again() -> None:
    """A whole expert is its neurons: forgotten, the down projection comes back from what the expert gave."""
    x, _, gate_up, down = problem(8)
    refit = refit_down(flex_kernels.neuron_sums(x, reference.expert(x, gate_up, down), gate_up), down * 0, 0.0)
    torch.testing.assert_close(refit.down_proj, down, rtol=1e-6, atol=1e-6)
    assert refit.before == 1.0
    assert refit.after < 1e-12


def test_held_out_tokens_show_the_overfitting() -> None:
    """With about as many neurons as tokens the fit is perfect where it was made, and bad elsewhere; a ridge helps."""
    x, target, gate_up, down = problem(50)
    down = down * 0.1
    fitted, held = slice(0, 50), slice(50, TOKENS)
    sums = flex_kernels.neuron_sums(x[fitted], target[fitted], gate_up)
    other = flex_kernels.neuron_sums(x[held], target[held], gate_up)
    tight, loose = refit_down(sums, down, 0.0), refit_down(sums, down, 1.0)
    assert tight.after < 1e-6
    assert unexplained(other, tight.down_proj) == pytest.approx(share(x[held], target[held], gate_up, tight.down_proj))
    assert unexplained(other, tight.down_proj) > 1
    assert unexplained(other, loose.down_proj) < unexplained(other, tight.down_proj)


def test_batches_add_up() -> None:
    x, target, gate_up, down = problem(10)
    parts = [flex_kernels.neuron_sums(x[own], target[own], gate_up) for own in (slice(0, 13), slice(13, TOKENS))]
    ours = refit_down(flex_kernels.merged(*parts), down, 0.01)
    want = refit_down(flex_kernels.neuron_sums(x, target, gate_up), down, 0.01)
    torch.testing.assert_close(ours.down_proj, want.down_proj)
    assert ours.after == pytest.approx(want.after)


@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_dtypes(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    x, target, gate_up, down = problem(10, dtype)
    refit = refit_down(flex_kernels.neuron_sums(x, target, gate_up), down.requires_grad_(), 0.01)
    assert refit.down_proj.dtype == out_dtype
    assert refit.down_proj.is_contiguous()
    assert not refit.down_proj.requires_grad
    exact = refit_down(
        flex_kernels.neuron_sums(x.double(), target.double(), gate_up.double()), down.detach().double(), 0.01
    )
    torch.testing.assert_close(refit.down_proj.double(), exact.down_proj, rtol=1e-4, atol=1e-4)
    assert refit.after == pytest.approx(exact.after, rel=1e-5)


def test_after_greedy_choice_a_refit_leaves_less_than_constants() -> None:
    x, target, gate_up, down = problem(80)
    choice = flex_kernels.greedy_neurons(flex_kernels.neuron_sums(x, target, gate_up), down, 12)
    own_gate_up, own_down = flex_kernels.gather_neurons(gate_up[None], down[None], choice.order)
    sums = flex_kernels.neuron_sums(x, target, own_gate_up)
    scaled = unexplained(sums, own_down * choice.scales)
    assert scaled == pytest.approx(float(choice.losses[-1] / choice.losses[0]), rel=1e-9)
    assert refit_down(sums, own_down * choice.scales, 0.0).after < scaled


def test_bad_input_is_refused() -> None:
    x, target, gate_up, down = problem(6)
    sums = flex_kernels.neuron_sums(x, target, gate_up)
    for ridge in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"ridge is {ridge}, expected a finite number, at least 0"):
            refit_down(sums, down, ridge)
    with pytest.raises(ValueError, match=r"NeuronSums.gram holds NaN or infinity, expected finite numbers"):
        refit_down(sums._replace(gram=sums.gram * math.nan), down, 0.1)
    with pytest.raises(
        ValueError, match=r"NeuronSums.energy is 0, expected tokens with a target that is not zero everywhere"
    ):
        refit_down(sums._replace(energy=sums.energy * 0), down, 0.1)
    with pytest.raises(ValueError, match="hidden_states has no tokens"):
        refit_down(flex_kernels.neuron_sums(x[:0], target[:0], gate_up), down, 0.1)
    with pytest.raises(ValueError, match=r"down_proj has shape .9, 5., expected .9, 6."):
        unexplained(sums, down[:, 1:])
    with pytest.raises(ValueError, match="down_proj holds NaN"):
        unexplained(sums, down * math.nan)
