"""Scores -> the chosen expert: the paper's rule against a brute-force enumeration, and the criteria beside it."""

import itertools

import pytest
import torch
from cases import DEVICE
from torch import Tensor

import flex_kernels
from flex_kernels import reference
from flex_kernels.selection import one_expert as selection

EXPERTS, HIDDEN, WIDTH, TOP_K = 5, 12, 8, 2


def layer() -> tuple[Tensor, Tensor, Tensor]:
    router, gate_up = torch.randn(EXPERTS, HIDDEN), torch.randn(EXPERTS, 2 * WIDTH, HIDDEN) * 0.3
    return tuple(x.to(DEVICE) for x in (router, gate_up, torch.randn(EXPERTS, HIDDEN, WIDTH) * 0.3))


def enumerate_by_the_paper(batches: list[Tensor], router: Tensor, gate_up: Tensor, down: Tensor) -> tuple[int, list]:
    """`argmin_C sum_b ||F(X_b) - F(X_b; C)||_F` over all subsets `C` of one expert, each re-run whole.

    As in the pruning it comes from (Lu et al. 2024): the router sees the kept experts only, softmax, top-k among them.
    With one kept expert its weight is 1.
    """
    losses: list[float] = []
    for kept in itertools.combinations(range(EXPERTS), 1):
        loss = 0.0
        for x in batches:
            weights, indices = reference.route(x @ router.T, TOP_K, True)
            full = reference.grafted_experts(x, indices, weights, gate_up, down)
            kept_weights, kept_indices = reference.route(x @ router[list(kept)].T, 1, True)
            pruned = reference.grafted_experts(x, kept_indices, kept_weights, gate_up[list(kept)], down[list(kept)])
            loss += float((full - pruned).norm())
        losses.append(loss)
    return min(range(EXPERTS), key=losses.__getitem__), losses


def scored(batches: list[Tensor], router: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    x = torch.cat(batches)
    weights, indices = flex_kernels.route(x @ router.T, TOP_K, True)
    target = flex_kernels.grafted_experts(x, indices, weights, gate_up, down)
    offsets = torch.tensor([0, *itertools.accumulate(len(b) for b in batches)], device=DEVICE)
    return flex_kernels.score_experts(x, target, gate_up, down, offsets), target


@pytest.mark.parametrize("seed", range(8))
def test_the_papers_rule_by_enumeration(seed: int) -> None:
    torch.manual_seed(seed)
    weights = layer()
    batches = [torch.randn(n, HIDDEN, device=DEVICE) for n in (9, 1, 17, 4)]
    scores, _ = scored(batches, *weights)
    best, losses = enumerate_by_the_paper(batches, *weights)
    torch.testing.assert_close(
        selection.reconstruction(scores).cpu(), torch.tensor(losses).double(), rtol=1e-5, atol=1e-5
    )
    assert selection.choose(selection.reconstruction(scores)) == best


def test_residuals_are_relative_to_the_layers_output() -> None:
    batches = [torch.randn(n, HIDDEN, device=DEVICE) for n in (9, 4)]
    scores, target = scored(batches, *layer())
    energy = torch.stack([target[:9].square().sum(), target[9:].square().sum()])
    want = selection.reconstruction(scores) / energy.double().sqrt().sum()
    torch.testing.assert_close(selection.relative_residuals(scores, energy), want)
    torch.testing.assert_close(selection.relative_residuals(scores), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(selection.target_energy(scores), energy.double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(selection.zero(scores), energy.double().sqrt().sum(), rtol=1e-4, atol=1e-4)


def test_the_best_scale_leaves_what_scaled_says() -> None:
    _, gate_up, down = weights = layer()
    x = torch.randn(20, HIDDEN, device=DEVICE)
    scores, target = scored([x], *weights)
    left = selection.scaled(scores)
    scales = selection.best_scales(scores)
    for index in range(EXPERTS):
        out = reference.expert(x, gate_up[index], down[index] * scales[index].float())
        torch.testing.assert_close((target - out).square().sum().double(), left[index], rtol=1e-4, atol=1e-4)
        for off in (0.99, 1.01):  # no other scale leaves less
            other = reference.expert(x, gate_up[index], down[index] * scales[index].float() * off)
            assert float((target - other).square().sum()) >= float(left[index]) - 1e-4


def test_a_silent_expert_reconstructs_as_well_as_nothing() -> None:
    router, gate_up, down = layer()
    down[2] = 0
    scores, target = scored([torch.randn(20, HIDDEN, device=DEVICE)], router, gate_up, down)
    torch.testing.assert_close(selection.scaled(scores)[2], target.double().square().sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(selection.relative_residuals(scores)[2].item(), 1.0, rtol=1e-5, atol=1e-5)
    assert float(selection.best_scales(scores)[2]) == 0


def test_routed_mass() -> None:
    indices, weights = torch.tensor([[0, 2], [2, 1], [3, 2]]), torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]])
    mass = selection.routed_mass(indices, weights, 3)  # id 3 is another rank's
    torch.testing.assert_close(mass, -torch.tensor([0.9, 0.4, 1.2]).double())
    assert selection.choose(mass) == 2


def test_random_is_seeded_and_reaches_every_expert() -> None:
    drawn = [selection.random_choice(4, torch.Generator().manual_seed(seed)) for seed in range(60)]
    assert set(drawn) == {0, 1, 2, 3}
    assert drawn[7] == selection.random_choice(4, torch.Generator().manual_seed(7))


def test_ties_go_to_the_lower_index() -> None:
    assert selection.choose(torch.tensor([2.0, 1.0, 3.0, 1.0])) == 1


@pytest.mark.parametrize("scores", [torch.zeros(0), torch.tensor([1.0, float("nan")]), torch.zeros(2, 2)], ids=str)
def test_nothing_to_choose_from(scores: Tensor) -> None:
    with pytest.raises(ValueError, match="component_scores"):
        selection.choose(scores)


def test_scores_of_another_shape_are_refused() -> None:
    for criterion in (selection.reconstruction, selection.scaled, selection.zero, selection.relative_residuals):
        with pytest.raises(ValueError, match=r"scores has shape \[5, 3\], expected \[B, E, 3\]"):
            criterion(torch.zeros(5, 3))
