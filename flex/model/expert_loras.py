"""LoRA on every expert of a MoE layer.

With W_e the pretrained matrices of expert e, frozen, and s the scale of the low-rank part:

    W'_e = W_e + s B_e A_e         for gate_up (A [r, H], B [2I, r]) and for down (A [r, I], B [H, r])
    y_t = sum over the experts e that token t is routed to of   w_te D'_e (act(G'_e x_t) * (U'_e x_t))

The products with the pretrained matrices and with the factors stay apart, expert by expert, so that no gradient as
large as an expert is ever made. `NOTES.md` has the time beside that of the fused operation on merged weights.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flex_kernels
from flex_kernels.reference import ACTIVATIONS

FACTORS = ("gate_up_lora_a", "gate_up_lora_b", "down_lora_a", "down_lora_b")


class ExpertLoras(nn.Module):
    """The LoRAs of one layer's experts.

    Args:
        weights: the layer's experts, [E, 2I, H] and [E, H, I]; views, which are not kept as parameters.
        rank, scale: r and s.

    Parameters, fp32: gate_up_lora_a [E, r, H], gate_up_lora_b [E, 2I, r], down_lora_a [E, r, I], down_lora_b [E, H, r];
    `tokens` [E], how many tokens were routed to each expert in forwards with gradients since it was last zeroed: a
    parameter, so that it travels with the factors, which the server weighs by it.
    """

    parameter_roles: ClassVar[dict[str, str]] = dict.fromkeys((*FACTORS, "tokens"), "personal")

    def __init__(self, weights: flex_kernels.ExpertWeights, rank: int, scale: float):
        super().__init__()
        num_experts, hidden_size, intermediate_size = weights.down_proj.shape
        self.activation, self.scale, self.rank = weights.activation, scale, rank
        device = weights.down_proj.device
        shapes = ((rank, hidden_size), (2 * intermediate_size, rank), (rank, intermediate_size), (hidden_size, rank))
        for name, shape in zip(FACTORS, shapes, strict=True):
            setattr(self, name, nn.Parameter(torch.zeros(num_experts, *shape, device=device)))
        self.tokens = nn.Parameter(torch.zeros(num_experts, device=device))
        with torch.no_grad():  # as a LoRA on a linear layer starts: A normal, B zero
            for a in (self.gate_up_lora_a, self.down_lora_a):
                a.copy_(torch.randn(a.shape) * a.shape[-1] ** -0.5)

    def stand_in_for(self, layer: nn.Module) -> None:
        """From here on the experts module `layer`, which holds this one, computes with the LoRAs."""
        layer.forward = lambda *inputs: (
            type(layer).forward(layer, *inputs) if layer.expert_loras is None else layer.expert_loras(layer, *inputs)
        )

    @staticmethod
    def step_aside(layer: nn.Module) -> None:
        """The inverse of `stand_in_for`."""
        del layer.forward

    def forward(
        self, layer: nn.Module, hidden_states: Tensor, expert_indices: Tensor, routing_weights: Tensor
    ) -> Tensor:
        """[T, H], [T, K], [T, K] -> [T, H]."""
        output = torch.zeros_like(hidden_states)
        act, counts = ACTIVATIONS[self.activation], torch.zeros_like(self.tokens)
        for expert in expert_indices.unique().tolist():
            rows, slots = torch.where(expert_indices == expert)
            counts[expert] = len(rows)
            x = hidden_states[rows]
            pre = F.linear(x, layer.gate_up_proj[expert]) + self._low_rank(x, "gate_up", expert)
            gate, up = pre.chunk(2, dim=-1)
            inner = act(gate) * up
            out = F.linear(inner, layer.down_proj[expert]) + self._low_rank(inner, "down", expert)
            weighed = routing_weights[rows, slots, None] * out.to(routing_weights.dtype)
            output = output.index_add(0, rows, weighed.to(output.dtype))
        if torch.is_grad_enabled() and self.training:
            self.tokens.data += counts
        return output

    def _low_rank(self, x: Tensor, which: str, expert: int) -> Tensor:
        a, b = getattr(self, f"{which}_lora_a")[expert], getattr(self, f"{which}_lora_b")[expert]
        return self.scale * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
