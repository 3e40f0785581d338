"""csrc's experts and scores: every instruction set of this machine, any number of threads, forks, and bad input.

The operations' own tests (`test_experts.py`, `test_score.py`) run on this backend too; here is what is csrc's alone.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from cases import BY_NAME, Case, layer_inputs
from compare import assert_double_rule, double, exact, forward_and_grads
from torch import Tensor

import flex_kernels
from flex_kernels import plan, reference
from flex_kernels.backends import native
from flex_kernels.backends.call import LayerCall, Needs
from flex_kernels.weights import QUANTIZED, FrozenWeight

pytestmark = pytest.mark.skipif(native.module() is None, reason="the native module was not built")
ISAS = native.module().available_isas() if native.module() is not None else []
FP32, BF16 = torch.float32, torch.bfloat16

SHAPES = (
    BY_NAME["odd"],
    BY_NAME["sentinels"],
    BY_NAME["elsewhere"],
    BY_NAME["no-graft"],
    BY_NAME["thin-graft"],
    Case("blocks", 130, 2, 40, 150, 2, 140, "more than one block of rows and of columns"),
    Case("slices", 17, 2, 530, 270, 3, 20, "a depth of several slices, in fp32 and in pairs of bf16"),
)
WAVES = Case("waves", 1100, 2, 16, 1030, 3, 700, "more activations than one wave holds")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FLEX_ISA", request.param)
    return request.param


@pytest.fixture(autouse=True)
def native_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also under the interpreter, and on a machine with a device."""
    monkeypatch.setattr(plan, "INTERPRET", False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def inputs_of(case: Case, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> list:
    return [x if x is None else x.cpu() for x in layer_inputs(case, dtype, weight_dtype)]


def everything(inputs: list, combine: str = "convex", activation: str = "silu") -> list[Tensor]:
    """All that csrc computes for one layer, every gradient included."""
    x, indices, weights, gate_up, down, *graft = inputs
    sorted_pairs, _, offsets = native.routing_plan(indices, gate_up.shape[0])
    needs = Needs(True, True, graft[0] is not None, graft[0] is not None)
    call = LayerCall(x, sorted_pairs, offsets, weights, gate_up, down, *graft, combine, activation, needs)
    d_out = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    out, z, graft_z = native.experts_fwd(call, True)
    grads = native.experts_bwd(d_out, call, z, graft_z)
    batches = torch.tensor([0, len(x) // 3, len(x)])
    scores = native.score_experts(x, d_out, gate_up, down, batches, activation)
    return [out, z, graft_z, *grads, scores, *native.score_neurons(x, d_out, gate_up, down, activation)]


def assert_same_bits(a: list[Tensor], b: list[Tensor]) -> None:
    for index, (one, other) in enumerate(zip(a, b, strict=True)):
        assert torch.equal(one, other), f"result {index} differs by {(one.float() - other.float()).abs().max()}"


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (FP32, BF16), (BF16, FP32)], ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_every_instruction_set(case: Case, dtypes: tuple[torch.dtype, torch.dtype], isa: str) -> None:
    compare(case, *dtypes)


def quantized(inputs: list, format: str) -> list:
    return [FrozenWeight.quantize(x, format) if i in (3, 4) else x for i, x in enumerate(inputs)]


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_every_instruction_set_on_codes(case: Case, dtype: torch.dtype, format: str, isa: str) -> None:
    compare_codes(case, dtype, format)


def compare_codes(case: Case, dtype: torch.dtype, format: str) -> None:
    torch.set_num_threads(2)
    inputs = quantized(inputs_of(case, dtype), format)
    if format == "int8":
        for weight in inputs[3:5]:
            weight.codes[:, ::3, ::5] = -128  # none of ours, but of checkpoints that are read as they are
    d_out = torch.randn(case.num_tokens, case.hidden_size).to(dtype)
    plain = [x.dequantize() if isinstance(x, FrozenWeight) else x for x in inputs]
    wide = double([x.float().dequantize() if isinstance(x, FrozenWeight) else x for x in inputs])
    leaves = [x.requires_grad_() if x is not None and i in (0, 2, 5, 6, 7) else x for i, x in enumerate(inputs)]
    out = flex_kernels.grafted_experts(*leaves, combine="convex")
    out.backward(d_out)
    ours = [out.detach(), *(None if x is None else x.grad for x in leaves if x is None or x.is_floating_point())]
    theirs = forward_and_grads(reference.grafted_experts, plain, d_out, (3, 4), combine="convex")
    with exact():
        truth = forward_and_grads(reference.grafted_experts, wide, d_out.double(), (3, 4), combine="convex")
    assert_double_rule(ours[: len(truth)], theirs, truth, dtype)


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("case", [*SHAPES[:2], *SHAPES[-2:]], ids=lambda case: case.name)
def test_any_number_of_threads_the_same_bits_on_codes(case: Case, dtype: torch.dtype, format: str, isa: str) -> None:
    inputs = quantized(inputs_of(case, dtype), format)
    inputs[3:5] = [weight.stored for weight in inputs[3:5]]
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(everything(inputs))
    assert_same_bits(*results)


@pytest.mark.parametrize("format", QUANTIZED)
def test_codes_that_are_too_short_are_refused(format: str) -> None:
    inputs = quantized(inputs_of(BY_NAME["plain"], FP32), format)
    own = inputs[3].stored
    for short in (own._replace(codes=own.codes[..., :-1]), own._replace(scales=own.scales[:, :-1])):
        with pytest.raises(ValueError, match=r"the (codes|scales) has shape"):
            everything([*inputs[:3], short, inputs[4].stored, *inputs[5:]])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_rows_in_several_waves(dtype: torch.dtype) -> None:
    compare(WAVES, dtype, dtype)


def compare(case: Case, *dtypes: torch.dtype) -> None:
    torch.set_num_threads(2)
    inputs, frozen = inputs_of(case, *dtypes), (3, 4)
    d_out = torch.randn(case.num_tokens, case.hidden_size).to(dtypes[0])
    same = [x.to(dtypes[0]) if index in frozen else x for index, x in enumerate(inputs)]
    ours = forward_and_grads(flex_kernels.grafted_experts, inputs, d_out, frozen, combine="convex")
    plain = forward_and_grads(reference.grafted_experts, same, d_out, frozen, combine="convex")
    with exact():
        truth = forward_and_grads(reference.grafted_experts, double(inputs), d_out.double(), frozen, combine="convex")
    assert_double_rule(ours, plain, truth, dtypes[0])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
def test_activations_far_out(activation: str, dtype: torch.dtype, isa: str) -> None:
    """One expert that is the identity but for its activation: large, tiny and special inputs."""
    gate = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 0.5, -0.5, 3, -3, 9, -9, 30, -30, 88, -88, 1e4, -1e4], dtype=dtype)
    width = len(gate)
    x = torch.stack([gate, torch.linspace(-6, 6, width).to(dtype)])
    eye = torch.eye(width, dtype=dtype)
    gate_up = torch.cat([eye, torch.zeros_like(eye)])[None].clone()
    gate_up[0, width:, 0] = 1  # up = x[0], which is set to 1 below
    x[:, 0] = 1
    plan_of_rows = native.routing_plan(torch.zeros(2, 1, dtype=torch.int64), 1)
    rows, down, needs = (x, plan_of_rows[0], plan_of_rows[2]), eye[None].clone(), Needs(True, False, False, False)
    layer = LayerCall(*rows, torch.ones(2, 1), gate_up, down, activation=activation, needs=needs)
    out, z, _ = native.experts_fwd(layer, True)
    wide = x.double()
    act = reference.ACTIVATIONS[activation]
    torch.testing.assert_close(out.double(), act(wide), rtol=2e-6 if dtype == FP32 else 8e-3, atol=5e-7)
    grads = native.experts_bwd(torch.ones_like(x), layer, z, z.new_empty(0, 0))
    leaf = wide.clone().requires_grad_()
    act(leaf).sum().backward()
    want = leaf.grad.clone()
    want[:, 0] += act(wide).sum(1)  # through up
    torch.testing.assert_close(grads[0].double(), want, rtol=4e-6 if dtype == FP32 else 2e-2, atol=1e-6)


def test_nan_and_infinity_come_through(isa: str) -> None:
    for dtype in (FP32, BF16):
        inputs = inputs_of(BY_NAME["plain"], dtype)
        inputs[0][3, 5], inputs[0][8, 0] = float("nan"), float("inf")
        out = everything(inputs, "additive")[0]
        bad = torch.zeros(len(out), dtype=torch.bool)
        bad[[3, 8]] = True
        assert torch.equal(~torch.isfinite(out).all(1), bad)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("case", [*SHAPES[:2], *SHAPES[-2:]], ids=lambda case: case.name)
def test_any_number_of_threads_the_same_bits(case: Case, dtype: torch.dtype, isa: str) -> None:
    assert_any_threads(case, dtype)


COMPANY = Case("company", 420, 1, 1090, 600, 1, 300, "rows packed once, or slice by slice, of five")


@pytest.mark.parametrize("format", ["dense", *QUANTIZED])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_token_has_the_same_bits_in_any_company(dtype: torch.dtype, format: str, isa: str) -> None:
    """Few rows of an expert read the weights where they lie and sum in another order; up to how many hangs on the
    instruction set and the weights. On AMX bf16 has one order."""
    inputs = inputs_of(COMPANY, dtype)
    x, indices, weights, gate_up, down, *graft = inputs if format == "dense" else quantized(inputs, format)
    if format != "dense":
        gate_up, down = gate_up.stored, down.stored

    def first_token(count: int) -> list[Tensor]:
        sorted_pairs, _, offsets = native.routing_plan(indices[:count], 1)
        some = (x[:count], sorted_pairs, offsets, weights[:count], gate_up, down, *graft[:2], graft[2][:count])
        out, z, graft_z = native.experts_fwd(LayerCall(*some, combine="convex"), True)
        return [out[:1], z[:1], graft_z[:1]]

    many, few = first_token(420), first_token(1)
    for count in (192, 97):
        assert_same_bits(many, first_token(count))
    for count in (2, 3, 4):
        assert_same_bits(few, first_token(count))
    for count in (65, 17, 13, 7, 5):
        for found, *orders in zip(first_token(count)[1:], many[1:], few[1:], strict=True):
            assert any(torch.equal(found, order) for order in orders)
    if isa == "amx" and (dtype, format) == (BF16, "dense"):
        assert_same_bits(many, few)


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_codes_of_many_slices(dtype: torch.dtype, format: str, isa: str) -> None:
    compare_codes(COMPANY, dtype, format)


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (FP32, BF16)], ids=str)
def test_weights_of_many_slices(dtypes: tuple[torch.dtype, torch.dtype], isa: str) -> None:
    compare(COMPANY, *dtypes)


def test_waves_on_any_number_of_threads() -> None:
    assert_any_threads(WAVES, FP32)


def assert_any_threads(case: Case, dtype: torch.dtype) -> None:
    inputs, results = inputs_of(case, dtype), []
    for threads in (1, 2, 2, 7):
        torch.set_num_threads(threads)
        results.append(everything(inputs))
        assert_same_bits(results[0], results[-1])


def test_two_callers_at_once() -> None:
    inputs = [inputs_of(SHAPES[-1], FP32), inputs_of(SHAPES[-2], BF16)]
    wanted, failures = [everything(one) for one in inputs], []

    def call(which: int) -> None:
        try:
            torch.set_num_threads(2)
            for _ in range(10):
                assert_same_bits(wanted[which], everything(inputs[which]))
        except BaseException as error:
            failures.append(error)

    callers = [threading.Thread(target=call, args=(which,)) for which in (0, 1, 0)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures, failures


SUBPROCESS = """
import os, sys
sys.path[:0] = {paths!r}
import torch
from cases import Case
from test_native import SHAPES, everything, inputs_of
torch.manual_seed(3)
inputs = inputs_of(SHAPES[-1], torch.float32)
{body}
"""


def run_python(body: str, **environment: str) -> str:
    own = Path(__file__).resolve().parent
    paths = [str(own), str(own.parent / "support"), str(own.parents[1])]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SUBPROCESS.format(paths=paths, body=body)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_omp_num_threads() -> None:
    sums = "print(torch.get_num_threads(), *(x.double().sum().item().hex() for x in everything(inputs)))"
    outputs = [run_python(sums, OMP_NUM_THREADS=threads).split() for threads in ("1", "3")]
    assert outputs[0][0] == "1"
    assert outputs[0][1:] == outputs[1][1:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes_on() -> None:
    """The threads of the pool do not survive a fork; waiting for them would never end."""
    run_python(
        "torch.set_num_threads(2)\n"
        "before = everything(inputs)\n"
        "pid = os.fork()\n"
        "same = all(torch.equal(a, b) for a, b in zip(before, everything(inputs)))\n"
        "if pid == 0: os._exit(0 if same else 1)\n"
        "assert same and os.waitpid(pid, 0)[1] == 0\n"
    )


def test_an_instruction_set_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEX_ISA", "altivec")
    with pytest.raises(ValueError, match=r"FLEX_ISA is 'altivec', this machine has .*portable"):
        everything(inputs_of(BY_NAME["plain"], FP32))


def test_what_csrc_leaves_to_torch() -> None:
    assert native.covers("experts", FP32, BF16)
    assert native.covers("score", BF16, BF16)
    assert not native.covers("experts", torch.float16, torch.float16)
    assert not native.covers("experts", torch.float64, torch.float64)


@pytest.mark.parametrize("bad", [-1, 74, 1 << 30])
def test_pairs_out_of_range(bad: int) -> None:
    x, indices, weights, gate_up, down, *graft = inputs_of(BY_NAME["plain"], FP32)
    sorted_pairs, _, offsets = native.routing_plan(indices, 6)
    sorted_pairs[5] = bad
    layer = LayerCall(x, sorted_pairs, offsets, weights, gate_up, down, *graft)
    with pytest.raises(ValueError, match=rf"sorted_pairs\[5\] is {bad}, expected every pair from 0 to 74 - 1 once"):
        native.experts_fwd(layer, False)


@pytest.mark.parametrize(("index", "bad"), [(0, 1), (2, -3), (6, 75), (3, 1 << 30)])
def test_offsets_out_of_range(index: int, bad: int) -> None:
    x, indices, weights, gate_up, down, *graft = inputs_of(BY_NAME["plain"], FP32)
    sorted_pairs, _, offsets = native.routing_plan(indices, 6)
    offsets[index] = bad
    layer = LayerCall(x, sorted_pairs, offsets, weights, gate_up, down, *graft)
    with pytest.raises(ValueError, match=r"expert_offsets\[\d\] is -?\d+, expected it to ascend from 0 to at most 74"):
        native.experts_fwd(layer, False)


def test_inputs_that_do_not_fit_together() -> None:
    x, indices, weights, gate_up, down, *graft = inputs_of(BY_NAME["plain"], FP32)
    sorted_pairs, _, offsets = native.routing_plan(indices, 6)

    def call(x: Tensor = x, weights: Tensor = weights, down: Tensor = down) -> None:
        layer = LayerCall(x, sorted_pairs, offsets, weights, gate_up, down, *graft)
        native.experts_fwd(layer, False)

    with pytest.raises(TypeError, match=r"float32 and bfloat16, got torch.float16"):
        native.score_neurons(x.half(), x.half(), gate_up, down, "silu")
    with pytest.raises(TypeError, match=r"routing_weights is torch.float64 on cpu, expected torch.float32 on the CPU"):
        call(weights=weights.double())
    with pytest.raises(ValueError, match=r"gate_up_proj has shape \[6, 48, 32\], expected \[6, 46, 32\]"):
        call(down=down[:, :, 1:])
    with pytest.raises(ValueError, match="expected fewer than 2\\^31 pairs"):
        call(x=torch.empty(1, 32).expand(1 << 30, 32))


def sizes(num_tokens: int, hidden: int, experts: int, width: int, top_k: int, graft_width: int) -> object:
    module = native.module()
    options = (module.Scalar.float32, module.Scalar.float32, True, module.Activation.silu)
    return module.Layer(num_tokens, hidden, experts, width, top_k, graft_width, *options, *[0] * 9)


def test_sizes_beyond_32_bits() -> None:
    """By arithmetic: rows of 2^29 tokens are 2^31 pairs of 2^13 numbers, and every size is a 64-bit one."""
    module = native.module()
    tokens, hidden, top_k = 1 << 29, 1 << 13, 4
    layer = sizes(tokens, hidden, 8, 14336, top_k, 14336)
    rows = tokens * top_k * hidden * 4 + tokens * hidden * 4  # of the experts and of the graft, in fp32
    plans = 2 * tokens * top_k * 4 + tokens * 4
    forward = module.forward_workspace_bytes(layer, 2)
    assert rows + plans < forward < rows + plans + (1 << 28)
    wanted = module.Gradients(8, 8, 8, 8, 8)
    backward = module.backward_workspace_bytes(layer, wanted, 2)
    assert rows + plans < backward < rows + plans + 3 * 14336 * hidden * 4 + tokens * (top_k + 1) * 112 * 4 + (1 << 28)
    assert backward > 1 << 45


@pytest.mark.parametrize("tokens", [1 << 40, 1 << 60])
def test_sizes_beyond_64_bits_are_refused(tokens: int) -> None:
    layer = sizes(tokens, 1 << 30, 8, 1 << 20, 8, 1 << 20)
    with pytest.raises(ValueError, match="beyond 2\\^63"):
        native.module().forward_workspace_bytes(layer, 2)
    with pytest.raises(ValueError, match="beyond 2\\^63"):
        native.module().backward_workspace_bytes(layer, native.module().Gradients(8, 8, 8, 8, 8), 2)


def test_memory_does_not_grow_with_the_tokens_between_the_projections() -> None:
    """Per token the workspace holds the rows of the output and the plan, not the activations of a wide expert."""
    module = native.module()
    few, many = (module.forward_workspace_bytes(sizes(t, 16, 4, 4096, 2, 4096), 1) for t in (20_000, 40_000))
    assert many - few < 20_000 * (3 * 16 * 4 + 64)
