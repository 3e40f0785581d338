"""The router with the graft's gate as one operation beside PyTorch's own sequence; no gradients, the best round counts.

`torch` is what a model's router and a graft's gate do: `F.linear`, `softmax` in fp32, `topk`, the division by the sum,
and `x.float() @ g + b`; the counts, which `flex` gives as well, are not asked of it. `flex` is the public function with
its checks and the dispatcher, `stage` what the dispatcher calls (csrc): for one token most of `flex` is the way there.
Before anything is measured, all are held against the specification; then they are measured in turns, so that what else
the machine does meets all of them.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flex_kernels
from benchmarks import results
from benchmarks.tables import table
from benchmarks.turns import take_turn
from flex_kernels import plan, reference

HIDDEN_SIZE = 2048
ROUTERS = ((8, 2), (60, 4), (128, 8))  # experts and top-k of Mixtral, Qwen1.5-MoE and Qwen3-30B-A3B
TOKENS = (1, 16, 2048, 8192)
SMALL = ((5, 2), (33,), 64)  # unmeasured: a router, its tokens, the hidden size
DTYPES = (torch.float32, torch.bfloat16)
PROVIDERS = ("flex", "stage", "torch")
MOST_SECONDS, MOST_ROUNDS = 1.5, 500  # for the rounds of one number
Row = tuple[int, int, int, str, str, float]  # experts, top-k, tokens, dtype, provider, seconds


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    router, tokens, hidden_size = SMALL
    small = metafunc.config.getoption("benchmark_disable")
    metafunc.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
    metafunc.parametrize(("num_experts", "top_k"), (router,) if small else ROUTERS)
    metafunc.parametrize("num_tokens", tokens if small else TOKENS)
    metafunc.parametrize("hidden_size", [hidden_size if small else HIDDEN_SIZE])


@pytest.fixture(scope="module")
def route_rows(request: pytest.FixtureRequest) -> Iterator[list[Row]]:
    """Its section is written where every number was measured."""
    rows: list[Row] = []
    yield rows
    if len(rows) == len(ROUTERS) * len(TOKENS) * len(DTYPES) * len(PROVIDERS):
        command = "pytest " + " ".join(map(str, request.config.invocation_params.args))
        results.write({f"{results.isa()}, router": section(rows, command)})


def inputs_of(num_tokens: int, hidden_size: int, num_experts: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    hidden_states = torch.randn(num_tokens, hidden_size).to(dtype)
    router_weight = (torch.randn(num_experts, hidden_size) * hidden_size**-0.5).to(dtype)
    return [hidden_states, router_weight, torch.randn(hidden_size) * hidden_size**-0.5, torch.zeros(1)]


def sequence(hidden_states: Tensor, router_weight: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> list[Tensor]:
    """PyTorch's own: routing weights, expert indices, the gate's logits."""
    probabilities = torch.softmax(F.linear(hidden_states, router_weight), dim=-1, dtype=torch.float32)
    weights, indices = torch.topk(probabilities, top_k, dim=-1)
    return [weights / weights.sum(-1, keepdim=True), indices, hidden_states.float() @ weight + bias]


def runs_of(inputs: list[Tensor], top_k: int) -> dict[str, Callable[[], object]]:
    stage = plan.cpu_backend("grafted_route", inputs[0].dtype, inputs[1].dtype)
    return {
        "flex": lambda: flex_kernels.grafted_route(*inputs, top_k, True),
        "stage": lambda: stage.grafted_route_fwd(*inputs, top_k, True, False),
        "torch": lambda: sequence(*inputs, top_k),
    }


def check(runs: dict[str, Callable[[], object]], inputs: list[Tensor], top_k: int) -> None:
    """No number is published for a kernel that is wrong.

    A row of another choice has a logit that was rounded otherwise; `torch.topk` chooses as it likes at a tie.
    """
    wanted = reference.grafted_route(*inputs, top_k, True)
    for provider, run in runs.items():
        weights, indices, logits = run()[:3]
        same = (indices == wanted[1]).all(1)
        others = int((~same).sum())
        assert provider == "torch" or others <= max(1, len(same) // 100), f"{provider}: another choice in {others} rows"
        tolerance = {"rtol": 2e-2, "atol": 2e-3} if inputs[0].dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(weights[same], wanted[0][same], **tolerance)
        torch.testing.assert_close(logits, wanted[2], rtol=1e-4, atol=1e-4)
        if provider != "torch":
            assert torch.equal(run()[3], torch.bincount(indices.flatten(), minlength=len(inputs[1])).int())


@torch.no_grad()
def test_route(
    num_experts: int,
    top_k: int,
    num_tokens: int,
    hidden_size: int,
    dtype: torch.dtype,
    benchmark,
    route_rows: list[Row],
) -> None:
    inputs = inputs_of(num_tokens, hidden_size, num_experts, dtype)
    runs = runs_of(inputs, top_k)
    check(runs, inputs, top_k)
    if not benchmark.enabled:
        benchmark(runs["flex"])
        return
    best: dict[str, float] = {}
    benchmark.group = f"router E={num_experts} T={num_tokens} {dtype}"
    rounds = max(7, min(MOST_ROUNDS, int(MOST_SECONDS * 1e9 / (num_tokens * num_experts * hidden_size))))
    benchmark.pedantic(take_turn, args=(runs, best), rounds=rounds, warmup_rounds=3)
    short = str(dtype).removeprefix("torch.")
    route_rows += [(num_experts, top_k, num_tokens, short, provider, seconds) for provider, seconds in best.items()]


def section(rows: list[Row], command: str) -> str:
    header = ["E", "K", "T", "dtype", "flex us", "stage us", "torch us", "gain", "gain of the stage"]
    cells = []
    for place in dict.fromkeys(row[:4] for row in rows):
        seconds = {row[4]: row[5] for row in rows if row[:4] == place}
        ours, stage, peer = (seconds[provider] * 1e6 for provider in PROVIDERS)
        times = [f"{x:.1f}" for x in (ours, stage, peer)]
        cells.append([*place, *times, f"{peer / ours:.2f}x", f"{peer / stage:.2f}x"])
    said = f"H = {HIDDEN_SIZE}, with a graft's gate, without gradients (`bench_route.py`)."
    return "\n".join([results.machine(), "", f"    {command}", "", said, "", *table(header, cells)])
