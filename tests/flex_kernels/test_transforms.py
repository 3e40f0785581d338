"""torch's transforms are right or refused, never silently zero; a router of one expert learns."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flex_kernels
from flex_kernels import plan

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch.func's own

T, H, WIDTH, E, K = 5, 16, 8, 4, 2


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator)

    indices = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    return random(T, H), indices, random(T, K).abs(), random(E, 2 * WIDTH, H), random(E, H, WIDTH)


X, INDICES, WEIGHTS, GATE_UP, DOWN = inputs()
ONE = torch.ones(H, dtype=torch.float64)
OPERATIONS = {
    "grafted_experts": lambda x: flex_kernels.grafted_experts(x, INDICES, WEIGHTS, GATE_UP, DOWN),
    "by weights": lambda x: flex_kernels.grafted_experts(X, INDICES, x[:, :K].abs(), GATE_UP, DOWN),
    "by experts": lambda x: flex_kernels.grafted_experts(X, INDICES, WEIGHTS, GATE_UP, DOWN + x.mean()),
    "route": lambda x: flex_kernels.route(x, 2, True)[0],
    "combine": lambda x: flex_kernels.combine(x.view(T, 2, WIDTH), WEIGHTS),
    "graft_logits": lambda x: flex_kernels.graft_logits(x, ONE, ONE[:1]),
    "score_experts": lambda x: flex_kernels.score_experts(x, X, GATE_UP, DOWN, torch.tensor([0, T], dtype=torch.int32)),
    "GraftedMoE": flex_kernels.GraftedMoE(H, WIDTH, E, K, graft_width=WIDTH, dtype=torch.float64),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_forward_mode_is_refused(name):
    with pytest.raises(NotImplementedError, match=r"no forward-mode derivative .* expected reverse mode"):
        torch.func.jvp(OPERATIONS[name], (X,), (torch.ones_like(X),))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jacfwd(OPERATIONS[name])(X)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_forward_level_without_tangents_changes_nothing(name):
    """Somebody else's forward mode, around a call that it does not reach."""
    alone = OPERATIONS[name](X)

    def other(y):
        return y * OPERATIONS[name](X).detach().sum()

    _, tangent = torch.func.jvp(other, (torch.ones((), dtype=torch.float64),), (torch.ones((), dtype=torch.float64),))
    torch.testing.assert_close(tangent, alone.detach().sum().to(tangent.dtype), rtol=1e-5, atol=1e-5)


def test_torch_func_and_a_second_derivative_are_refused():
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: OPERATIONS["grafted_experts"](x).sum())(X)
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(OPERATIONS["grafted_experts"](x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(first.sum(), x)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_of_the_forward_is_a_loop_and_right():
    many = torch.stack([X, 2 * X, X - 1])
    ours = torch.vmap(OPERATIONS["grafted_experts"])(many)
    torch.testing.assert_close(ours, torch.stack([OPERATIONS["grafted_experts"](x) for x in many]), rtol=0, atol=0)


def test_a_router_of_one_expert_learns_by_default():
    torch.manual_seed(0)
    norms = {}
    for top_k, renormalize in ((1, None), (1, True), (2, None)):
        layer = flex_kernels.GraftedMoE(H, WIDTH, E, top_k, renormalize=renormalize)
        layer(torch.randn(32, H)).square().sum().backward()
        norms[top_k, renormalize] = float(layer.router.weight.grad.norm())
    assert norms[1, None] > 0.01 * norms[2, None]
    assert norms[1, True] < 1e-4 * norms[2, None]  # who asks for it gets it: a pretrained, frozen router may want it
    assert flex_kernels.GraftedMoE(H, WIDTH, E, 2).renormalize


@pytest.mark.skipif(plan.INTERPRET, reason="starts a process without the tests' mended interpreter")
def test_the_interpreter_does_not_compute_bfloat16():
    code = """
import torch, flex_kernels
from flex_kernels import plan, reference
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    x, ids, w = torch.randn(7, 64).to(dtype), torch.randint(0, 4, (7, 2)), torch.rand(7, 2)
    gate_up, down = (0.1 * torch.randn(4, *s) for s in ((64, 64), (64, 32)))
    args = (x, ids, w, gate_up.to(dtype), down.to(dtype))
    theirs, ours = reference.grafted_experts(*args), flex_kernels.grafted_experts(*args)
    error = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
    print(plan.backend_name(plan.cpu_backend("experts", dtype)), error < 2e-2)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["triton", "True", "torch", "True"]
