"""From scores to the chosen expert: the paper's rule and the criteria beside it, as small pure functions.

`scores` is what `score_experts` returns, [B, E, 3]: `||F_b - E_i||^2`, `<F_b, E_i>`, `||E_i||^2` per calibration batch
`b` and expert `i`. Every criterion gives [E], lower is better; `choose` takes the best, ties go to the lower index.

    reconstruction   sum_b ||F_b - E_i(X_b)||_F                  the paper's rule (arXiv 2506.00965), not squared
    scaled           ||F||^2 - <F, E_i>^2 / ||E_i||^2            the rest at the best scale of the down projection
    routed_mass      - the routing weight the expert received    control
    random           one expert, drawn                           control
    zero             sum_b ||F_b||_F                             control: the error of no expert at all

Several experts in one graft: `subsets.py`; neurons of many: `neurons.py`; a fitted down projection: `refit.py`.
"""

import torch
from torch import Tensor

from flex_kernels.ops.checks import check_shape


def reconstruction(scores: Tensor) -> Tensor:
    """[B, E, 3] -> [E]: `sum_b ||F_b - E_i(X_b)||_F`."""
    check_shape("scores", scores, ("B", "E", 3))
    return scores[..., 0].clamp_min(0).double().sqrt().sum(0)


def scaled(scores: Tensor) -> Tensor:
    """[B, E, 3] -> [E]: `||F||^2 - <F, E_i>^2 / ||E_i||^2`, over all batches; a silent expert leaves `||F||^2`."""
    check_shape("scores", scores, ("B", "E", 3))
    _, inner, energy = scores.double().sum(0).unbind(-1)
    return target_energy(scores).sum() - torch.where(energy > 0, inner**2 / energy, 0)


def best_scales(scores: Tensor) -> Tensor:
    """[B, E, 3] -> [E]: the factor on each expert's down projection that `scaled` supposes, `<F, E_i> / ||E_i||^2`."""
    check_shape("scores", scores, ("B", "E", 3))
    _, inner, energy = scores.double().sum(0).unbind(-1)
    return torch.where(energy > 0, inner / energy, 0)


def routed_mass(expert_indices: Tensor, routing_weights: Tensor, num_experts: int) -> Tensor:
    """[T, K], [T, K] -> [E]: minus the routing weight each expert received; ids `>= num_experts` count for nobody."""
    check_shape("routing_weights", routing_weights, tuple(expert_indices.shape))
    mass = torch.zeros(num_experts + 1, dtype=torch.float64, device=routing_weights.device)
    mass.index_add_(0, expert_indices.flatten().long().clamp(max=num_experts), routing_weights.flatten().double())
    return -mass[:num_experts]


def zero(scores: Tensor) -> Tensor:
    """[B, E, 3] -> []: `sum_b ||F_b||_F`, the reconstruction error of no expert at all."""
    return target_energy(scores).sqrt().sum()


def random_choice(num_experts: int, generator: torch.Generator | None = None) -> int:
    """One expert, each as likely as the other."""
    return int(torch.randint(num_experts, (1,), generator=generator))


def choose(component_scores: Tensor) -> int:
    """[E] -> the index of the lowest score; ties go to the lower index.

    Raises:
        ValueError: no scores, or one that is not a number.
    """
    check_shape("component_scores", component_scores, ("E",))
    if component_scores.numel() == 0 or component_scores.isnan().any():
        raise ValueError(f"component_scores is {component_scores.tolist()}, expected at least one and no NaN")
    return int((component_scores == component_scores.min()).nonzero()[0, 0])


def target_energy(scores: Tensor) -> Tensor:
    """[B, E, 3] -> [B]: `||F_b||^2 = ||F_b - E_i||^2 + 2 <F_b, E_i> - ||E_i||^2`, taken where it cancels least."""
    check_shape("scores", scores, ("B", "E", 3))
    error, inner, energy = scores.double().unbind(-1)
    quietest = energy.argmin(1, keepdim=True)
    return (error + 2 * inner - energy).gather(1, quietest).squeeze(1).clamp_min(0)


def relative_residuals(scores: Tensor, energy: Tensor | None = None) -> Tensor:
    """[B, E, 3] -> [E]: `sum_b ||F_b - E_i(X_b)|| / sum_b ||F_b||`; at 1 the expert is no better than nothing at all.

    Args:
        energy: [B], `||F_b||^2` where it is known; otherwise it follows from the scores.
    """
    energy = target_energy(scores) if energy is None else energy
    check_shape("energy", energy, (scores.shape[0],))
    return reconstruction(scores) / energy.double().sqrt().sum()
