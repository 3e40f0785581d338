"""`Graft` and `GraftedMoE`: the layer for code without transformers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE
from torch import Tensor

from flex_kernels import Graft, GraftedMoE, reference


def layer(**options) -> GraftedMoE:
    settings = {"graft_width": 6, "device": DEVICE} | options
    return GraftedMoE(16, 8, 5, 2, **settings)


def by_the_reference(moe: GraftedMoE, x: Tensor) -> Tensor:
    flat = x.reshape(-1, 16)
    weights, indices = reference.route(F.linear(flat, moe.router.weight), moe.top_k, moe.renormalize)
    graft = ()
    if moe.graft is not None:
        logits = flat @ moe.graft.logit_weight + moe.graft.logit_bias
        graft = (moe.graft.gate_up_proj, moe.graft.down_proj, logits)
    out = reference.grafted_experts(
        flat,
        indices,
        weights,
        moe.gate_up_proj,
        moe.down_proj,
        *graft,
        combine=moe.combine,
        activation=moe.activation,
    )
    return out.view(x.shape)


@pytest.mark.parametrize("sizes", [(0, 17, 4, 2), (16, 0, 4, 2), (16, -8, 4, 2)])
def test_a_layer_of_no_size_is_refused(sizes):
    with pytest.raises(
        ValueError, match=f"hidden_size is {sizes[0]} and intermediate_size is {sizes[1]}, expected both"
    ):
        GraftedMoE(*sizes)


@pytest.mark.parametrize(
    "options",
    [{}, {"graft_width": None}, {"combine": "convex"}, {"renormalize": False, "activation": "gelu_tanh"}],
    ids=str,
)
def test_equals_the_reference_forward_and_every_gradient(options: dict) -> None:
    moe = layer(**options)
    if moe.graft is not None:
        for parameter in moe.graft.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    x, d_out = torch.randn(2, 3, 7, 16, device=DEVICE), torch.randn(2, 3, 7, 16, device=DEVICE)
    results = []
    for function in (moe, lambda x: by_the_reference(moe, x)):
        given = x.clone().requires_grad_()
        moe.zero_grad()
        out = function(given)
        out.backward(d_out)
        results.append([out, given.grad, *(p.grad for p in moe.parameters())])
    for ours, want in zip(*results, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)


def test_a_fresh_graft_adds_nothing_and_trains() -> None:
    moe = layer().freeze_pretrained()
    bare = copy.deepcopy(moe)
    bare.graft = None
    x = torch.randn(40, 16, device=DEVICE)
    assert torch.equal(moe(x), bare(x))
    target = torch.randn(40, 16, device=DEVICE)
    frozen = {name: p.clone() for name, p in moe.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam([p for p in moe.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(moe(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert set(frozen) == {"router.weight", "gate_up_proj", "down_proj"}
    for name, before in frozen.items():
        assert torch.equal(before, moe.get_parameter(name))


def test_every_parameter_has_a_role() -> None:
    moe = layer()
    roles = {}
    for prefix, module in moe.named_modules():
        declared = getattr(module, "parameter_roles", {})
        for name, _ in module.named_parameters(recurse=False):
            roles[f"{prefix}.{name}".lstrip(".")] = declared.get(name, "frozen")
    assert roles == {
        "router.weight": "frozen",
        "gate_up_proj": "frozen",
        "down_proj": "frozen",
        "graft.gate_up_proj": "personal",
        "graft.down_proj": "personal",
        "graft.logit_weight": "personal",
        "graft.logit_bias": "personal",
    }


def test_the_opening_is_reported() -> None:
    graft = Graft(16, 4, logit_bias=-1.0, device=DEVICE)
    assert graft.last_opening is None
    graft.logits(torch.randn(9, 16, device=DEVICE))
    torch.testing.assert_close(graft.last_opening.item(), torch.sigmoid(torch.tensor(-1.0)).item())
    assert not graft.last_opening.requires_grad


def test_logits_are_fp32_whatever_runs_around_them() -> None:
    graft = Graft(16, 4, device=DEVICE, dtype=torch.bfloat16)
    torch.nn.init.normal_(graft.logit_weight)
    x = torch.randn(9, 16, device=DEVICE).bfloat16()
    want = x.float() @ graft.logit_weight.float() + graft.logit_bias.float()
    with torch.autocast(DEVICE, torch.bfloat16):
        torch.testing.assert_close(graft.logits(x), want)


def test_state_dict_travels() -> None:
    moe, other = layer(), layer()
    other.load_state_dict(moe.state_dict())
    x = torch.randn(4, 16, device=DEVICE)
    assert torch.equal(moe(x), other(x))


def test_compiles_whole() -> None:
    torch._dynamo.reset()
    moe = layer()
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 9, 16), (3, 5, 16)):
        x = torch.randn(shape, device=DEVICE)
        torch.testing.assert_close(compiled(x), moe(x))
    assert moe.graft.last_opening is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GraftedMoE(16, 8, 4, 5), "top_k is 5, expected 1 to 4"),
        (lambda: GraftedMoE(16, 8, 4, 2, combine="sum"), "combine is 'sum'"),
        (lambda: Graft(16, 0), "width is 0"),
        (lambda: Graft(16, 4, activation="relu"), "activation is 'relu'"),
        (lambda: layer()(torch.zeros(3, 15, device=DEVICE)), r"shape \[3, 15\], expected \[..., 16\]"),
    ],
    ids=["top_k", "combine", "width", "activation", "input"],
)
def test_bad_settings(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
