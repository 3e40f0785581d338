"""The kernels on a device, at sizes of real models: errors, repeated bits, CUDA graphs. Not run without one."""

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cases import Case, layer_inputs
from compare import assert_double_rule
from torch import Tensor

from flex_kernels import plan, reference, tuning
from flex_kernels.backends import native, pytorch
from flex_kernels.backends.call import LayerCall
from flex_kernels.backends.triton import stages, tile_file, tiles

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(plan.INTERPRET, reason="compiled kernels only"),
]
QWEN = Case("qwen1.5-moe", 4096, 4, 2048, 1408, 60, 1408, "Qwen1.5-MoE-A2.7B")
MIXTRAL_LIKE = Case("mixtral-like", 3000, 2, 4096, 3584, 8, 512, "few wide experts, T no multiple of a tile")
PLANNERS = {"triton": stages.routing_plan, "torch": pytorch.routing_plan}
if native.cuda_module() is not None:
    PLANNERS["cuda"] = native.routing_plan
planners = pytest.mark.parametrize("planner", PLANNERS.values(), ids=PLANNERS)
FEW_TOKENS = Case("few-tokens", 17, 8, 2048, 768, 128, 768, "most experts idle: decoding")


def forward_and_backward(backend: ModuleType, inputs: list, d_out: Tensor, combine: str) -> list[Tensor]:
    hidden_states, indices, weights, gate_up, down, *graft = inputs
    pairs, _, offsets = stages.routing_plan(indices, gate_up.shape[0])
    call = LayerCall(hidden_states, pairs, offsets, weights, gate_up, down, *graft, combine)
    out, *saved = backend.experts_fwd(call, True)
    grads = backend.experts_bwd(d_out, call, *saved)
    return [out, *grads]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [QWEN, MIXTRAL_LIKE, FEW_TOKENS], ids=lambda case: case.name)
def test_double_rule_at_real_sizes(case: Case, dtype: torch.dtype) -> None:
    inputs, d_out = layer_inputs(case, dtype), torch.randn(case.num_tokens, case.hidden_size, device="cuda").to(dtype)
    wide = [x.float() if x.is_floating_point() else x for x in inputs]
    ours = forward_and_backward(stages, inputs, d_out, "convex")
    plain = forward_and_backward(pytorch, inputs, d_out, "convex")
    truth = [x.double() for x in forward_and_backward(pytorch, wide, d_out.float(), "convex")]
    names = (
        "out",
        "d_hidden_states",
        "d_routing_weights",
        "d_graft_gate_up_proj",
        "d_graft_down_proj",
        "d_graft_logits",
    )
    assert_double_rule(ours, plain, truth, dtype, names)


def test_the_same_bits_ten_times() -> None:
    inputs = layer_inputs(QWEN, torch.bfloat16)
    d_out = torch.randn(QWEN.num_tokens, QWEN.hidden_size, device="cuda").bfloat16()
    first = forward_and_backward(stages, inputs, d_out, "additive")
    for _ in range(9):
        for a, b in zip(first, forward_and_backward(stages, inputs, d_out, "additive"), strict=True):
            assert torch.equal(a, b)


def captured(function: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@pytest.mark.parametrize("case", [QWEN, FEW_TOKENS], ids=lambda case: case.name)
def test_a_cuda_graph_follows_new_routing(case: Case) -> None:
    inputs = layer_inputs(case, torch.bfloat16)
    d_out = torch.randn(case.num_tokens, case.hidden_size, device="cuda").bfloat16()
    graph, results = captured(lambda: forward_and_backward(stages, inputs, d_out, "convex"))
    for _ in range(3):
        without_weights = replace(case, intermediate_size=1, graft_width=0)
        for x, new in zip(inputs[:3], layer_inputs(without_weights, torch.bfloat16)[:3], strict=True):
            x.copy_(new)
        graph.replay()
        for a, b in zip(results, forward_and_backward(stages, inputs, d_out, "convex"), strict=True):
            assert torch.equal(a, b)


def test_tiles_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On few candidates. The second process, played by empty caches, reads the file and measures nothing."""
    case = Case("tuned", 500, 4, 512, 384, 8, 256, "quick to measure, a graft narrower than an expert")
    inputs = layer_inputs(case, torch.bfloat16)
    d_out = torch.randn(case.num_tokens, case.hidden_size, device="cuda").bfloat16()
    path, state = tmp_path / "tiles.json", torch.cuda.get_rng_state()
    monkeypatch.setattr(tuning, "MOST_NEIGHBOURS", 6)
    monkeypatch.setattr(tiles, "_measure", tuning.tune)
    monkeypatch.setattr(tiles, "_chosen", {})
    monkeypatch.setenv("FLEX_TILES", "")
    monkeypatch.setenv("FLEX_TUNE", "0")
    tile_file.remembered.cache_clear()
    of_the_table = forward_and_backward(stages, inputs, d_out, "convex")
    try:
        monkeypatch.setenv("FLEX_TILES", str(path))
        monkeypatch.setenv("FLEX_TUNE", "1")
        tiles._chosen.clear()
        tile_file.remembered.cache_clear()
        with pytest.warns(RuntimeWarning, match="measuring tiles once"):
            measured = forward_and_backward(stages, inputs, d_out, "convex")
        (entry,) = json.loads(path.read_text())["entries"]
        assert entry["chip"] == torch.cuda.get_device_name()
        assert 0 < entry["ms"] <= entry["default_ms"]
        assert torch.equal(torch.cuda.get_rng_state(), state)

        monkeypatch.setattr(tuning, "measure", None)
        for new_process in (False, True):
            if new_process:
                tiles._chosen.clear()
                tile_file.remembered.cache_clear()
            with warnings.catch_warnings(action="error", category=RuntimeWarning):
                again = forward_and_backward(stages, inputs, d_out, "convex")
            for a, b in zip(measured, again, strict=True):
                assert torch.equal(a, b)
    finally:
        tile_file.remembered.cache_clear()
    for a, b in zip(measured, of_the_table, strict=True):
        assert float((a.float() - b.float()).norm() / b.float().norm()) < 2e-2


def test_a_capture_does_not_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table's kernels are compiled, then a graph is captured before anything was measured."""
    inputs = layer_inputs(FEW_TOKENS, torch.bfloat16)
    d_out = torch.randn(FEW_TOKENS.num_tokens, FEW_TOKENS.hidden_size, device="cuda").bfloat16()
    monkeypatch.setenv("FLEX_TILES", "")
    monkeypatch.setattr(tuning, "measure", None)
    tile_file.remembered.cache_clear()

    def run() -> list[Tensor]:
        monkeypatch.setattr(tiles, "_chosen", {})
        monkeypatch.setenv("FLEX_TUNE", "1" if torch.cuda.is_current_stream_capturing() else "0")
        return forward_and_backward(stages, inputs, d_out, "convex")

    graph, results = captured(run)
    assert not tiles._chosen
    graph.replay()
    monkeypatch.setenv("FLEX_TUNE", "0")
    for a, b in zip(results, forward_and_backward(stages, inputs, d_out, "convex"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts"),
    [(32768, 8, 128), (8192, 4, 60), (100_000, 2, 8), (3, 1, 60), (0, 2, 8), (2049, 2, 1400)],
)
@planners
def test_routing_plan_at_real_sizes(
    planner: Callable, num_tokens: int, top_k: int, num_experts: int, dtype: torch.dtype
) -> None:
    """Ids `num_experts` and -1 stand for experts elsewhere; each planner gives the reference's bits, ten times."""
    indices = torch.randint(-1, num_experts + 1, (num_tokens, top_k), device="cuda", dtype=dtype)
    wanted = reference.routing_plan(indices.where(indices >= 0, num_experts), num_experts)
    for _ in range(10):
        for ours, theirs in zip(planner(indices, num_experts), wanted, strict=True):
            assert ours.dtype == torch.int32
            assert torch.equal(ours, theirs)


@planners
def test_a_cuda_graph_of_the_routing_plan_follows_new_routing(planner: Callable) -> None:
    indices = torch.randint(0, 60, (8192, 4), device="cuda")
    graph, results = captured(lambda: list(planner(indices, 60)))
    for high in (60, 3, 61):
        indices.copy_(torch.randint(0, high, indices.shape, device="cuda"))
        graph.replay()
        for ours, theirs in zip(results, reference.routing_plan(indices, 60), strict=True):
            assert torch.equal(ours, theirs)


@planners
def test_the_routing_plan_runs_on_the_current_stream(planner: Callable) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # what follows on this stream is late; elsewhere it would read zeros
        indices = torch.zeros(4096, 4, device="cuda", dtype=torch.int64)
        indices.copy_(torch.randint(0, 60, indices.shape, device="cuda"))
        results = planner(indices, 60)
    stream.synchronize()
    for ours, theirs in zip(results, reference.routing_plan(indices, 60), strict=True):
        assert torch.equal(ours, theirs)
