"""`LoraGraft`: the same layer on `W + (alpha / r) B A`, with a frozen copy and trained factors."""

import pytest
import torch
from cases import DEVICE
from layouts import experts_of
from torch import Tensor, nn

import flex_kernels
from flex_kernels import Graft, LoraGraft

FACTORS = ["gate_up_lora_a", "gate_up_lora_b", "down_lora_a", "down_lora_b"]


def filled(dtype: torch.dtype = torch.float32, copy_dtype: torch.dtype | None = None) -> LoraGraft:
    graft = LoraGraft(16, 6, rank=3, alpha=5.0, logit_bias=0.5, device=DEVICE, dtype=dtype, copy_dtype=copy_dtype)
    with torch.no_grad():
        for parameter in graft.parameters():
            nn.init.normal_(parameter, std=0.3)
    return graft


def by_hand(graft: LoraGraft) -> tuple[Tensor, Tensor]:
    scale = 5.0 / 3
    gate_up = graft.gate_up_proj + scale * (graft.gate_up_lora_b @ graft.gate_up_lora_a)
    return gate_up, graft.down_proj + scale * (graft.down_lora_b @ graft.down_lora_a)


def test_equals_a_graft_of_the_merged_weights_and_trains_the_factors_alone() -> None:
    lora, plain = filled(), Graft(16, 6, logit_bias=0.5, device=DEVICE)
    plain.load_state_dict({**plain.state_dict(), "logit_weight": lora.logit_weight, "logit_bias": lora.logit_bias})
    gate_up, down = by_hand(lora)
    with torch.no_grad():
        plain.gate_up_proj.copy_(gate_up)
        plain.down_proj.copy_(down)
    moe = flex_kernels.GraftedMoE(16, 8, 5, 2, device=DEVICE).freeze_pretrained()
    x, d_out, results = torch.randn(30, 16, device=DEVICE), torch.randn(30, 16, device=DEVICE), []
    for graft in (lora, plain):
        moe.graft = graft
        out = moe(x)
        out.backward(d_out)
        results.append(out.detach())
    torch.testing.assert_close(*results)
    want = torch.autograd.grad(
        by_hand(lora), [getattr(lora, name) for name in FACTORS], [plain.gate_up_proj.grad, plain.down_proj.grad]
    )
    for name, gradient in zip(FACTORS, want, strict=True):
        torch.testing.assert_close(getattr(lora, name).grad, gradient)
    torch.testing.assert_close(lora.logit_weight.grad, plain.logit_weight.grad)
    assert lora.gate_up_proj.grad is lora.down_proj.grad is None


def test_starts_as_its_copy() -> None:
    graft = LoraGraft(16, 6, rank=3, device=DEVICE)
    assert graft.alpha == 6
    nn.init.normal_(graft.gate_up_proj)
    nn.init.normal_(graft.down_proj)
    gate_up, down = graft.weights()
    assert torch.equal(gate_up, graft.gate_up_proj)
    assert torch.equal(down, graft.down_proj)
    assert float(graft.gate_up_lora_a.detach().std()) == pytest.approx(16**-0.5, rel=0.4)


@pytest.mark.parametrize("copy_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_merging_and_unmerging_are_exact_to_rounding(copy_dtype: torch.dtype) -> None:
    graft = filled(torch.float64 if copy_dtype == torch.float64 else torch.float32, copy_dtype)
    x = torch.randn(30, 16, device=DEVICE, dtype=graft.logit_weight.dtype)
    with torch.no_grad():
        copies, weights, out = [graft.gate_up_proj.clone(), graft.down_proj.clone()], graft.weights(), graft(x)
        graft.merge()
        for merged, want in zip(graft.weights(), weights, strict=True):
            assert torch.equal(merged, want.to(copy_dtype))
        step = torch.finfo(copy_dtype).eps
        torch.testing.assert_close(graft(x), out, rtol=0, atol=20 * step * float(out.abs().max()))
        graft.unmerge()
        for copy, before, merged in zip((graft.gate_up_proj, graft.down_proj), copies, weights, strict=True):
            allowed = step * (before.abs() + merged.abs())  # one rounding there, one back
            assert bool(((copy - before).abs() <= allowed).all())


def test_a_state_dict_never_holds_a_merged_copy() -> None:
    graft = filled()
    want = {name: tensor.clone() for name, tensor in graft.state_dict().items()}
    assert list(want) == ["gate_up_proj", "down_proj", "logit_weight", "logit_bias", *FACTORS]
    graft.merge()
    torch.testing.assert_close(dict(graft.state_dict()), want)
    assert not torch.equal(graft.gate_up_proj, want["gate_up_proj"])
    graft.load_state_dict(want)
    assert not graft.merged
    assert all(torch.equal(tensor, want[name]) for name, tensor in graft.state_dict().items())


def test_a_merged_graft_does_not_pretend_to_train() -> None:
    graft = filled()
    graft.merge()
    with pytest.raises(ValueError, match="already merged"):
        graft.merge()
    with pytest.raises(RuntimeError, match="merged and would not train"):
        graft(torch.randn(4, 16, device=DEVICE))
    graft.unmerge()
    with pytest.raises(ValueError, match="not merged"):
        graft.unmerge()


def test_declares_whose_every_parameter_is() -> None:
    graft = LoraGraft(16, 6, rank=3)
    assert graft.parameter_roles.keys() == dict(graft.named_parameters()).keys()
    frozen = {name for name, role in graft.parameter_roles.items() if role == "frozen"}
    assert frozen == {name for name, p in graft.named_parameters() if not p.requires_grad}
    assert frozen == {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize("layout", ["plain", "biased"])
def test_hangs_on_a_transformers_layer(layout: str) -> None:
    experts, _ = experts_of(layout)
    experts.requires_grad_(False).to(torch.bfloat16)
    graft = flex_kernels.attach_graft(experts, rank=2, dtype=torch.float32)[""]
    assert {p.dtype for p in graft.parameters() if p.requires_grad} == {torch.float32}
    assert graft.gate_up_proj.dtype == torch.bfloat16
    for parameter in graft.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, indices, weights = torch.randn(9, 12).bfloat16(), torch.randint(0, 4, (9, 2)), torch.rand(9, 2).bfloat16()
    experts(x, indices, weights).sum().backward()
    assert all(float(getattr(graft, name).grad.abs().sum()) > 0 for name in FACTORS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoraGraft(16, 6, rank=0), "rank is 0, expected at least 1"),
        (lambda: flex_kernels.attach_graft(experts_of("plain")[0], alpha=4.0), "alpha is 4.0 but there is no rank"),
    ],
    ids=["rank", "alpha"],
)
def test_bad_settings(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
