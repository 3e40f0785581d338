"""Experts in 8 and 4 bits: what a format means, and the layer on them against the same weights dequantised.

The double rule here compares with the layer on dense weights: both have the values that the format keeps, so what is
measured is the arithmetic and not what quantising lost.
"""

import pytest
import torch
from cases import BY_NAME, CASES, DEVICE, DTYPES, Case, layer_inputs
from compare import assert_double_rule, default_dtype, double, exact
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import flex_kernels
from flex_kernels import plan, reference
from flex_kernels.weights import FORMATS, QUANTIZED, FrozenWeight, keep_stored

EXPERTS = (3, 4)  # positions of gate_up_proj and down_proj
PLAIN, ODD = BY_NAME["plain"], BY_NAME["odd"]
GROUPS = Case("groups", 45, 2, 200, 136, 3, 72, "rows of several groups, the last one not whole")
WHOLE = Case("whole", 40, 2, 128, 64, 3, 64, "whole groups, and more rows an expert than are read in place")
SHAPES = (*CASES, GROUPS, WHOLE)


def quantized(inputs: list, format: str) -> list:
    return [FrozenWeight.quantize(x, format) if i in EXPERTS else x for i, x in enumerate(inputs)]


def dense(inputs: list, dtype: torch.dtype) -> list:
    """The same with the values that the formats keep, in `dtype`."""
    return [x.to(dtype).dequantize() if isinstance(x, FrozenWeight) else x for x in inputs]


def run(function: object, inputs: list, d_out: Tensor, **options: str) -> list[Tensor | None]:
    """The output, and every gradient but the experts'."""
    leaves = [
        x.detach().clone().requires_grad_()
        if isinstance(x, Tensor) and x.is_floating_point() and i not in EXPERTS
        else x
        for i, x in enumerate(inputs)
    ]
    out = function(*leaves, **options)
    out.backward(d_out.to(out.dtype))
    floats = [x for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()]
    return [out.detach(), *(x.grad for x in floats)]


@pytest.mark.parametrize("format", QUANTIZED)
def test_what_a_format_means(format: str) -> None:
    weight = torch.randn(3, 7, 150, device=DEVICE)
    weight[1, 2] = 0
    own = FrozenWeight.quantize(weight, format)
    assert (own.shape, own.dtype, own.device) == (weight.shape, weight.dtype, weight.device)
    found = own.dequantize()
    assert torch.equal(found[1, 2], weight[1, 2])
    values = torch.tensor(reference.NF4_VALUES, device=DEVICE)
    for row, back in zip(weight.flatten(0, 1), found.flatten(0, 1), strict=True):
        if format == "int8":
            torch.testing.assert_close(back, row, rtol=0, atol=float(row.abs().max()) / 127 * 0.5001)
            continue
        for part, own_back in zip(row.split(64), back.split(64), strict=True):
            scale = part.abs().max().bfloat16().float()
            nearest = (part[:, None] - scale * values).abs().amin(1)
            torch.testing.assert_close((own_back - part).abs(), nearest, rtol=1e-5, atol=1e-6)
    again = FrozenWeight.quantize(found, format)
    torch.testing.assert_close(again.dequantize(), found, rtol=1e-6, atol=1e-7)  # a second time loses nothing


@pytest.mark.parametrize("format", QUANTIZED)
def test_any_default_dtype(format: str) -> None:
    """Models are loaded under `torch.set_default_dtype(torch.bfloat16)`."""
    weight = torch.randn(3, 7, 150, device=DEVICE)
    want = FrozenWeight.quantize(weight, format)
    for dtype in (torch.bfloat16, torch.float64):
        with default_dtype(dtype):
            found = FrozenWeight.quantize(weight, format)
            assert torch.equal(found.dequantize(), want.dequantize())
        assert torch.equal(found.codes, want.codes)
        assert torch.equal(found.scales, want.scales)


def test_bits_of_a_weight() -> None:
    weight = torch.randn(4, 128, 256, dtype=torch.bfloat16)
    bits = {format: FrozenWeight.quantize(weight, format).stored_bytes * 8 / weight.numel() for format in QUANTIZED}
    assert bits == {"int8": 8 + 32 / 256, "nf4": 4 + 16 / 64}
    assert {name: entry.codes for name, entry in FORMATS.items() if name in bits} == {
        "int8": torch.int8,
        "nf4": torch.uint8,
    }


def test_nf4_is_the_published_one() -> None:
    """The two byte orders differ; the values and the nearest code of each are bitsandbytes'."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(5, 128)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    torch.testing.assert_close(state.code.float(), torch.tensor(reference.NF4_VALUES), rtol=1e-6, atol=1e-7)
    theirs = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).view(5, 128)
    codes, scales = reference.quantize(weight, "nf4")
    ours = torch.stack([codes & 15, codes >> 4], -1).view(5, 128)
    assert (theirs != ours).float().mean() < 0.02  # our scales are bf16, which moves what lies between two values
    torch.testing.assert_close(scales.float().flatten(), state.absmax, rtol=2**-8, atol=0)


@pytest.mark.parametrize("format", QUANTIZED)
def test_rows_columns_and_experts_alone(format: str) -> None:
    own = FrozenWeight.quantize(torch.randn(3, 20, 70, dtype=torch.bfloat16, device=DEVICE), format)
    whole = own.dequantize()
    experts, rows = torch.tensor([2, 0, 1, 2], device=DEVICE), torch.tensor([3, 19, 0, 3], device=DEVICE)
    columns = torch.tensor([0, 69, 64, 63], device=DEVICE)
    assert torch.equal(own[1], whole[1])
    assert torch.equal(own[-1], whole[-1])
    assert torch.equal(own[experts, rows], whole[experts, rows])
    assert torch.equal(own[experts, :, columns], whole[experts, :, columns])
    assert torch.equal(own[experts], whole[experts])
    assert torch.equal(own.sum(1), whole.sum(1))
    assert torch.equal(own.mT @ own, whole.mT @ whole)


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_forward_and_every_gradient(case: Case, dtype: torch.dtype, format: str, backend: str) -> None:
    for combine in ("additive", "convex"):
        inputs = quantized(layer_inputs(case, dtype), format)
        d_out = torch.randn(case.num_tokens, case.hidden_size).to(DEVICE, dtype)
        ours = run(flex_kernels.grafted_experts, inputs, d_out, combine=combine)
        plain = run(reference.grafted_experts, dense(inputs, dtype), d_out, combine=combine)
        with exact():
            wide = double(dense(inputs, torch.float32))
            truth = run(reference.grafted_experts, wide, d_out.double(), combine=combine)
        assert_double_rule(ours, plain, truth, dtype)


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [PLAIN, ODD, GROUPS, BY_NAME["one-token"]], ids=lambda case: case.name)
def test_scores(case: Case, dtype: torch.dtype, format: str, backend: str) -> None:
    x, _, _, *weights = quantized(layer_inputs(case, dtype), format)[:5]
    target = torch.randn(x.shape, device=DEVICE).to(dtype)
    offsets = torch.tensor([0, case.num_tokens // 2, case.num_tokens], device=DEVICE)
    plain, wide = dense([x, target, *weights], dtype), double(dense([x, target, *weights], torch.float32))
    ours = [flex_kernels.score_experts(x, target, *weights, offsets)]
    with exact():
        truth = [reference.score_experts(*wide, offsets), *reference.score_neurons(*wide)]
    theirs = [reference.score_experts(*plain, offsets), *reference.score_neurons(*plain)]
    ours += flex_kernels.score_neurons(x, target, *weights)
    for column in range(3):
        assert_double_rule(*([part[0][..., column]] for part in (ours, theirs, truth)), dtype, ("sums",), power=2)
    assert_double_rule(ours[1:], theirs[1:], truth[1:], dtype, ("energy", "correlation"), power=2)


@pytest.mark.parametrize("format", QUANTIZED)
def test_neurons_are_gathered(format: str) -> None:
    inputs = quantized(layer_inputs(GROUPS), format)
    ids = torch.tensor([5, 400, 137, 5], device=DEVICE)
    found = flex_kernels.gather_neurons(*inputs[3:5], ids)
    wanted = flex_kernels.gather_neurons(*dense(inputs, torch.float32)[3:5], ids)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("format", QUANTIZED)
def test_no_tokens(format: str, backend: str) -> None:
    inputs = quantized(layer_inputs(Case("none", 0, 1, 16, 8, 4, 8, "T = 0")), format)
    out, *grads = run(flex_kernels.grafted_experts, inputs, torch.zeros(0, 16, device=DEVICE))
    assert out.shape == (0, 16)
    assert all(not grad.any() for grad in grads if grad is not None)


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hidden_states_of_another_dtype_than_the_model_had(dtype: torch.dtype, format: str, backend: str) -> None:
    inputs = quantized(layer_inputs(PLAIN, dtype), format)
    other = [x.to(torch.float16) if isinstance(x, FrozenWeight) else x for x in inputs]
    assert other[3].dtype == torch.float16
    d_out = torch.randn(37, 32, device=DEVICE)
    for a, b in zip(
        run(flex_kernels.grafted_experts, inputs, d_out), run(flex_kernels.grafted_experts, other, d_out), strict=True
    ):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("format", QUANTIZED)
def test_autocast_and_checkpointing(format: str, backend: str) -> None:
    inputs, d_out = quantized(layer_inputs(PLAIN), format), torch.randn(37, 32, device=DEVICE)
    low = [x.bfloat16() if i in (0, 3, 4, 5, 6) else x for i, x in enumerate(inputs)]
    want = run(flex_kernels.grafted_experts, low, d_out)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = run(flex_kernels.grafted_experts, inputs, d_out)
    assert ours[0].dtype == torch.float32
    torch.testing.assert_close(ours[0], want[0].float())
    again = run(lambda *x: checkpoint(flex_kernels.grafted_experts, *x, use_reentrant=False), inputs, d_out)
    for a, b in zip(again, run(flex_kernels.grafted_experts, inputs, d_out), strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("format", QUANTIZED)
def test_opcheck(format: str, backend: str) -> None:
    inputs = quantized(layer_inputs(PLAIN), format)
    codes, scales = zip(*((inputs[i].codes, inputs[i].scales) for i in EXPERTS), strict=True)
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    args = (*leaves[:3], *codes, *leaves[5:], "convex", "silu", True, *scales)
    torch.library.opcheck(torch.ops.flex.grafted_experts.default, args)
    out, *kept = torch.ops.flex.grafted_experts(*args)
    kept, rows = [part.detach() for part in kept[:2]], kept[2:]
    bwd = (torch.randn_like(out), inputs[0], *rows, inputs[2], *codes, *inputs[5:], *kept, "convex", "silu")
    shapes = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.flex.grafted_experts_bwd.default, (*bwd, *[True] * 4, *scales), test_utils=shapes)
    target, offsets = torch.randn_like(inputs[0]), torch.tensor([0, 37], device=DEVICE)
    torch.library.opcheck(
        torch.ops.flex.score_experts.default, (inputs[0], target, *codes, offsets, "silu", *scales), test_utils=shapes
    )
    torch.library.opcheck(
        torch.ops.flex.score_neurons.default, (inputs[0], target, *codes, "silu", *scales), test_utils=shapes
    )


@pytest.mark.parametrize("format", QUANTIZED)
def test_compiles_whole_and_once_for_all_token_counts(format: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flex_kernels.grafted_experts, fullgraph=True, dynamic=True, backend=counter)
    for num_tokens in (37, 12, 91):
        inputs = quantized(layer_inputs(Case("any", num_tokens, 2, 32, 24, 6, 24, "T is dynamic")), format)
        d_out = torch.randn(num_tokens, 32, device=DEVICE)
        ours, want = (run(f, inputs, d_out) for f in (compiled, flex_kernels.grafted_experts))
        for a, b in zip(ours, want, strict=True):
            assert a is b is None or torch.equal(a, b)
    assert counter.frame_count == 1


@pytest.mark.parametrize("format", QUANTIZED)
def test_nothing_dense_is_kept_for_the_backward(format: str) -> None:
    inputs = [
        x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() and i not in EXPERTS else x
        for i, x in enumerate(quantized(layer_inputs(PLAIN), format))
    ]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        flex_kernels.grafted_experts(*inputs)
    assert all(x.dim() < 3 for x in saved)


@pytest.mark.parametrize("format", QUANTIZED)
def test_moving_copying_and_filling(format: str) -> None:
    own = FrozenWeight.quantize(torch.randn(2, 8, 70, device=DEVICE), format)
    half = own.to(torch.bfloat16)
    assert (half.dtype, half.format) == (torch.bfloat16, format)
    assert torch.equal(half.dequantize(), own.dequantize().bfloat16())
    copied = own.clone()
    new = torch.randn(2, 8, 70, device=DEVICE)
    own.copy_(new)
    assert torch.equal(own.dequantize(), FrozenWeight.quantize(new, format).dequantize())
    assert not torch.equal(copied.dequantize(), own.dequantize())
    assert own.to("meta").shape == own.shape
    assert format in repr(own)
    with keep_stored():
        assert isinstance(own.detach(), FrozenWeight)


@pytest.mark.parametrize("format", QUANTIZED)
def test_weights_of_a_format_are_joined_as_they_are(format: str) -> None:
    parts = [torch.randn(8, 70, device=DEVICE) for _ in range(4)]
    kept = [FrozenWeight.quantize(part, format) for part in parts]
    stacked = [torch.stack(kept[:2]), torch.stack(kept[2:])]
    for joined, whole in (
        (stacked[0], torch.stack(parts[:2])),
        (torch.cat(stacked, 1), torch.cat([torch.stack(parts[:2]), torch.stack(parts[2:])], 1)),
        (torch.cat(stacked), torch.stack(parts)),
    ):
        want = FrozenWeight.quantize(whole, format)
        assert isinstance(joined, FrozenWeight)
        assert joined.shape == whole.shape
        assert torch.equal(joined.codes, want.codes)
        assert torch.equal(joined.scales, want.scales)
    dense = torch.cat(stacked, 2)  # along a row, scales are those of other weights
    assert not isinstance(dense, FrozenWeight)
    assert torch.equal(dense, torch.cat([each.dequantize() for each in stacked], 2))
    assert not isinstance(torch.stack([kept[0], parts[1]]), FrozenWeight)


BAD = {
    "expected both of one format": lambda x: (FrozenWeight.quantize(x[3], "nf4"), x[4]),
    "gate_up_proj is int8 and down_proj nf4": lambda x: (
        FrozenWeight.quantize(x[3], "int8"),
        FrozenWeight.quantize(x[4], "nf4"),
    ),
    "gate_up_proj is kept in nf4 and requires grad, expected it frozen": lambda x: (
        FrozenWeight.quantize(x[3], "nf4").requires_grad_(),
        FrozenWeight.quantize(x[4], "nf4"),
    ),
    "down_proj has shape": lambda x: (FrozenWeight.quantize(x[3], "nf4"), FrozenWeight.quantize(x[4][:, :-1], "nf4")),
}


@pytest.mark.parametrize("message", sorted(BAD))
def test_what_does_not_fit_is_refused(message: str) -> None:
    inputs = layer_inputs(PLAIN)
    inputs[3:5] = BAD[message](inputs)
    with pytest.raises(ValueError, match=message):
        flex_kernels.grafted_experts(*inputs)
    with pytest.raises(ValueError, match=message):
        flex_kernels.score_neurons(inputs[0], inputs[0], *inputs[3:5])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("format", QUANTIZED)
def test_weights_that_are_not_finite_are_refused(format: str, value: float) -> None:
    weight = torch.randn(2, 3, 65)
    weight[1, 2, 64] = value
    with pytest.raises(ValueError, match="down_proj has 1 NaN or infinite values, expected finite"):
        FrozenWeight.quantize(weight, format, "down_proj")


def test_the_largest_and_smallest_weights_stay_finite() -> None:
    for value in (torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny, 1e-42):
        for format in QUANTIZED:
            found = FrozenWeight.quantize(torch.full((1, 2, 64), value), format).dequantize()
            assert torch.isfinite(found).all()
            assert (found >= 0).all()
            assert value < 1e-37 or (found / value - 1).abs().max() < 0.01


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="format is 'int4', expected one of int8, nf4"):
        FrozenWeight.quantize(torch.randn(1, 2, 3), "int4")


def test_a_backend_that_cannot_take_a_format_is_not_chosen() -> None:
    for choose in (plan.cpu_backend, plan.cuda_backend):
        for entry in (FORMATS[name] for name in QUANTIZED):
            assert plan.backend_name(choose("experts", torch.float64, entry.codes)) == "torch"
