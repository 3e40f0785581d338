"""What stands beside flex: transformers' own are in `layers.py`; here are a plain `grouped_mm`, Liger, and two bounds.

All are given `(hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K])` and the same frozen weights.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from benchmarks.layers import GraftedByHand, Layers

LIGER = "liger"


class RawGroupedMM(nn.Module):
    """`torch.nn.functional.grouped_mm` and nothing else: what one writes by hand in an afternoon."""

    def __init__(self, gate_up_proj: Tensor, down_proj: Tensor) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        (num_tokens, top_k), num_experts = top_k_index.shape, len(self.gate_up_proj)
        ids, order = top_k_index.flatten().sort(stable=True)
        experts = torch.arange(1, num_experts + 1, device=ids.device)
        ends = torch.searchsorted(ids, experts, out_int32=True)
        gate, up = F.grouped_mm(hidden_states[order // top_k], self.gate_up_proj.mT, offs=ends).chunk(2, dim=-1)
        rows = F.grouped_mm(F.silu(gate) * up, self.down_proj.mT, offs=ends)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return (rows[back].view(num_tokens, top_k, -1) * top_k_weights[..., None]).sum(1)


class Liger(nn.Module):
    """Liger-kernel's fused MoE. It computes the experts' weight gradients too, wanted or not."""

    def __init__(self, gate_up_proj: Tensor, down_proj: Tensor) -> None:
        super().__init__()
        from liger_kernel.ops import LigerFusedMoEFunction

        self.apply_fused = LigerFusedMoEFunction.apply
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        index = top_k_index.to(torch.int32)
        return self.apply_fused(hidden_states, self.gate_up_proj, self.down_proj, index, top_k_weights)


class BalancedProducts(nn.Module):
    """The bound: every expert has the same number of rows, which lie sorted already; no gather, no sum over slots."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        shape, experts = layers.shape, layers.modules["flex"]
        rows = -(-shape.num_tokens * shape.top_k // shape.num_experts)
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj
        self.rows = torch.randn(shape.num_experts, rows, shape.hidden_size).to(layers.dtype).requires_grad_()
        self.d_rows = torch.randn(self.rows.shape).to(layers.dtype)

    def forward(self) -> Tensor:
        gate, up = torch.bmm(self.rows, self.gate_up_proj.mT).chunk(2, dim=-1)
        return torch.bmm(F.silu(gate) * up, self.down_proj.mT)


def plain_layer(layers: Layers, kind: type[nn.Module]) -> nn.Module:
    """One of the two modules above, with the graft as a user writes it."""
    experts = layers.modules["flex"]
    return GraftedByHand(kind(experts.gate_up_proj, experts.down_proj), layers.graft)


def bare_layer(layers: Layers, implementation: str = "flex") -> nn.Module:
    """Transformers' experts module without a graft."""
    grafted = layers.modules["flex"]
    config = copy.deepcopy(grafted.config)
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = Qwen2MoeExperts(config)
    experts.gate_up_proj, experts.down_proj = grafted.gate_up_proj, grafted.down_proj
    return experts
