"""`flex::route`: softmax, top-k, ties, renormalisation, and their gradient."""

import pytest
import torch
from cases import DEVICE, DTYPES
from compare import assert_double_rule, exact
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import flex_kernels
from flex_kernels import reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"),
    [(37, 6, 2), (1, 4, 1), (19, 5, 5), (33, 61, 8), (0, 4, 2), (8, 1, 1)],
    ids=["plain", "one token", "K = E", "E is no power of two", "no tokens", "E = 1"],
)
def test_forward_and_gradient(
    num_tokens: int, num_experts: int, top_k: int, renormalize: bool, dtype: torch.dtype, backend: str
) -> None:
    logits = torch.randn(num_tokens, num_experts, device=DEVICE).to(dtype)
    d_weights = torch.randn(num_tokens, top_k, device=DEVICE)

    def run(function, x: Tensor) -> tuple[list[Tensor], Tensor]:
        x = x.clone().requires_grad_()
        weights, indices = function(x, top_k, renormalize)
        weights.backward(d_weights.to(weights.dtype))
        return [weights.detach(), x.grad], indices

    ours, indices = run(flex_kernels.route, logits)
    plain, want = run(reference.route, logits)
    with exact():
        truth, _ = run(reference.route, logits.double())
    assert torch.equal(indices, want)
    assert indices.dtype == torch.int64
    assert_double_rule(ours[:1], plain[:1], truth[:1], torch.float32, ("routing_weights",))
    if top_k == 1 and (renormalize or num_experts == 1):  # the one weight is always 1: only rounding is left
        assert float(ours[1].norm()) <= 4 * torch.finfo(torch.float32).eps * float(d_weights.norm())
    else:
        assert_double_rule(ours[1:], plain[1:], truth[1:], dtype, ("d_router_logits",))


def test_weights_sum_to_one_where_renormalised(backend: str) -> None:
    weights, indices = flex_kernels.route(torch.randn(50, 8, device=DEVICE), 3, True)
    torch.testing.assert_close(weights.sum(1), torch.ones(50, device=DEVICE))
    assert (weights.diff(dim=1) <= 0).all()
    assert all(len(set(row)) == 3 for row in indices.tolist())


def test_ties_go_to_the_lower_index(backend: str) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 1.0], [0.0] * 5], device=DEVICE)
    assert flex_kernels.route(logits, 3, False)[1].tolist() == [[1, 2, 3], [0, 1, 2]]


@pytest.mark.parametrize("renormalize", [False, True])
def test_gradcheck_in_fp64(renormalize: bool) -> None:
    logits = torch.randn(4, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: flex_kernels.route(x, 2, renormalize)[0], logits)


@pytest.mark.parametrize("renormalize", [False, True])
def test_opcheck(renormalize: bool, backend: str) -> None:
    logits = torch.randn(7, 5, device=DEVICE)
    for given in (logits, torch.randn(5, 7, device=DEVICE).T, logits[:1].expand(7, 5)):
        torch.library.opcheck(torch.ops.flex.route.default, (given.detach().requires_grad_(), 2, renormalize))
    weights, indices = flex_kernels.route(logits, 2, renormalize)
    for d_weights in (weights, torch.ones(1, 1, device=DEVICE).expand(7, 2), torch.randn(2, 7, device=DEVICE).T):
        args = (d_weights, logits, indices, renormalize)
        torch.library.opcheck(torch.ops.flex.route_bwd.default, args, test_utils=("test_schema", "test_faketensor"))


def test_compiles_whole_and_once() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flex_kernels.route, fullgraph=True, dynamic=True, backend=counter)
    for num_tokens in (9, 4, 30):
        logits = torch.randn(num_tokens, 6, device=DEVICE, requires_grad=True)
        compiled(logits, 2, True)[0].square().sum().backward()
        want = torch.autograd.grad(flex_kernels.route(logits, 2, True)[0].square().sum(), logits)[0]
        assert torch.equal(logits.grad, want)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("logits", "top_k", "error", "message"),
    [
        (torch.zeros(3), 1, ValueError, r"shape \[3\], expected \[T, E\]"),
        (torch.zeros(3, 4), 5, ValueError, "top_k is 5, expected 1 to 4"),
        (torch.zeros(3, 4), 0, ValueError, "top_k is 0, expected 1 to 4"),
        (torch.zeros(3, 4, dtype=torch.int64), 1, TypeError, "expected a floating point tensor"),
    ],
    ids=["shape", "K > E", "K = 0", "dtype"],
)
def test_bad_input(logits: Tensor, top_k: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        flex_kernels.route(logits, top_k, False)
