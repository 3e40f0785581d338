"""Experts in every layout that transformers' experts interface knows, and the reason why flex does not fuse it."""

import inspect
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation


class Experts(nn.Module):
    """Experts as transformers writes them, of any layout; the eager forward is the loop over experts."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.num_experts, hidden, inter = 4, 12, 8
        self.act_fn = ACT2FN[config.act]
        up, rows = ("gate_up_proj", 2 * inter) if config.has_gate else ("up_proj", inter)
        first, second = (4, rows, hidden), (4, hidden, inter)
        if config.is_transposed:
            first, second = (4, hidden, rows), (4, inter, hidden)
        self.register_parameter(up, nn.Parameter(torch.randn(first) * 0.3))
        self.down_proj = nn.Parameter(torch.randn(second) * 0.3)
        if config.has_bias:
            self.register_parameter(f"{up}_bias", nn.Parameter(torch.randn(4, rows)))
            self.down_proj_bias = nn.Parameter(torch.randn(4, hidden))
        if config.has_post_expert_norm:
            self.post_expert_norm = nn.LayerNorm(hidden)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        name = "gate_up_proj" if self.has_gate else "up_proj"
        for index in range(self.num_experts):
            first, second = getattr(self, name)[index], self.down_proj[index]
            first, second = (first, second) if self.is_transposed else (first.T, second.T)
            token, slot = torch.where(top_k_index == index)
            rows = hidden_states[token] @ first
            rows = rows + getattr(self, f"{name}_bias")[index] if self.has_bias else rows
            rows = (self._apply_gate(rows) if self.has_gate else self.act_fn(rows)) @ second
            rows = rows + self.down_proj_bias[index] if self.has_bias else rows
            rows = self.post_expert_norm(rows) if hasattr(self, "post_expert_norm") else rows
            out = out.index_add(0, token, rows * top_k_weights[token, slot, None])
        return out


def interleaved_gate(self: nn.Module, gate_up: Tensor) -> Tensor:
    return (gate_up[..., ::2].clamp(max=1.0) * torch.sigmoid(gate_up[..., ::2])) * (gate_up[..., 1::2] + 1)


DEFAULT = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}
LAYOUTS = {
    "plain": ({}, "silu", None, None),
    "gelu": ({}, "gelu", None, None),
    "gelu tanh": ({}, "gelu_pytorch_tanh", None, None),
    "new gelu": ({}, "gelu_new", None, None),
    "biased": ({"has_bias": True}, "silu", None, "the experts have biases"),
    "transposed": ({"is_transposed": True}, "silu", None, "the weights are stored transposed"),
    "no gate": ({"has_gate": False}, "relu2", None, "the experts have no gate"),
    "post norm": ({"has_post_expert_norm": True}, "silu", None, "a norm follows each expert"),
    "interleaved": ({"is_concatenated": False}, "silu", interleaved_gate, "gate and up rows are interleaved"),
    "own gate": ({}, "silu", interleaved_gate, "Experts has a gate function of its own"),
    "unknown activation": ({}, "mish", None, "its activation MishActivation is unknown"),
    "clipped gelu": ({}, "gelu_10", None, "its activation ClippedGELUActivation is unknown"),
    "all at once": (
        {"has_bias": True, "is_transposed": True, "is_concatenated": False},
        "silu",
        interleaved_gate,
        "the experts have biases",
    ),
}


FLAGS = inspect.signature(use_experts_implementation).parameters
if "has_post_expert_norm" not in FLAGS:  # transformers 5.17
    del LAYOUTS["post norm"]


def experts_of(name: str) -> tuple[nn.Module, str | None]:
    flags, act, gate, reason = LAYOUTS[name]
    own = {"__init__": Experts.__init__, "forward": Experts.forward} | ({"_apply_gate": gate} if gate else {})
    known = {flag: value for flag, value in (DEFAULT | flags).items() if flag in FLAGS}
    experts_class = use_experts_implementation(**known)(type("Experts", (nn.Module,), own))
    # `super()` inside the copied __init__ belongs to Experts
    experts_class.__bases__ = (Experts,)
    config = SimpleNamespace(act=act, _experts_implementation="flex", **DEFAULT | flags)
    return experts_class(config), reason
