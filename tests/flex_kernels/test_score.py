"""`flex::score_experts` and `flex::score_neurons` against the specification, and against what they are for."""

import pytest
import torch
from cases import BY_NAME, DEVICE, DTYPES, Case, layer_inputs
from compare import assert_double_rule, default_dtype, double, exact
from memory import HAS_PEAK, peak_growth_bytes
from torch import Tensor

import flex_kernels
from flex_kernels import plan, reference

SHAPES = ("plain", "odd", "tiles", "one-token", "one-expert")


def score_inputs(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """hidden_states, target (the layer's own routed output), gate_up_proj, down_proj."""
    inputs = layer_inputs(case, dtype)
    return [inputs[0], reference.grafted_experts(*inputs[:5]), inputs[3], inputs[4]]


def offsets_of(num_tokens: int, *cuts: int) -> Tensor:
    return torch.tensor([0, *(min(cut, num_tokens) for cut in cuts), num_tokens], device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_experts(name: str, dtype: torch.dtype, backend: str) -> None:
    inputs = score_inputs(BY_NAME[name], dtype)
    offsets = offsets_of(len(inputs[0]), 1, 7, 7, 16)  # one token, several, an empty batch, the rest
    ours = flex_kernels.score_experts(*inputs, offsets)
    plain = reference.score_experts(*inputs, offsets)
    with exact():
        truth = reference.score_experts(*double(inputs), offsets)
    assert ours.shape == (5, BY_NAME[name].num_experts, 3)
    for column, title in enumerate(("||F-E||^2", "<F,E>", "||E||^2")):
        columns = ([x[..., column]] for x in (ours, plain, truth))
        assert_double_rule(*columns, dtype, (title,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_neurons(name: str, dtype: torch.dtype, backend: str) -> None:
    inputs = score_inputs(BY_NAME[name], dtype)
    ours, plain = flex_kernels.score_neurons(*inputs), reference.score_neurons(*inputs)
    with exact():
        truth = reference.score_neurons(*double(inputs))
    assert_double_rule([*ours], [*plain], [*truth], dtype, ("energy", "correlation"))


def test_the_three_sums_belong_together(backend: str) -> None:
    inputs = score_inputs(BY_NAME["plain"])
    error, inner, energy = flex_kernels.score_experts(*inputs, offsets_of(37, 10)).unbind(-1)
    target_energy = torch.stack([inputs[1][:10].square().sum(), inputs[1][10:].square().sum()])
    torch.testing.assert_close(error + 2 * inner - energy, target_energy[:, None].expand_as(error))


def test_an_expert_reconstructs_itself(backend: str) -> None:
    x, _, gate_up, down = score_inputs(BY_NAME["plain"])
    own = reference.expert(x, gate_up[3], down[3])
    scores = flex_kernels.score_experts(x, own, gate_up, down, offsets_of(37))
    assert int(scores[0, :, 0].argmin()) == 3
    assert float(scores[0, 3, 0]) < 1e-8
    energy, correlation = flex_kernels.score_neurons(x, own, gate_up, down)
    assert energy.shape == correlation.shape == (6, 24)
    torch.testing.assert_close(correlation[3].sum(), own.square().sum(), rtol=1e-4, atol=1e-4)  # sum_j a_j d_j = E(x)


def test_neither_is_differentiable_and_neither_fails_on_trained_weights() -> None:
    inputs = [x.requires_grad_() for x in score_inputs(BY_NAME["plain"])]
    assert not flex_kernels.score_experts(*inputs, offsets_of(37)).requires_grad
    assert not flex_kernels.score_neurons(*inputs)[0].requires_grad


def test_under_autocast_they_stay_exact(backend: str) -> None:
    inputs = score_inputs(BY_NAME["plain"])
    want = flex_kernels.score_experts(*inputs, offsets_of(37))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(flex_kernels.score_experts(*inputs, offsets_of(37)), want)


def test_any_default_dtype(backend: str) -> None:
    inputs = score_inputs(BY_NAME["plain"])
    want = flex_kernels.score_experts(*inputs, offsets_of(37)), *flex_kernels.score_neurons(*inputs)
    for dtype in (torch.bfloat16, torch.float64):
        with default_dtype(dtype):
            found = flex_kernels.score_experts(*inputs, offsets_of(37)), *flex_kernels.score_neurons(*inputs)
        for a, b in zip(found, want, strict=True):
            assert torch.equal(a, b)


def test_no_tokens(backend: str) -> None:
    inputs = layer_inputs(Case("none", 0, 1, 16, 8, 4, 0, "T = 0"))
    x, gate_up, down = inputs[0], inputs[3], inputs[4]
    scores = flex_kernels.score_experts(x, x, gate_up, down, torch.zeros(2, dtype=torch.int32, device=DEVICE))
    assert torch.equal(scores, torch.zeros(1, 4, 3, device=DEVICE))
    assert torch.equal(flex_kernels.score_neurons(x, x, gate_up, down)[0], torch.zeros(4, 8, device=DEVICE))


@pytest.mark.skipif(not HAS_PEAK or DEVICE != "cpu", reason="the peak is read from Linux, of memory on the CPU")
@pytest.mark.skipif(plan.INTERPRET, reason="the interpreter's memory is not the kernels'")
def test_the_outputs_of_all_experts_are_never_held(backend: str) -> None:
    body = (
        "flex_kernels.score_experts(x, target, GATE_UP, DOWN, torch.tensor([0, len(x) // 2, len(x)])); "
        "flex_kernels.score_neurons(x, target, GATE_UP, DOWN)"
    )
    growth = peak_growth_bytes(body, backend, num_tokens=16384, hidden_size=256, num_experts=40, width=16)
    assert growth < 16384 * 40 * 256 * 4 / 2  # [T, E, H] in fp32


def test_opcheck(backend: str) -> None:
    inputs = score_inputs(BY_NAME["plain"])
    for offsets in (offsets_of(37, 5), offsets_of(37, 5).int()):
        torch.library.opcheck(torch.ops.flex.score_experts.default, (*inputs, offsets, "silu"))
    torch.library.opcheck(torch.ops.flex.score_neurons.default, (*inputs, "gelu"))


def test_compile_whole() -> None:
    torch._dynamo.reset()
    inputs, offsets = score_inputs(BY_NAME["plain"]), offsets_of(37, 9)
    for function, args in ((flex_kernels.score_experts, (*inputs, offsets)), (flex_kernels.score_neurons, inputs)):
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*args), function(*args), rtol=0, atol=0)


@pytest.mark.parametrize(
    "offsets", [[0, 5], [1, 37], [0, 20, 10, 37], [0], [37]], ids=["short", "late", "back", "none", "one"]
)
def test_offsets_that_do_not_cut_the_tokens_are_refused(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="expected it to ascend from 0 to 37"):
        flex_kernels.score_experts(*score_inputs(BY_NAME["plain"]), torch.tensor(offsets, device=DEVICE))


@pytest.mark.parametrize(
    ("position", "error", "message"),
    [(1, ValueError, "target has shape"), (2, ValueError, "gate_up_proj has shape"), (3, ValueError, "down_proj has")],
)
def test_bad_shapes(position: int, error: type[Exception], message: str) -> None:
    inputs = score_inputs(BY_NAME["plain"])
    inputs[position] = inputs[position][..., 1:, :]
    with pytest.raises(error, match=message):
        flex_kernels.score_neurons(*inputs)
