"""Neurons of many pretrained experts as one graft: prefilter, gather, and greedy choice on the Gram matrix.

Neuron `(e, j)`, flat id `e * I + j`, adds `a_ej(t) d_ej` to the output of expert `e`: `a = act(G x) * (U x)` is its
activation, `d_ej` its column of `D_e`. A set `S` with a constant for each neuron leaves, of the target `F`,

    loss(S, c) = ||F||^2 - 2 c.b_S + c^T M_SS c,   M_ij = (sum_t a_i a_j) <d_i, d_j>,   b_i = <sum_t a_i F_t, d_i>

so three sums over tokens are enough: `A^T A`, `A^T F` and `||F||^2` (`neuron_sums`). They serve the refit of the down
projection too (`refit.py`). The order of work: `score_neurons` over all experts, `prefilter` to the best few thousand,
`gather_neurons`, `neuron_sums`, `greedy_neurons`, `gather_neurons` again.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flex_kernels.ops.checks import autocast_off, check_activation, check_device, check_integer, check_shape, wide_dtype
from flex_kernels.reference import ACTIVATIONS
from flex_kernels.selection.subsets import ExpertGram, best_scaled_subset
from flex_kernels.selection.sums import DEPENDENT, check_finite, check_sums, check_tokens

CHUNK_BYTES = 2**26  # of fp64 activations and targets held at once
MOST_ENUMERATED = 20_000  # so many subsets of a small pool are all looked at, in well under a second
SMALL_POOL = 64
TIE = 1e-9  # gains that differ by a smaller part are equal but for rounding


class NeuronSums(NamedTuple):
    """Sums over tokens, fp64; `sums.merged` adds those of two batches."""

    gram: Tensor  # [n, n], A^T A
    cross: Tensor  # [n, H], A^T F
    energy: Tensor  # [], sum_t ||F||^2


class NeuronChoice(NamedTuple):
    """Which of the `n` candidates, and how much of the target the best ones leave at every width."""

    order: Tensor  # [width] int64, ids into the candidates, as they were picked
    scales: Tensor  # [width] fp64, the best constants of all of them together
    losses: Tensor  # [width + 1] fp64, squared; at width 0: ||F||^2


def prefilter(energy: Tensor, correlation: Tensor, count: int) -> Tensor:
    """The `count` neurons that alone, at their best scale, explain most: the largest `b^2 / q`.

    Args:
        energy: [E, I], `q`; correlation: [E, I], `b`: what `score_neurons` gives.
    Returns:
        [count] int64, flat ids `e * I + j`, best first; ties go to the lower id, silent neurons (`q = 0`) come last.
    Raises:
        ValueError: shapes that differ, more neurons than there are, NaN or infinity.
    """
    check_shape("energy", energy, ("E", "I"))
    check_shape("correlation", correlation, tuple(energy.shape))
    check_finite("energy", energy)
    check_finite("correlation", correlation)
    if not 1 <= count <= energy.numel():
        raise ValueError(f"count is {count}, expected 1 to {energy.numel()}, the number of neurons")
    q, b = energy.flatten().double(), correlation.flatten().double()
    explained = torch.where(q > 0, b**2 / q, -1)
    return torch.sort(explained, descending=True, stable=True).indices[:count]


def gather_neurons(gate_up_proj: Tensor, down_proj: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """A dense gated expert of these neurons, in the order of `ids`.

    Args:
        gate_up_proj: [E, 2I, H]; down_proj: [E, H, I]; ids: [n] int64 or int32, flat ids `e * I + j`.
    Returns:
        gate_up_proj [2n, H], the gate rows first, and down_proj [H, n]: copies.
    Raises:
        ValueError: a shape or an id that does not fit. TypeError: ids that are not integers.
    """
    check_shape("down_proj", down_proj, ("E", "H", "I"))
    num_experts, hidden_size, width = down_proj.shape
    check_shape("gate_up_proj", gate_up_proj, (num_experts, 2 * width, hidden_size))
    check_integer("ids", ids)
    check_shape("ids", ids, ("n",))
    lowest, highest = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
    if lowest < 0 or highest >= num_experts * width:
        raise ValueError(f"ids reach from {lowest} to {highest}, expected 0 to {num_experts * width - 1}")
    ids = ids.long().to(down_proj.device)
    expert, neuron = ids // width, ids % width
    gate_up = torch.cat([gate_up_proj[expert, neuron], gate_up_proj[expert, width + neuron]])
    return gate_up, down_proj[expert, :, neuron].T.contiguous()


def neuron_sums(hidden_states: Tensor, target: Tensor, gate_up_proj: Tensor, *, activation: str = "silu") -> NeuronSums:
    """`A^T A`, `A^T F` and `||F||^2`, where `A = act(X G^T) * (X U^T)`, [T, n], is computed in fp32 and summed in fp64.

    Args:
        hidden_states: [T, H]; target: [T, H], `F`; gate_up_proj: [2n, H], of `gather_neurons` or of any one expert.
    Raises:
        ValueError: a shape, device or name that does not fit, no tokens, NaN or infinity. TypeError: a dtype.
    """
    check_tokens(hidden_states, target)
    check_shape("gate_up_proj", gate_up_proj, ("2n", hidden_states.shape[1]))
    check_device("gate_up_proj", gate_up_proj, hidden_states.device)
    if len(gate_up_proj) == 0 or len(gate_up_proj) % 2:
        raise ValueError(f"gate_up_proj has {len(gate_up_proj)} rows, expected two for each neuron")
    check_activation(activation)
    num_neurons, wide = len(gate_up_proj) // 2, wide_dtype(hidden_states.dtype)
    options = {"dtype": torch.float64, "device": hidden_states.device}
    gram = torch.zeros(num_neurons, num_neurons, **options)
    cross = torch.zeros(num_neurons, hidden_states.shape[1], **options)
    energy = torch.zeros((), **options)
    chunk = max(1, CHUNK_BYTES // (8 * (num_neurons + hidden_states.shape[1])))
    with torch.no_grad(), autocast_off(hidden_states):
        weight = gate_up_proj.to(wide)
        for x, own_target in zip(hidden_states.split(chunk), target.split(chunk), strict=True):
            gate, up = F.linear(x.to(wide), weight).chunk(2, dim=1)
            activations = (ACTIVATIONS[activation](gate) * up).double()  # [c, n]
            own_target = own_target.double()
            gram += activations.T @ activations
            cross += activations.T @ own_target
            energy += own_target.square().sum()
    return NeuronSums(gram, cross, energy)


def greedy_neurons(sums: NeuronSums, down_proj: Tensor, width: int) -> NeuronChoice:
    """Picks `width` of the candidates, each time the one that, with all constants fitted again, leaves least.

    Orthogonal matching pursuit by a pivoted Cholesky factorisation of `M`, computed as far as it is needed: after some
    picks `M_SS = L L^T` and `y = L^-1 b_S`; candidate `j`, whose row of `L` would be `L_j`, lowers the loss by
    `(b_j - L_j.y)^2 / (M_jj - L_j.L_j)`. O(n width^2) in all.

    In a pool of at most 64 every set is looked at instead, for as long as there are at most 20,000 of a width: on tiny
    cases the result is that of an exhaustive search. Either way more width never raises the loss. A greedy set contains
    the one of a smaller width; a searched one need not.

    A neuron that is a combination of those picked explains nothing more: it comes after all others, with scale 0.
    Ties, up to rounding, go to the lower id.

    Args:
        sums: of the candidates (`neuron_sums`); down_proj: [H, n], their columns.
    Raises:
        ValueError: a shape that does not fit, a width larger than all candidates, sums that are not finite.
    """
    check_sums(sums)
    num_neurons = len(sums.gram)
    check_shape("down_proj", down_proj, (sums.cross.shape[1], num_neurons))
    check_finite("down_proj", down_proj)
    if not 1 <= width <= num_neurons:
        raise ValueError(f"width is {width}, expected 1 to {num_neurons}, the number of neurons to choose from")
    down = down_proj.detach().double()
    gram, inner = (down.T @ down).mul_(sums.gram), (sums.cross * down.T).sum(1)  # M, b
    start, losses = _searched(ExpertGram(gram, inner, sums.energy), width)
    order, used = [], []
    rows = gram.new_zeros(width, num_neurons)  # L^T: one row for each pick
    coordinates = gram.new_zeros(width)  # y
    own = gram.diagonal()
    left, slope = own.clone(), inner.clone()  # M_jj - L_j.L_j and b_j - L_j.y of every candidate
    taken = torch.zeros(num_neurons, dtype=torch.bool, device=gram.device)
    for step in range(width):
        independent = left > DEPENDENT * own
        if step < len(start):
            pick = start[step]
        else:
            gain = torch.where(independent, slope**2 / left, -1).masked_fill_(taken, -2)
            most = gain.max()
            pick = int((gain >= most - TIE * most.clamp_min(0)).nonzero()[0, 0])
        if independent[pick]:
            root = left[pick].sqrt()
            rows[step] = (gram[pick] - rows[:step, pick] @ rows[:step]) / root
            coordinates[step] = slope[pick] / root
            left -= rows[step] ** 2
            slope -= rows[step] * coordinates[step]
            used.append(step)
        order.append(pick)
        taken[pick] = True
        if step >= len(start):
            losses.append(max(0.0, losses[-1] - float(coordinates[step]) ** 2))
    order = torch.tensor(order, device=gram.device)
    scales = gram.new_zeros(width)
    # L^T c = y; row i of `rows` is column i of L.
    scales[used] = torch.linalg.solve_triangular(rows[used][:, order[used]], coordinates[used, None], upper=True)[:, 0]
    return NeuronChoice(order, scales, gram.new_tensor(losses))


def _searched(sums: ExpertGram, width: int) -> tuple[list[int], list[float]]:
    """The best set at the largest width up to which all were looked at, and the losses from width 0 to there."""
    best, losses = [], [float(sums.energy)]
    num_neurons = len(sums.inner)
    for size in range(1, width + 1 if num_neurons <= SMALL_POOL else 1):
        if math.comb(num_neurons, size) > MOST_ENUMERATED:
            break
        subset = best_scaled_subset(sums, size)  # a neuron's contribution is as good as an expert's
        best = list(subset.experts)
        losses.append(min(subset.loss, losses[-1]))
    return best, losses
