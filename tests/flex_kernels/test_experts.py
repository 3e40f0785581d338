"""`flex::grafted_experts`: forward and every gradient on every shape, and what the operation promises beside them."""

import copy
from collections.abc import Callable

import pytest
import torch
from cases import BY_NAME, CASES, DEVICE, DTYPES, Case, layer_inputs
from compare import assert_double_rule, double, exact, forward_and_grads
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import flex_kernels
from flex_kernels import plan, reference
from flex_kernels.backends import pytorch
from flex_kernels.reference import ACTIVATIONS

EXPERTS = (3, 4)  # positions of gate_up_proj and down_proj
PLAIN, NO_GRAFT = BY_NAME["plain"], BY_NAME["no-graft"]


def compare(case: Case, dtype: torch.dtype, **options: str) -> None:
    inputs, d_out = layer_inputs(case, dtype), torch.randn(case.num_tokens, case.hidden_size).to(DEVICE, dtype)
    ours = forward_and_grads(flex_kernels.grafted_experts, inputs, d_out, **options)
    plain = forward_and_grads(reference.grafted_experts, inputs, d_out, **options)
    with exact():
        truth = forward_and_grads(reference.grafted_experts, double(inputs), d_out.double(), **options)
    assert_double_rule(ours, plain, truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("combine", ["additive", "convex"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_and_every_gradient(case: Case, combine: str, dtype: torch.dtype, backend: str) -> None:
    compare(case, dtype, combine=combine)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations(activation: str, dtype: torch.dtype, backend: str) -> None:
    compare(PLAIN, dtype, activation=activation)


@pytest.mark.parametrize("combine", ["additive", "convex"])
def test_gradcheck_in_fp64(combine: str) -> None:
    inputs = layer_inputs(Case("tiny", 4, 2, 3, 2, 3, 2, "finite differences are slow", "sentinels"), torch.float64)
    inputs = [x.double().requires_grad_() if x.is_floating_point() else x for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: flex_kernels.grafted_experts(*x, combine=combine), inputs)


@pytest.mark.parametrize("num_experts", [1, 4])
def test_no_tokens(num_experts: int, backend: str) -> None:
    case = Case("none", 0, 1, 16, 8, num_experts, 8, "T = 0")
    results = forward_and_grads(flex_kernels.grafted_experts, layer_inputs(case), torch.zeros(0, 16, device=DEVICE))
    inputs = [x for x in layer_inputs(case) if x.is_floating_point()]
    assert results[0].shape == (0, 16)
    for grad, x in zip(results[1:], inputs, strict=True):
        torch.testing.assert_close(grad, torch.zeros_like(x))


def test_twice_the_same_bits(backend: str) -> None:
    inputs, d_out = layer_inputs(BY_NAME["tiles"]), torch.randn(70, 64, device=DEVICE)
    first, second = (forward_and_grads(flex_kernels.grafted_experts, inputs, d_out) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_integer_width_of_the_ids_does_not_matter() -> None:
    inputs = layer_inputs(PLAIN)
    wide = flex_kernels.grafted_experts(*inputs)
    inputs[1] = inputs[1].int()
    assert torch.equal(wide, flex_kernels.grafted_experts(*inputs))


@pytest.mark.parametrize("spread", ["expanded", "transposed", "summed"])
def test_gradients_of_any_stride(spread: str, backend: str) -> None:
    inputs = layer_inputs(PLAIN)
    d_out = {
        "expanded": torch.randn(32, device=DEVICE).expand(37, 32),
        "transposed": torch.randn(32, 37, device=DEVICE).T,
        "summed": torch.ones((), device=DEVICE).expand(37, 32),
    }[spread]
    ours = forward_and_grads(flex_kernels.grafted_experts, inputs, d_out)
    want = forward_and_grads(flex_kernels.grafted_experts, inputs, d_out.contiguous())
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b)


def test_inputs_of_any_stride(backend: str) -> None:
    inputs = layer_inputs(PLAIN)
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    torch.testing.assert_close(
        flex_kernels.grafted_experts(*strided), flex_kernels.grafted_experts(*inputs), rtol=1e-5, atol=1e-5
    )


def test_slots_of_another_rank_count_for_nothing(backend: str) -> None:
    inputs = layer_inputs(BY_NAME["sentinels"])
    d_out = torch.randn(25, 16, device=DEVICE)
    sentinel = inputs[1] >= 4
    results = forward_and_grads(flex_kernels.grafted_experts, inputs, d_out)
    assert sentinel.any()
    assert (results[2][sentinel] == 0).all()
    inputs[2] = inputs[2].masked_fill(sentinel, 0)
    inputs[1] = inputs[1].masked_fill(sentinel, 3)
    torch.testing.assert_close(results[0], reference.grafted_experts(*inputs), rtol=1e-5, atol=1e-5)


def test_rows_of_nobody_may_hold_anything(backend: str) -> None:
    inputs = layer_inputs(BY_NAME["sentinels"])
    out, z, graft_z, pairs, offsets = torch.ops.flex.grafted_experts(*inputs, "convex", "silu", True)
    results = []
    for garbage in (0.0, float("nan")):
        z[int(offsets[-1]) :] = garbage
        args = (torch.ones_like(out), inputs[0], pairs, offsets, *inputs[2:5])
        results.append(
            [
                *torch.ops.flex.grafted_experts_bwd(*args, *inputs[5:], z, graft_z, "convex", "silu", *(True,) * 4),
                *torch.ops.flex.grafted_experts_bwd_weights(*args, inputs[7], z, "convex", "silu"),
            ]
        )
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def frozen_grads(inputs: list) -> list[Tensor | None]:
    d_out = torch.randn(inputs[0].shape, device=DEVICE, dtype=inputs[0].dtype)
    return forward_and_grads(flex_kernels.grafted_experts, inputs, d_out, frozen=EXPERTS)


def test_frozen_experts_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the gradient of frozen expert weights was computed")

    monkeypatch.setattr(pytorch, "expert_weight_grads", refuse)
    grads = frozen_grads(layer_inputs(PLAIN))
    assert [grad is None for grad in grads[1:]] == [False, False, True, True, False, False, False]


def saved_for_backward(function: Callable[[], Tensor]) -> list[Tensor]:
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function()
    return saved


def test_only_x_and_z_are_saved_and_no_frozen_weight() -> None:
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in layer_inputs(PLAIN)]
    inputs[3].requires_grad_(False)
    inputs[4].requires_grad_(False)
    saved = saved_for_backward(lambda: flex_kernels.grafted_experts(*inputs))
    frozen = {inputs[3].untyped_storage().data_ptr(), inputs[4].untyped_storage().data_ptr()}
    assert not frozen & {x.untyped_storage().data_ptr() for x in saved}
    activations = [list(x.shape) for x in saved if x.is_floating_point() and x.dim() == 2 and x.shape[0] in (37, 74)]
    assert sorted(activations) == sorted([[37, 32], [37, 2], [74, 48], [37, 48]])  # X, w, Z, Z of the graft


def test_under_no_grad_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    original = pytorch.experts_fwd
    monkeypatch.setattr(pytorch, "experts_fwd", lambda *args: kept.append(args[-1]) or original(*args))
    monkeypatch.setattr(plan, "cpu_backend", lambda *_: pytorch)
    monkeypatch.setattr(plan, "cuda_backend", lambda *_: pytorch)
    inputs = layer_inputs(PLAIN)
    inputs[0].requires_grad_()
    flex_kernels.grafted_experts(*inputs)
    with torch.no_grad():
        flex_kernels.grafted_experts(*inputs)
    flex_kernels.grafted_experts(inputs[0].detach(), *inputs[1:])
    assert kept == [True, False, False]


@pytest.mark.parametrize("wanted", [0, 2, 5, 7])
def test_one_gradient_at_a_time(wanted: int, backend: str) -> None:
    for combine in ("additive", "convex"):
        inputs = layer_inputs(PLAIN)
        d_out = torch.randn(37, 32, device=DEVICE)
        all_grads = forward_and_grads(flex_kernels.grafted_experts, inputs, d_out, frozen=EXPERTS, combine=combine)
        others = tuple(i for i in range(8) if i != wanted)
        one = forward_and_grads(flex_kernels.grafted_experts, inputs, d_out, frozen=others, combine=combine)
        position = {0: 1, 2: 2, 5: 5, 7: 7}[wanted]
        assert [grad is not None for grad in one[1:]] == [i == position for i in range(1, 8)]
        torch.testing.assert_close(one[position], all_grads[position])


def test_experts_kept_in_another_dtype(backend: str) -> None:
    inputs = layer_inputs(PLAIN, torch.float32, torch.bfloat16)
    ours = frozen_grads(copy.copy(inputs))
    torch.manual_seed(0)
    inputs[3], inputs[4] = inputs[3].float(), inputs[4].float()
    torch.testing.assert_close(ours[0], reference.grafted_experts(*inputs), rtol=1e-5, atol=1e-5)
    assert ours[0].dtype == ours[1].dtype == torch.float32


def test_graft_trained_in_fp32_beside_a_bf16_layer(backend: str) -> None:
    inputs = layer_inputs(PLAIN, torch.bfloat16)
    inputs[5], inputs[6] = inputs[5].float(), inputs[6].float()
    grads = frozen_grads(inputs)
    assert (grads[0].dtype, grads[5].dtype, grads[6].dtype) == (torch.bfloat16, torch.float32, torch.float32)


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_autocast(inside: bool, backend: str) -> None:
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in layer_inputs(PLAIN)]
    low = [x.detach().bfloat16() if x.is_floating_point() else x for x in inputs]
    low[2], low[7] = inputs[2].detach(), inputs[7].detach()
    d_out = torch.randn(37, 32, device=DEVICE)
    want = forward_and_grads(flex_kernels.grafted_experts, low, d_out)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = flex_kernels.grafted_experts(*inputs)
        if inside:
            out.backward(d_out)
    if not inside:
        out.backward(d_out)
    assert out.dtype == torch.float32  # what came in comes out, as in transformers
    torch.testing.assert_close(out, want[0].float())
    for x, grad in zip([x for x in inputs if x.is_floating_point()], want[1:], strict=True):
        assert x.grad.dtype == torch.float32
        torch.testing.assert_close(x.grad, grad.float())


@pytest.mark.parametrize("frozen", [EXPERTS, ()], ids=["frozen experts", "trained experts"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool, frozen: tuple[int, ...], backend: str) -> None:
    inputs, d_out = layer_inputs(PLAIN), torch.randn(37, 32, device=DEVICE)
    want = forward_and_grads(flex_kernels.grafted_experts, inputs, d_out, frozen)
    ours = forward_and_grads(
        lambda *x: checkpoint(flex_kernels.grafted_experts, *x, use_reentrant=use_reentrant), inputs, d_out, frozen
    )
    for a, b in zip(ours, want, strict=True):
        assert a is b is None or torch.equal(a, b)


SHAPES = ("test_schema", "test_faketensor")


@pytest.mark.parametrize("combine", ["additive", "convex"])
@pytest.mark.parametrize("case", [PLAIN, NO_GRAFT], ids=lambda case: case.name)
def test_opcheck(case: Case, combine: str, backend: str) -> None:
    def trained(x: Tensor | None) -> Tensor | None:
        return x.detach().requires_grad_() if x is not None and x.is_floating_point() else x

    inputs = layer_inputs(case)
    strided = [x if x is None else x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    strided[2] = inputs[2][:1].expand(case.num_tokens, case.top_k)
    frozen = [x if i in EXPERTS else trained(x) for i, x in enumerate(strided)]
    options = (combine, "silu", True)
    torch.library.opcheck(torch.ops.flex.grafted_experts.default, (*map(trained, inputs), *options))
    torch.library.opcheck(torch.ops.flex.grafted_experts.default, (*frozen, *options))
    torch.library.opcheck(torch.ops.flex.grafted_experts.default, (*inputs, combine, "silu", False), test_utils=SHAPES)


def test_opcheck_where_some_rows_are_nobodys(backend: str) -> None:
    # Not compared by value: the rows of another rank's pairs are never written.
    inputs = (*layer_inputs(BY_NAME["sentinels"]), "additive", "silu", True)
    torch.library.opcheck(torch.ops.flex.grafted_experts.default, inputs, test_utils=SHAPES)


@pytest.mark.parametrize("needs", [(True,) * 4, (True, False, False, False), (False, False, True, False)], ids=str)
def test_opcheck_of_the_backward(needs: tuple[bool, ...], backend: str) -> None:
    inputs = layer_inputs(PLAIN)
    out, z, graft_z, *rows = torch.ops.flex.grafted_experts(*inputs, "convex", "silu", True)
    for d_out in (torch.randn_like(out), torch.ones(1, 1, device=DEVICE).expand_as(out), torch.randn(32, 37).to(out).T):
        args = (d_out, inputs[0], *rows, *inputs[2:], z, graft_z, "convex", "silu", *needs)
        torch.library.opcheck(torch.ops.flex.grafted_experts_bwd.default, args, test_utils=SHAPES)
    args = (torch.randn_like(out), inputs[0], *rows, *inputs[2:5], inputs[7], z, "convex", "silu")
    torch.library.opcheck(torch.ops.flex.grafted_experts_bwd_weights.default, args, test_utils=SHAPES)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen experts", "trained experts"])
def test_compiles_whole_and_once_for_all_token_counts(trained: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flex_kernels.grafted_experts, fullgraph=True, dynamic=True, backend=counter)
    for num_tokens in (37, 12, 91):
        case = Case("any", num_tokens, 2, 32, 24, 6, 24, "T is dynamic")
        inputs, d_out = layer_inputs(case), torch.randn(num_tokens, 32, device=DEVICE)
        frozen = () if trained else EXPERTS
        ours = forward_and_grads(compiled, inputs, d_out, frozen)
        want = forward_and_grads(flex_kernels.grafted_experts, inputs, d_out, frozen)
        for a, b in zip(ours, want, strict=True):
            assert a is b is None or torch.equal(a, b)
    assert counter.frame_count == 1


def test_second_derivatives_are_refused_not_wrong() -> None:
    inputs = layer_inputs(PLAIN)
    x = inputs[0].requires_grad_()
    (grad,) = torch.autograd.grad(flex_kernels.grafted_experts(*inputs).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


BAD = {
    "hidden_states has shape": (ValueError, 0, lambda x: x[None]),
    "expert_indices has shape": (ValueError, 1, lambda x: x[:5]),
    "expert_indices is torch.float32": (TypeError, 1, lambda x: x.float()),
    "expert_indices must not be negative": (ValueError, 1, lambda x: x - 1),
    "routing_weights has shape": (ValueError, 2, lambda x: x[:, :1]),
    "gate_up_proj has shape": (ValueError, 3, lambda x: x[:, 1:]),
    "down_proj has shape": (ValueError, 4, lambda x: x[:, 1:]),
    "graft_gate_up_proj has shape": (ValueError, 5, lambda x: x[1:]),
    "graft_down_proj missing": (ValueError, 6, lambda x: None),
    "graft_logits has shape": (ValueError, 7, lambda x: x[:, None]),
    "down_proj is torch.int64": (TypeError, 4, lambda x: x.long()),
    "down_proj is on meta": (ValueError, 4, lambda x: x.to("meta")),
}


@pytest.mark.parametrize("message", sorted(BAD))
def test_bad_input_is_one_sentence(message: str) -> None:
    if "negative" in message and DEVICE != "cpu":
        pytest.skip("on CUDA, where nobody can look, a negative id is skipped")
    error, position, spoil = BAD[message]
    inputs = layer_inputs(PLAIN)
    inputs[position] = spoil(inputs[position])
    with pytest.raises(error, match=message):
        flex_kernels.grafted_experts(*inputs)


@pytest.mark.parametrize("option", [{"combine": "sum"}, {"activation": "relu"}], ids=str)
def test_unknown_names_are_refused(option: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="expected one of"):
        flex_kernels.grafted_experts(*layer_inputs(PLAIN), **option)
