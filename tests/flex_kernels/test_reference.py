"""The specification itself: against transformers' own MoE blocks, its witness outside this house; gradcheck in fp64."""

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, Case, layer_inputs
from compare import double, exact
from torch import Tensor, nn
from transformers import MixtralConfig, OlmoeConfig, Qwen2MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from flex_kernels import reference

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_experts_per_tok": 2}
BLOCKS = {
    "qwen2_moe": (
        Qwen2MoeSparseMoeBlock,
        Qwen2MoeConfig(num_experts=6, moe_intermediate_size=12, shared_expert_intermediate_size=8, **SIZES),
    ),
    "qwen2_moe renormalised": (
        Qwen2MoeSparseMoeBlock,
        Qwen2MoeConfig(
            num_experts=6, moe_intermediate_size=12, shared_expert_intermediate_size=8, norm_topk_prob=True, **SIZES
        ),
    ),
    "mixtral": (MixtralSparseMoeBlock, MixtralConfig(num_local_experts=6, **SIZES)),
    "olmoe": (OlmoeSparseMoeBlock, OlmoeConfig(num_experts=6, **SIZES)),
}


def by_the_reference(block: nn.Module, flat: Tensor, renormalize: bool) -> Tensor:
    weights, indices = reference.route(F.linear(flat, block.gate.weight), 2, renormalize)
    out = reference.grafted_experts(flat, indices, weights, block.experts.gate_up_proj, block.experts.down_proj)
    if hasattr(block, "shared_expert"):
        out = out + torch.sigmoid(block.shared_expert_gate(flat)) * block.shared_expert(flat)
    return out


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_equals_transformers_blocks_forward_and_every_gradient(name: str) -> None:
    block_class, config = BLOCKS[name]
    config._experts_implementation = "eager"
    block = block_class(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    renormalize = name == "mixtral" or bool(getattr(config, "norm_topk_prob", False))
    hidden, d_out = torch.randn(2, 7, 16), torch.randn(14, 16)
    results = []
    for function in (
        lambda x: block(x).view(-1, 16),
        lambda x: by_the_reference(block, x.view(-1, 16), renormalize),
    ):
        x = hidden.clone().requires_grad_()
        block.zero_grad()
        out = function(x)
        out.backward(d_out)
        results.append([out, x.grad, *(p.grad for p in block.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


TINY = Case("tiny", 4, 2, 3, 2, 3, 2, "finite differences are slow", "sentinels")


@pytest.mark.parametrize("combine", reference.COMBINES)
@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
def test_gradcheck_of_the_layer(combine: str, activation: str) -> None:
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in double(layer_inputs(TINY))]
    inputs = [x.cpu() if not x.requires_grad else x.detach().cpu().requires_grad_() for x in inputs]

    def layer(*args: Tensor) -> Tensor:
        with exact():
            return reference.grafted_experts(*args, combine=combine, activation=activation)

    assert torch.autograd.gradcheck(layer, inputs)


@pytest.mark.parametrize("renormalize", [False, True])
def test_gradcheck_of_the_router(renormalize: bool) -> None:
    def router(logits: Tensor) -> Tensor:
        with exact():
            return reference.route(logits, 2, renormalize)[0]

    assert torch.autograd.gradcheck(router, torch.randn(4, 5, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("combine", reference.COMBINES)
def test_gradcheck_of_combine(combine: str) -> None:
    shapes = ((3, 2, 4), (3, 2), (3, 4), (3,))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def combined(*args: Tensor) -> Tensor:
        with exact():
            return reference.combine(*args, combine)

    assert torch.autograd.gradcheck(combined, inputs)


def test_a_closed_gate_leaves_the_layer_as_it_was() -> None:
    inputs = [x.cpu() for x in layer_inputs(BY_NAME["plain"])]
    inputs[7] = torch.full_like(inputs[7], -200.0)
    for combine in reference.COMBINES:
        assert torch.equal(reference.grafted_experts(*inputs, combine=combine), reference.grafted_experts(*inputs[:5]))


def test_a_convex_graft_that_is_open_is_all_there_is() -> None:
    inputs = [x.cpu() for x in layer_inputs(BY_NAME["plain"])]
    inputs[7] = torch.full_like(inputs[7], 200.0)
    torch.testing.assert_close(
        reference.grafted_experts(*inputs, combine="convex"), reference.expert(inputs[0], inputs[5], inputs[6])
    )
