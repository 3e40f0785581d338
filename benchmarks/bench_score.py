"""Scoring all experts of a layer beside the bare matrix products of the same rows, and beside the published way.

`flex` is `score_experts`. `products` is what no scoring can do without: for each expert `X [G_U]^T` and `A D^T` by
`torch.mm` into buffers that are there already; no activation, no sums. `published` runs every expert on every token,
keeps all outputs [E, T, H], and takes the norms of their differences from the target. The best round counts.
"""

import time
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor

import flex_kernels
from benchmarks.layers import CHECKED_TOKENS, TOLERANCE
from benchmarks.results import ScoreRow
from benchmarks.shapes import Shape
from flex_kernels import reference

PROVIDERS = ("flex", "products", "published")
MOST_SECONDS = 4.0  # for the rounds of one number
MOST_ROUNDS = 100


class Scoring:
    """All providers of one shape and dtype, on the same weights and tokens."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        H, E, width = shape.hidden_size, shape.num_experts, shape.intermediate_size
        self.dtype = dtype
        self.gate_up_proj = torch.empty(E, 2 * width, H, dtype=dtype)
        self.down_proj = torch.empty(E, H, width, dtype=dtype)
        for expert in range(E):  # one at a time: the generator works in fp32
            self.gate_up_proj[expert] = torch.randn(2 * width, H) * H**-0.5
            self.down_proj[expert] = torch.randn(H, width) * width**-0.5
        self.hidden_states = torch.randn(shape.num_tokens, H).to(dtype)
        self.target = torch.randn(shape.num_tokens, H).to(dtype)

    def flex(self, num_tokens: int | None = None) -> Callable[[], Tensor]:
        x, target = self.hidden_states[:num_tokens], self.target[:num_tokens]
        offsets = torch.tensor([0, len(x) // 2, len(x)])  # two calibration batches
        return lambda: flex_kernels.score_experts(x, target, self.gate_up_proj, self.down_proj, offsets)

    def products(self, num_tokens: int | None = None) -> Callable[[], Tensor]:
        x = self.hidden_states[:num_tokens]
        preactivations = torch.empty(len(x), self.gate_up_proj.shape[1], dtype=self.dtype)
        activations = torch.randn(len(x), self.down_proj.shape[2]).to(self.dtype)
        out = torch.empty_like(x)

        def run() -> Tensor:
            for gate_up, down in zip(self.gate_up_proj, self.down_proj, strict=True):
                torch.mm(x, gate_up.T, out=preactivations)
                torch.mm(activations, down.T, out=out)
            return out

        return run

    def published(self, num_tokens: int | None = None) -> Callable[[], Tensor]:
        x, target = self.hidden_states[:num_tokens], self.target[:num_tokens]

        def run() -> Tensor:
            experts = zip(self.gate_up_proj, self.down_proj, strict=True)
            outputs = torch.stack([reference.expert(x, gate_up, down) for gate_up, down in experts])  # [E, T, H]
            halves = zip(outputs.chunk(2, dim=1), target.chunk(2), strict=True)
            return sum((own - half).float().flatten(1).norm(dim=1) for half, own in halves)

        return run

    def check(self) -> None:
        """No number is published for a kernel that is wrong."""
        tokens = min(CHECKED_TOKENS, len(self.hidden_states)) // 2 * 2  # so that both cut their batches alike
        ours = self.flex(tokens)().double()
        x, target = self.hidden_states[:tokens], self.target[:tokens]
        offsets = torch.tensor([0, tokens // 2, tokens])
        truth = reference.score_experts(x, target, self.gate_up_proj, self.down_proj, offsets).double()
        for index, name in enumerate(("||F-E||^2", "<F,E>", "||E||^2")):
            error = (ours - truth)[..., index].norm() / truth[..., index].norm()
            assert error < TOLERANCE[self.dtype], f"{name}: relative error {error:.3g}"
        rule, norms = flex_kernels.reconstruction(ours.float()), self.published(tokens)().double()
        assert (rule - norms).norm() / norms.norm() < TOLERANCE[self.dtype], "the published way gives other norms"


@lru_cache(maxsize=1)  # the weights of one layer may be 2 GB
def scoring_of(shape: Shape, dtype: torch.dtype) -> Scoring:
    scoring = Scoring(shape, dtype)
    scoring.check()
    return scoring


@pytest.mark.parametrize("provider", PROVIDERS)
def test_score(shape: Shape, dtype: torch.dtype, provider: str, benchmark, score_rows: list[ScoreRow]) -> None:
    of_provider = getattr(scoring_of(shape, dtype), provider)
    run = of_provider()
    if not benchmark.enabled:
        benchmark(run)
        return
    short = of_provider(CHECKED_TOKENS)
    short()
    start = time.perf_counter()
    short()
    seconds = (time.perf_counter() - start) * max(1.0, shape.num_tokens / CHECKED_TOKENS)
    rounds = int(max(3, min(MOST_ROUNDS, MOST_SECONDS / seconds)))
    benchmark.group = f"{shape.name} {dtype} score"
    benchmark.pedantic(run, rounds=rounds if seconds < 10 else 1, warmup_rounds=1 if seconds < 10 else 0)
    row = ScoreRow(shape, str(dtype).removeprefix("torch."), provider, benchmark.stats.stats.min)
    benchmark.extra_info.update(gflops=round(row.gflops, 1))
    score_rows.append(row)
