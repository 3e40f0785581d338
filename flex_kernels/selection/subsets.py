"""Several pretrained experts as one graft: the best subset of `r` experts, by two rules, each in one dense pass.

(a) The paper's (arXiv 2506.00965; Lu et al. 2024, "Not All Experts are Equal"): only the experts of `C` remain and the
    router's softmax is taken over them alone, so the weights differ from token to token:

        loss(C) = sum_t || F_t - sum_{i in C} w_ti(C) E_i(x_t) ||^2
                = sum_t ||F_t||^2 - 2 sum_i w_ti <F_t, E_i(x_t)> + sum_ij w_ti w_tj <E_i(x_t), E_j(x_t)>

    The inner products of every token are enough for every `C`: no subset is run again (`RenormalizedLosses`).

(b) A wider graft: the experts side by side, each times a constant that is folded into its down projection:

        loss(C, c) = ||F||^2 - 2 c.b + c^T Q c,   Q_ij = sum_t <E_i, E_j>,   b_i = sum_t <F, E_i>

    Here the summed Gram matrix is exact; the best `c` of a subset solves `Q_CC c = b_C` (`expert_gram`,
    `best_scaled_subset`). For (a) it would not be: its weights differ from token to token and stay inside the sum.

Both sum squares over all tokens, where the rule for one expert (`selection.reconstruction`) sums un-squared norms of
batches. Inner products are taken in fp64, of outputs in the dtype of the hidden states: beside the experts themselves
that costs `E / 3I` of their work.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flex_kernels.ops.checks import autocast_off, check_activation, check_shape, wide_dtype
from flex_kernels.ops.experts import grafted_experts
from flex_kernels.selection.sums import DEPENDENT, check_finite, check_sums, check_tokens, first_lowest

MOST_TOKENS = 256  # in one chunk: rows enough for every expert's matrix products to run at full speed
WORKING_BYTES = 2**29  # of one chunk: activations and outputs of all experts
MOST_SUBSETS = 5_000_000  # 128 choose 4 is 10.7 million
BLOCK_NUMBERS = 2**21  # of subsets looked at together: 16 MiB in fp64


class ExpertGram(NamedTuple):
    """Sums over tokens, fp64; `sums.merged` adds those of two batches."""

    gram: Tensor  # [E, E], sum_t <E_i, E_j>
    inner: Tensor  # [E], sum_t <F, E_i>
    energy: Tensor  # [], sum_t ||F||^2


class Subset(NamedTuple):
    """The chosen experts and the part of the target that they leave unexplained."""

    experts: tuple[int, ...]  # ascending
    scales: tuple[float, ...]  # of each expert's down projection; all 1 under the paper's rule
    loss: float  # squared, summed over tokens


def expert_gram(
    hidden_states: Tensor,
    target: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    activation: str = "silu",
    chunk: int = MOST_TOKENS,
) -> ExpertGram:
    """`Q_ij = sum_t <E_i(x_t), E_j(x_t)>`, `b_i = sum_t <F_t, E_i(x_t)>` and `||F||^2` (rule (b) above).

    Args:
        hidden_states: [T, H], the layer's input; target: [T, H], `F`: the layer's output, or what it is missing.
        gate_up_proj: [E, 2I, H]; down_proj: [E, H, I]. Another dtype than the hidden states' is converted.
        activation: "silu", "gelu" or "gelu_tanh".
        chunk: at most so many tokens at a time, fewer where all experts' outputs would exceed 512 MiB;
            [T, E, H] is never held for more.

    Returns:
        ExpertGram, fp64.

    Raises:
        ValueError: a shape, device or name that does not fit, no tokens, NaN or infinity. TypeError: a dtype.
    """
    _check(hidden_states, target, gate_up_proj, down_proj, activation)
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, expected at least one token")
    num_experts = len(gate_up_proj)
    sums = torch.zeros(num_experts + 1, num_experts + 1, dtype=torch.float64, device=hidden_states.device)
    for _, outputs in _chunks(hidden_states, target, gate_up_proj, down_proj, activation, chunk):
        rows = outputs.flatten(1)  # [E + 1, c * H]
        sums += rows @ rows.T
    return ExpertGram(sums[:-1, :-1].clone(), sums[-1, :-1].clone(), sums[-1, -1].clone())


def best_scaled_subset(sums: ExpertGram, size: int) -> Subset:
    """`argmin_{C, c} ||F||^2 - 2 c.b_C + c^T Q_CC c` over every subset of `size` experts and all constants `c`.

    Where an expert is a combination of others in the subset: of all best constants the shortest. A silent one gets 0.
    Ties, up to rounding, go to the lexicographically first subset.

    Raises:
        ValueError: no such subset, more than 5 million of them, sums that are not finite.
    """
    check_sums(sums)
    num_experts = len(sums.inner)
    subsets = _subsets(num_experts, size).to(sums.gram.device)
    energy = float(sums.energy)
    lengths = sums.gram.diagonal().clamp_min(0).sqrt()  # ||E_i||
    unit = torch.where(lengths > 0, 1 / lengths, 0)
    cosines, inner = sums.gram * unit[:, None] * unit, sums.inner * unit  # [E, E], [E]
    solved = []
    for block in subsets.split(max(1, BLOCK_NUMBERS // size**2)):
        gram, right = cosines[block[:, :, None], block[:, None, :]], inner[block]  # [S, r, r], [S, r]
        scales = _solve(gram, right)
        explained = torch.einsum("si,si->s", scales, 2 * right - torch.einsum("sij,sj->si", gram, scales))
        solved.append(torch.cat([scales * unit[block], energy - explained[:, None]], dim=1))
    *scales, losses = torch.cat(solved).unbind(1)
    best = first_lowest(losses, energy)
    constants = tuple(float(scale[best]) for scale in scales)
    return Subset(tuple(subsets[best].tolist()), constants, max(0.0, float(losses[best])))


class RenormalizedLosses:
    """The loss of every subset of `size` experts under the paper's rule ((a) above), added up over calls of `add`."""

    def __init__(self, num_experts: int, size: int) -> None:
        """Raises ValueError: no such subset, or more than 5 million of them."""
        self.subsets = _subsets(num_experts, size)  # [C, r] int64, lexicographic
        self.num_experts, self.size = num_experts, size
        self.num_tokens = 0
        self._losses = torch.zeros(len(self.subsets), dtype=torch.float64)
        self._energy = 0.0

    def add(
        self,
        hidden_states: Tensor,
        target: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        router_logits: Tensor,
        *,
        activation: str = "silu",
    ) -> None:
        """Adds these tokens: one dense pass, whatever the number of subsets.

        Args:
            hidden_states, target, gate_up_proj, down_proj, activation: as in `expert_gram`.
            router_logits: [T, E], before the softmax.

        Raises:
            ValueError: a shape, device or name that does not fit, no tokens, NaN or infinity. TypeError: a dtype.
        """
        check_shape("gate_up_proj", gate_up_proj, (self.num_experts, "2I", "H"))
        _check(hidden_states, target, gate_up_proj, down_proj, activation)
        check_shape("router_logits", router_logits, (len(hidden_states), self.num_experts))
        check_finite("router_logits", router_logits)
        self.subsets, self._losses = self.subsets.to(hidden_states.device), self._losses.to(hidden_states.device)
        weights = (gate_up_proj, down_proj, activation)
        for tokens, outputs in _chunks(hidden_states, target, *weights, MOST_TOKENS):
            per_token = outputs.transpose(0, 1)  # [c, E + 1, H], F last
            products = (per_token @ per_token.transpose(1, 2)).permute(1, 2, 0).contiguous()  # [E + 1, E + 1, c]
            logits = router_logits[tokens].double().T.contiguous()  # [E, c]
            block = max(1, BLOCK_NUMBERS // (self.size * outputs.shape[1]))
            blocks = zip(self._losses.split(block), self.subsets.split(block), strict=True)
            for losses, subsets in blocks:
                losses += _renormalized(subsets, logits, products)
            self._energy += float(products[-1, -1].sum())
            self.num_tokens += outputs.shape[1]

    def losses(self) -> Tensor:
        """[C(E, r)] fp64, in the order of `subsets`. Raises ValueError before the first token."""
        if self.num_tokens == 0:
            raise ValueError("no tokens were added, expected at least one")
        return self._losses.clone()

    def best(self) -> Subset:
        """The subset of the lowest loss, all scales 1; ties, up to rounding, go to the lexicographically first.

        Raises:
            ValueError: no tokens yet, or an expert whose output is not finite.
        """
        losses = self.losses()
        check_finite("the losses", losses)
        best = first_lowest(losses, self._energy)
        return Subset(tuple(self.subsets[best].tolist()), (1.0,) * self.size, max(0.0, float(losses[best])))


def _renormalized(subsets: Tensor, logits: Tensor, products: Tensor) -> Tensor:
    """[S, r], [E, c], [E + 1, E + 1, c] -> [S]: the loss of each subset on these tokens."""
    weights = torch.softmax(logits[subsets], dim=1)  # [S, r, c]
    losses = products[-1, -1].sum().expand(len(subsets)).clone()
    for i, own in enumerate(subsets.unbind(1)):
        factor = products[own, own] * weights[:, i] - 2 * products[own, -1]  # [S, c]
        for j in range(i):
            factor += 2 * products[own, subsets[:, j]] * weights[:, j]
        losses += (factor * weights[:, i]).sum(1)
    return losses


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """[S, r, r], [S, r] -> [S, r]: `gram^-1 right`, where the diagonal is 1; the shortest solution where singular."""
    factor, info = torch.linalg.cholesky_ex(gram)
    solution = torch.cholesky_solve(right[..., None], factor)[..., 0]
    pivots = factor.diagonal(dim1=1, dim2=2).amin(1)
    singular = (info > 0) | ~(pivots**2 > DEPENDENT)
    if singular.any():
        inverse = torch.linalg.pinv(gram[singular], rtol=DEPENDENT, hermitian=True)
        solution[singular] = torch.einsum("sij,sj->si", inverse, right[singular])
    return solution


def _chunks(
    hidden_states: Tensor, target: Tensor, gate_up_proj: Tensor, down_proj: Tensor, activation: str, chunk: int
) -> Iterator[tuple[slice, Tensor]]:
    """The tokens of each chunk with [E + 1, c, H] fp64, valid until the next: all experts' outputs, the target last."""
    num_experts, hidden_size, width = down_proj.shape
    bytes_a_token = num_experts * (20 * hidden_size + 12 * width)  # outputs in fp64, thrice in fp32 with inputs
    size = max(1, min(chunk, WORKING_BYTES // bytes_a_token, len(hidden_states)))
    buffer = torch.empty(num_experts + 1, size, hidden_size, dtype=torch.float64, device=hidden_states.device)
    for start in range(0, len(hidden_states), size):
        tokens = slice(start, start + size)
        own = hidden_states[tokens].detach()
        # Every token once with every expert: the layer's own grouped products, with all weights 1.
        experts = torch.arange(num_experts, device=own.device).repeat_interleave(len(own))[:, None]
        ones = torch.ones(len(experts), 1, dtype=wide_dtype(own.dtype), device=own.device)
        outputs = buffer[:, : len(own)]
        with torch.no_grad(), autocast_off(own):
            rows = grafted_experts(
                own.repeat(num_experts, 1), experts, ones, gate_up_proj, down_proj, activation=activation
            )
        outputs[:-1] = rows.view(num_experts, len(own), hidden_size)
        outputs[-1] = target[tokens].detach()
        yield tokens, outputs


def _subsets(num_experts: int, size: int) -> Tensor:
    """[C(E, r), r] int64, in lexicographic order."""
    if not 1 <= size <= num_experts:
        raise ValueError(f"size is {size}, expected 1 to {num_experts}, the number of experts")
    count = math.comb(num_experts, size)
    if count > MOST_SUBSETS:
        raise ValueError(f"size is {size}, expected one with at most {MOST_SUBSETS:,} subsets; this one has {count:,}")
    flat = itertools.chain.from_iterable(itertools.combinations(range(num_experts), size))
    return torch.tensor(list(flat), dtype=torch.int64).view(count, size)


def _check(hidden_states: Tensor, target: Tensor, gate_up_proj: Tensor, down_proj: Tensor, activation: str) -> None:
    """The checks that `grafted_experts` does not make itself."""
    check_shape("down_proj", down_proj, ("E", "H", "I"))
    num_experts, _, width = down_proj.shape
    check_shape("gate_up_proj", gate_up_proj, (num_experts, 2 * width, "H"))
    check_tokens(hidden_states, target)
    check_activation(activation)
