"""The down projection that fits the target best: ridge regression in closed form, on sums over tokens.

    argmin_D  ||F - A D^T||^2 + lambda ||D - D_0||^2,   lambda = ridge * mean_j (A^T A)_jj

`A` [T, n] are activations, `D_0` [H, n] the pretrained columns: `ridge` counts in units of a neuron's mean energy, so
that one value serves every layer. With `D = D_0 + C` it is `(A^T A + lambda) C^T = A^T F - A^T A D_0^T`. Sums of one
whole expert's `gate_up_proj` refit that expert.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flex_kernels.ops.checks import check_shape, wide_dtype
from flex_kernels.selection.neurons import NeuronSums
from flex_kernels.selection.sums import check_finite, check_sums

SINGULAR = 1e-12  # of the largest pivot: past that a Cholesky factor in fp64 is rounding errors


class Refit(NamedTuple):
    down_proj: Tensor  # [H, n] fp32; fp64 where the given one was
    before: float  # share of ||F||^2 that the given down projection leaves unexplained
    after: float  # the same with the refitted one; on these very tokens, so see `unexplained` on others


def refit_down(sums: NeuronSums, down_proj: Tensor, ridge: float) -> Refit:
    """`argmin_D ||F - A D^T||^2 + lambda ||D - D_0||^2`, `lambda = ridge * mean diagonal of A^T A`, in fp64.

    Where `A^T A + lambda` is singular (ridge 0 and neurons that depend on each other, or are silent), of all best `D`
    the one nearest to `D_0`: the limit of a small ridge.

    Args:
        sums: `neuron_sums` of the `n` neurons; down_proj: [H, n], `D_0`; ridge: not negative.
    Raises:
        ValueError: a shape that does not fit, a ridge below 0, sums that are not finite, a target of zeros, no tokens.
    """
    before = unexplained(sums, down_proj)
    if not (0 <= ridge < float("inf")):
        raise ValueError(f"ridge is {ridge}, expected a finite number, at least 0")
    old = down_proj.detach().double()
    penalty = ridge * sums.gram.diagonal().mean()
    matrix = sums.gram + penalty * torch.eye(len(sums.gram), dtype=torch.float64, device=sums.gram.device)
    right = sums.cross - sums.gram @ old.T  # [n, H]
    factor, info = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal() ** 2
    if int(info) == 0 and pivots.min() > SINGULAR * pivots.max():
        change = torch.cholesky_solve(right, factor)
    else:
        change = torch.linalg.pinv(matrix, rtol=SINGULAR, hermitian=True) @ right
    new = (old + change.T).to(wide_dtype(down_proj.dtype)).contiguous()
    return Refit(new, before, unexplained(sums, new))


def unexplained(sums: NeuronSums, down_proj: Tensor) -> float:
    """The share of `||F||^2` that `A D^T` leaves: 0 is perfect, 1 no better than nothing, more is worse than nothing.

    Args:
        sums: of any tokens, those held out of the fit as well; down_proj: [H, n].
    Raises:
        ValueError: a shape that does not fit, sums that are not finite, a target of zeros or no tokens.
    """
    check_sums(sums)
    check_shape("down_proj", down_proj, (sums.cross.shape[1], len(sums.gram)))
    check_finite("down_proj", down_proj)
    if not sums.energy > 0:
        raise ValueError("NeuronSums.energy is 0, expected tokens with a target that is not zero everywhere")
    down = down_proj.detach().double()
    explained = 2 * (sums.cross * down.T).sum() - ((down @ sums.gram) * down).sum()
    return max(0.0, float(1 - explained / sums.energy))
