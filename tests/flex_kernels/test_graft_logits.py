"""`flex::graft_logits`: the graft's gate before its sigmoid, and its gradients."""

import pytest
import torch
from cases import DEVICE, DTYPES
from compare import assert_double_rule, double, exact, forward_and_grads
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import flex_kernels
from flex_kernels import plan, reference
from flex_kernels.backends import pytorch

NAMES = ("graft_logits", "d_hidden_states", "d_logit_weight", "d_logit_bias")
SHAPES = {
    "one block": (9, 32),
    "several blocks, odd H": (150, 71),
    "one token": (1, 40),
    "H = 1": (20, 1),
    "no tokens": (0, 8),
}
shapes = pytest.mark.parametrize(("num_tokens", "hidden_size"), SHAPES.values(), ids=SHAPES)


def inputs_of(num_tokens: int, hidden_size: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> list[Tensor]:
    hidden_states = torch.randn(num_tokens, hidden_size).to(dtype)
    weight, bias = torch.randn(hidden_size) * hidden_size**-0.5, torch.randn(1)
    return [x.to(DEVICE) for x in (hidden_states, weight.to(weight_dtype), bias.to(weight_dtype))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@shapes
def test_forward_and_gradients(num_tokens: int, hidden_size: int, dtype: torch.dtype, backend: str) -> None:
    inputs, d_out = inputs_of(num_tokens, hidden_size, dtype, torch.float32), torch.randn(num_tokens, device=DEVICE)
    ours = forward_and_grads(flex_kernels.graft_logits, inputs, d_out)
    plain = forward_and_grads(reference.graft_logits, inputs, d_out)
    with exact():
        truth = forward_and_grads(reference.graft_logits, double(inputs), d_out.double())
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == dtype
    for index, name in enumerate(NAMES):
        of = dtype if index == 1 else torch.float32
        assert_double_rule(*([results[index]] for results in (ours, plain, truth)), of, (name,))


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_only_what_is_needed(needs: tuple[bool, bool, bool], backend: str) -> None:
    inputs = [
        x.requires_grad_(need) for x, need in zip(inputs_of(21, 48, torch.float32, torch.float32), needs, strict=True)
    ]
    flex_kernels.graft_logits(*inputs).square().sum().backward()
    everything = [x.detach().requires_grad_() for x in inputs]
    reference.graft_logits(*everything).square().sum().backward()
    for x, want, need in zip(inputs, everything, needs, strict=True):
        assert (x.grad is not None) == need
        if need:
            torch.testing.assert_close(x.grad, want.grad, rtol=1e-5, atol=1e-5)


def test_weights_of_another_dtype_and_autocast(backend: str) -> None:
    hidden_states, weight, bias = inputs_of(12, 64, torch.bfloat16, torch.bfloat16)
    wanted = reference.graft_logits(hidden_states, weight, bias)
    torch.testing.assert_close(flex_kernels.graft_logits(hidden_states, weight, bias), wanted)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = flex_kernels.graft_logits(hidden_states.float(), weight.float(), bias.float())
    torch.testing.assert_close(found, wanted)


def test_backends_run_with_autocast_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward; on a CPU a matrix-vector product would not show it."""
    seen = []

    class Backend:
        @staticmethod
        def graft_logits_fwd(*args: Tensor) -> Tensor:
            seen.append(torch.is_autocast_enabled(DEVICE))
            return pytorch.graft_logits_fwd(*args)

        @staticmethod
        def graft_logits_bwd(*args: Tensor) -> tuple[Tensor, Tensor]:
            seen.append(torch.is_autocast_enabled(DEVICE))
            return pytorch.graft_logits_bwd(*args)

    monkeypatch.setattr(plan, "cpu_backend", lambda *_: Backend)
    monkeypatch.setattr(plan, "cuda_backend", lambda *_: Backend)
    inputs = [x.requires_grad_() for x in inputs_of(5, 8, torch.float32, torch.float32)]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        torch.autograd.grad(flex_kernels.graft_logits(*inputs).sum(), inputs)
    assert seen == [False, False]


def test_gradcheck_in_fp64() -> None:
    inputs = [x.requires_grad_() for x in inputs_of(5, 7, torch.float64, torch.float64)]
    assert torch.autograd.gradcheck(flex_kernels.graft_logits, inputs)


def test_opcheck(backend: str) -> None:
    hidden_states, weight, bias = inputs_of(7, 33, torch.float32, torch.float32)
    for given in (hidden_states, torch.randn(33, 7, device=DEVICE).T, hidden_states[:1].expand(7, 33)):
        args = (given.detach().requires_grad_(), weight.requires_grad_(), bias.requires_grad_())
        torch.library.opcheck(torch.ops.flex.graft_logits.default, args)
    for d_logits in (torch.randn(7, device=DEVICE), torch.ones(1, device=DEVICE).expand(7)):
        for needs in ((True, True), (True, False), (False, True)):
            args = (d_logits, hidden_states, weight.detach(), *needs)
            operation = torch.ops.flex.graft_logits_bwd.default
            torch.library.opcheck(operation, args, test_utils=("test_schema", "test_faketensor"))


def test_compiles_whole_and_once() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flex_kernels.graft_logits, fullgraph=True, dynamic=True, backend=counter)
    for num_tokens in (9, 4, 30):
        inputs = [x.requires_grad_() for x in inputs_of(num_tokens, 6, torch.float32, torch.float32)]
        found = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
        wanted = torch.autograd.grad(flex_kernels.graft_logits(*inputs).square().sum(), inputs)
        for ours, theirs in zip(found, wanted, strict=True):
            assert torch.equal(ours, theirs)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("shapes", "error", "message"),
    [
        (((3,), (3,), (1,)), ValueError, r"hidden_states has shape \[3\], expected \[T, H\]"),
        (((3, 4), (5,), (1,)), ValueError, r"logit_weight has shape \[5\], expected \[4\]"),
        (((3, 4), (4,), ()), ValueError, r"logit_bias has shape \[\], expected \[1\]"),
    ],
    ids=["hidden_states", "logit_weight", "logit_bias"],
)
def test_bad_input(shapes: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        flex_kernels.graft_logits(*(torch.zeros(shape) for shape in shapes))
