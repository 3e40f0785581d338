"""Who owns which parameter, and how values and moments get in and out of a model.

A parameter is *shared* (the server averages it), *personal* (it never leaves its client) or *frozen* (nobody trains
it). The layers declare it (`parameter_roles`); this is the one place that asks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flex.errors import FlexError

ROLES = ("shared", "personal", "frozen")


@dataclass(frozen=True)
class Partition:
    """Every parameter of a model by name, in exactly one of the three."""

    shared: dict[str, nn.Parameter] = field(default_factory=dict)
    personal: dict[str, nn.Parameter] = field(default_factory=dict)
    frozen: dict[str, nn.Parameter] = field(default_factory=dict)

    def trained(self) -> dict[str, nn.Parameter]:
        return {**self.shared, **self.personal}

    def counts(self) -> dict[str, int]:
        return {role: sum(p.numel() for p in getattr(self, role).values()) for role in ROLES}


def partition(model: nn.Module) -> Partition:
    """What each module declares of its own parameters; what nobody declares is frozen. Sets `requires_grad` to it."""
    parts = Partition()
    for name, parameter in model.named_parameters():
        owner, _, own_name = name.rpartition(".")
        role = getattr(model.get_submodule(owner), "parameter_roles", {}).get(own_name, "frozen")
        if role not in ROLES:
            raise FlexError(f"{name} is declared {role!r}; expected one of {', '.join(ROLES)}")
        getattr(parts, role)[name] = parameter
        parameter.requires_grad_(role != "frozen")
    return parts


@torch.no_grad()
def load_into(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor], what: str) -> None:
    """Copies `values` into `parameters`; both must name the same tensors of the same shapes."""
    if parameters.keys() != values.keys():
        odd = sorted(parameters.keys() ^ values.keys())
        raise FlexError(f"{what} does not fit this model: {odd[0]} and {len(odd) - 1} more are in only one of the two")
    for name, parameter in parameters.items():
        if parameter.shape != values[name].shape:
            raise FlexError(
                f"{what} does not fit this model: {name} is {tuple(values[name].shape)}; "
                f"expected {tuple(parameter.shape)}"
            )
        parameter.copy_(values[name])


def snapshot(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """A copy of the values, in fp32 on the CPU."""
    return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in parameters.items()}


def optimizer_moments(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state of these parameters as named tensors (`<moment>/<parameter>`)."""
    return {
        f"{key}/{name}": torch.as_tensor(value).detach().cpu().clone()
        for name, p in parameters.items()
        for key, value in optimizer.state.get(p, {}).items()
    }


def load_moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], moments: Mapping[str, Tensor]
) -> None:
    """The exact inverse of `optimizer_moments`. `step` stays on the CPU, where AdamW keeps it."""
    for key, value in moments.items():
        moment, _, name = key.partition("/")
        device = "cpu" if moment == "step" else parameters[name].device
        optimizer.state[parameters[name]][moment] = value.to(device, copy=True)
