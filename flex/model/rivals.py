"""What a client may keep to itself instead of a graft, to see whether the graft is more than its parameters.

lora     a second LoRA on the attention, beside the shared one, with about as many parameters as the grafts have
expert   in each layer the expert that the client's tokens are routed to most, trained in place: a token routed to it
         with weight w gets w E'(x) instead of w E(x), where E' starts as E
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import flex_kernels
from flex.config import LoraSettings
from flex.graft.choice import Choice
from flex.methods import GraftSettings
from flex_kernels import reference

PRIVATE = "private"  # the second LoRA, as peft names it


class AdaptedExpert(nn.Module):
    """One expert of a layer, trained in place: `hook`, on the experts module, swaps its part in the layer's output.

    Parameters: gate_up_proj [2I, H], down_proj [H, I], fp32; `expert` [1], which one, a parameter so that a client's
    file says it, frozen. Before `adapt` it is expert 0 with weights of zero.
    """

    parameter_roles: ClassVar[dict[str, str]] = {"gate_up_proj": "personal", "down_proj": "personal"}

    def __init__(self, layer: nn.Module):
        super().__init__()
        weights = flex_kernels.expert_weights(layer)
        self.activation = weights.activation
        for name in ("gate_up_proj", "down_proj"):
            setattr(self, name, nn.Parameter(torch.zeros_like(getattr(weights, name)[0], dtype=torch.float32)))
        self.expert = nn.Parameter(torch.zeros(1, device=weights.down_proj.device), requires_grad=False)

    @torch.no_grad()
    def adapt(self, layer: nn.Module, expert: int) -> None:
        """Starts as this expert of the layer."""
        self.gate_up_proj.copy_(layer.gate_up_proj[expert])
        self.down_proj.copy_(layer.down_proj[expert])
        self.expert.fill_(expert)

    @staticmethod
    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """`F_t + w_te (E'_e(x_t) - E_e(x_t))` for the tokens that are routed to e."""
        own = layer.adapted
        if own is None:
            return output
        hidden_states, expert_indices, routing_weights = inputs
        expert = int(own.expert)
        rows, slots = torch.where(expert_indices == expert)
        x = hidden_states[rows]
        dtype = x.dtype
        new = reference.expert(x, own.gate_up_proj.to(dtype), own.down_proj.to(dtype), own.activation)
        old = reference.expert(x, layer.gate_up_proj[expert], layer.down_proj[expert], own.activation)
        change = routing_weights[rows, slots, None] * (new - old).to(routing_weights.dtype)
        return output.index_add(0, rows, change.to(output.dtype))


def attach_adapted(layers: Mapping[str, nn.Module]) -> None:
    for layer in layers.values():
        layer.adapted = AdaptedExpert(layer)
        layer._adapted_hook = layer.register_forward_hook(AdaptedExpert.hook)


def detach_adapted(layers: Mapping[str, nn.Module]) -> None:
    for layer in layers.values():
        if hasattr(layer, "_adapted_hook"):
            layer._adapted_hook.remove()
            del layer._adapted_hook, layer.adapted


def adapt(layers: Mapping[str, nn.Module], choices: Sequence[Choice]) -> None:
    """Every layer's adapted expert starts as the chosen one."""
    for choice in choices:
        layers[choice.module].adapted.adapt(layers[choice.module], choice.chosen)


def add_private_lora(
    adapter: peft.PeftModel, lora: LoraSettings, graft: GraftSettings, layers: Mapping[str, nn.Module]
) -> None:
    """The second LoRA beside the first, both at work; its rank is that which comes nearest to the grafts' count."""
    each = [m for m in adapter.modules() if isinstance(m, LoraLayer)]
    parameters_a_rank = sum(m.in_features + m.out_features for m in each)
    rank = max(1, round(sum(graft_parameters(graft, layer) for layer in layers.values()) / parameters_a_rank))
    settings: dict[str, Any] = {"lora_dropout": lora.dropout, "target_modules": list(lora.targets)}
    adapter.add_adapter(PRIVATE, peft.LoraConfig(r=rank, lora_alpha=lora.alpha * rank / lora.rank, **settings))
    adapter.base_model.set_adapter(["default", PRIVATE])


def graft_parameters(graft: GraftSettings, layer: nn.Module) -> int:
    """How many numbers of a graft with these settings train."""
    _, hidden_size, intermediate_size = layer.down_proj.shape
    width = graft.graft_width(intermediate_size)
    low_rank = graft.rank * (2 * hidden_size + 3 * width)
    return (low_rank if graft.training == "lora" else 3 * width * hidden_size) + hidden_size + 1
