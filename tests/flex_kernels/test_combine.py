"""`flex::combine`: the weighted sum over slots and the gated graft, both forms, and their gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DEVICE, DTYPES
from compare import assert_double_rule, double, exact
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import flex_kernels
from flex_kernels import reference

NAMES = ("out", "d_expert_out", "d_routing_weights", "d_graft_out", "d_graft_logits")


def inputs_of(num_tokens: int, top_k: int, hidden_size: int, grafted: bool, dtype: torch.dtype) -> list:
    inputs = [torch.randn(num_tokens, top_k, hidden_size).to(dtype), torch.rand(num_tokens, top_k)]
    inputs += [torch.randn(num_tokens, hidden_size).to(dtype), torch.randn(num_tokens)] if grafted else [None, None]
    return [x if x is None else x.to(DEVICE) for x in inputs]


def forward_and_grads(function: Callable[..., Tensor], inputs: list, d_out: Tensor, combine: str) -> list:
    leaves = [x if x is None else x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves, combine)
    out.backward(d_out.to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves if x is not None)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("combine", reference.COMBINES)
@pytest.mark.parametrize("grafted", [False, True], ids=["no graft", "graft"])
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "hidden_size"), [(37, 2, 32), (19, 3, 33), (1, 1, 16), (11, 8, 8), (0, 2, 16)]
)
def test_forward_and_every_gradient(
    num_tokens: int, top_k: int, hidden_size: int, grafted: bool, combine: str, dtype: torch.dtype, backend: str
) -> None:
    inputs = inputs_of(num_tokens, top_k, hidden_size, grafted, dtype)
    d_out = torch.randn(num_tokens, hidden_size, device=DEVICE).to(dtype)
    ours = forward_and_grads(flex_kernels.combine, inputs, d_out, combine)
    plain = forward_and_grads(reference.combine, inputs, d_out, combine)
    with exact():
        truth = forward_and_grads(reference.combine, double(inputs), d_out.double(), combine)
    assert_double_rule(ours, plain, truth, dtype, NAMES)


@pytest.mark.parametrize("combine", reference.COMBINES)
def test_gradcheck_in_fp64(combine: str) -> None:
    inputs = [x.double().requires_grad_() for x in inputs_of(3, 2, 4, True, torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: flex_kernels.combine(*x, combine), inputs)


@pytest.mark.parametrize("combine", reference.COMBINES)
def test_opcheck(combine: str, backend: str) -> None:
    inputs: list[Any] = [x.requires_grad_() for x in inputs_of(7, 2, 5, True, torch.float32)]
    torch.library.opcheck(torch.ops.flex.combine.default, (*inputs, combine))
    torch.library.opcheck(torch.ops.flex.combine.default, (*inputs[:2], None, None, combine))
    strided = [x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in inputs]
    torch.library.opcheck(torch.ops.flex.combine.default, (*strided, combine))
    inputs = [x.detach() for x in inputs]
    for d_out in (torch.ones(1, 1, device=DEVICE).expand(7, 5), torch.randn(5, 7, device=DEVICE).T):
        for needs in ((True,) * 4, (False, True, False, True), (True, False, True, False)):
            torch.library.opcheck(
                torch.ops.flex.combine_bwd.default,
                (d_out, *inputs, combine, *needs),
                test_utils=("test_schema", "test_faketensor"),
            )


def test_compiles_whole_and_once() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flex_kernels.combine, fullgraph=True, dynamic=True, backend=counter)
    for num_tokens in (9, 4, 30):
        inputs, d_out = inputs_of(num_tokens, 2, 8, True, torch.float32), torch.randn(num_tokens, 8, device=DEVICE)
        ours = forward_and_grads(compiled, inputs, d_out, "convex")
        for a, b in zip(ours, forward_and_grads(flex_kernels.combine, inputs, d_out, "convex"), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("position", "spoil", "error", "message"),
    [
        (0, lambda x: x[0], ValueError, r"expert_out has shape \[2, 8\], expected \[T, K, H\]"),
        (1, lambda x: x[:, :1], ValueError, r"routing_weights has shape \[5, 1\], expected \[5, 2\]"),
        (2, lambda x: None, ValueError, "one of graft_out and graft_logits is missing"),
        (3, lambda x: x[:4], ValueError, r"graft_logits has shape \[4\], expected \[5\]"),
        (0, lambda x: x.int(), TypeError, "expert_out is torch.int32"),
    ],
    ids=["rank", "weights", "half a graft", "logits", "dtype"],
)
def test_bad_input(position: int, spoil: Callable, error: type[Exception], message: str) -> None:
    inputs = inputs_of(5, 2, 8, True, torch.float32)
    inputs[position] = spoil(inputs[position])
    with pytest.raises(error, match=message):
        flex_kernels.combine(*inputs)


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="combine is 'mean', expected one of additive, convex"):
        flex_kernels.combine(*inputs_of(5, 2, 8, True, torch.float32), "mean")
