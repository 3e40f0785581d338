"""A tiny Qwen2-MoE on "flex", and the dense model that a prepared one is to compute like."""

import copy

import torch
from torch import nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

import flex_kernels
from flex_kernels import FrozenWeight

TOKENS = torch.arange(2 * 9).view(2, 9) % 64


def tiny(**changes: int) -> Qwen2MoeForCausalLM:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "initializer_range": 0.3,
    }
    flex_kernels.register()
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes | changes))
    model.set_experts_implementation("flex")
    return model.eval()


def with_kept_values(model: nn.Module, format: str) -> nn.Module:
    """The dense model with the values that a format keeps: what a prepared one is to compute."""
    model = copy.deepcopy(model)
    for experts in flex_kernels.moe_layers(model).values():
        for name in ("gate_up_proj", "down_proj"):
            kept = FrozenWeight.quantize(getattr(experts, name), format).dequantize()
            setattr(experts, name, nn.Parameter(kept))
    return model
