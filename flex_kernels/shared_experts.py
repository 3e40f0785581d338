"""The shared experts of a loaded model by the fused operation: one frozen expert that every token takes.

    flex_kernels.prepare_shared_experts(model)             # dense
    flex_kernels.prepare_shared_experts(model, "nf4")      # in 4 bits, as `prepare_experts` does it for routed ones

Many families have a dense gated module beside the routed experts of a layer (Qwen-MoE `shared_expert`, DeepSeek
`shared_experts`). It is the same product; computed by the same kernels it is faster in bf16 on a CPU, and keeps fewer
bytes for the backward. What stands around it, a gate of its own say, stays as it is.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flex_kernels.ops.experts import grafted_experts
from flex_kernels.transformers_plug import DTYPES, activation_name, moe_layers
from flex_kernels.weights import FrozenWeight, check_finite, check_format, format_of

PARTS = ("gate_proj", "up_proj", "down_proj")
PROBE_SIZES = (1.0, 4.0, 16.0, 64.0)  # of the pre-activations, in the root mean square; their squares fit fp16
# How far the module and the operation may be apart on a token of the probe, in the norm: they round at other places.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class SharedExpert(nn.Module):
    """Stands where a family's own module stood: `y = D (act(G x) * (U x))`, any leading dimensions.

    `state_dict` and `load_state_dict` speak of the names and the plain weights of the module that was there.
    """

    def __init__(self, gate_up_proj: Tensor, down_proj: Tensor, activation: str, order: tuple[str, ...]) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(gate_up_proj, requires_grad=False)  # [1, 2I, H]
        self.down_proj = nn.Parameter(down_proj, requires_grad=False)  # [1, H, I]
        self.activation, self.order = activation, order
        self._register_state_dict_hook(_plain_names)
        self.register_load_state_dict_pre_hook(_own_names)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        expert = torch.zeros(len(tokens), 1, dtype=torch.long, device=tokens.device)
        weight = torch.ones(len(tokens), 1, device=tokens.device)
        out = grafted_experts(tokens, expert, weight, self.gate_up_proj, self.down_proj, activation=self.activation)
        return out.reshape(hidden_states.shape)

    def extra_repr(self) -> str:
        return f"{format_of(self.gate_up_proj)}, {self.activation}"


@torch.no_grad()
def prepare_shared_experts(model: nn.Module, format: str | None = None) -> list[str]:
    """Replaces the modules of a model's shared experts by `SharedExpert`s, frozen, and their weights by the same in
    `format`. Values that are dense stay what they are; beside the model there is at most one layer's more.

    LoRA on the linear layers of a shared expert is not possible afterwards: they are gone. `prepare_experts` has what
    formats are and cost.

    Args:
        model: of transformers, with the experts interface.
        format: "int8", "nf4", or None for dense weights.

    Returns:
        The names of the modules.

    Raises:
        ValueError: an unknown format, no shared experts, one that computes something else or that hooks, adapters,
            parametrisations or several devices stand in the way of, NaN or infinite weights, or another format than
            that asked for: then no layer has changed.
    """
    if format is not None:
        check_format(format)
    found = dict(shared_experts(model))
    if not found:
        raise ValueError(f"{type(model).__name__} has no shared experts beside its routed ones, expected some")
    for name, module in found.items():
        reason = _why_not_kept(module, format) if isinstance(module, SharedExpert) else _why_not_fused(name, module)
        if reason is not None:
            raise ValueError(f"the shared expert {name} cannot be kept in {format or 'dense'}: {reason}")
    for name, module in found.items():
        made = module if isinstance(module, SharedExpert) else _fused(module)
        for matrix in ("gate_up_proj", "down_proj"):
            weight = getattr(made, matrix)
            if format_of(weight) != (format or "dense"):
                new = weight.dequantize() if format is None else FrozenWeight.quantize(weight, format, name)
                setattr(made, matrix, nn.Parameter(new, requires_grad=False))
        if made is not module:
            made.train(module.training)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, made)
    return list(found)


def shared_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What stands beside the experts of a layer, in the same module, and has the three linear layers of a gated expert;
    and what has been put in the place of such a module."""
    for layer, experts in moe_layers(model).items():
        parent = layer.rpartition(".")[0]
        for own, child in model.get_submodule(parent).named_children():
            parts = [getattr(child, part, None) for part in PARTS]
            if child is not experts and (
                isinstance(child, SharedExpert) or all(isinstance(p, nn.Module) for p in parts)
            ):
                yield f"{parent}.{own}" if parent else own, child


def _why_not_kept(module: SharedExpert, format: str | None) -> str | None:
    has = format_of(module.gate_up_proj)
    if format is None or has in ("dense", format):
        return None
    return (
        f"it is in {has}, and a format of a format loses twice (prepare_shared_experts(model) first, if that is wanted)"
    )


def _why_not_fused(name: str, module: nn.Module) -> str | None:
    """None where the operation computes the same as this module, else the reason in a few words."""
    linears = {part: getattr(module, part) for part in PARTS}
    for part, linear in linears.items():
        if type(linear) is not nn.Linear:
            return f"its {part} is a {type(linear).__name__}"
        if linear.bias is not None:
            return f"its {part} has a bias"
        if parametrize.is_parametrized(linear):
            return f"its {part} is computed at every access"
        if hasattr(linear.weight, "device_mesh") or linear.weight.is_meta:
            return f"its {part} is not here as a whole"
        if linear.weight.dtype not in DTYPES or linear.weight.dtype != linears[PARTS[0]].weight.dtype:
            return f"its {part} is {linear.weight.dtype}"
    if any(_has_hooks(one) for one in (module, *linears.values())):
        return "it has hooks"
    if activation_name(module) is None:
        return "its activation is unknown"
    gate, up, down = (linears[part].weight for part in PARTS)
    if gate.shape != up.shape or down.shape != gate.shape[::-1]:
        return f"its matrices {list(gate.shape)}, {list(up.shape)}, {list(down.shape)} do not go together"
    for part, linear in linears.items():
        check_finite(f"{name}.{part}.weight", linear.weight)
    return _why_not_equal(module)


def _why_not_equal(module: nn.Module) -> str | None:
    """By trying: what a family does besides, a scale or a clamp, cannot be seen from its parts. One token for each size
    of the pre-activations, since a clamp shows in large ones alone."""
    gate = module.gate_proj.weight
    probe = torch.randn(len(PROBE_SIZES), gate.shape[1], generator=torch.Generator().manual_seed(0))
    probe = probe.to(gate.device, torch.float32)
    size = (probe @ gate.float().T).square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-12)
    probe = (probe / size * torch.tensor(PROBE_SIZES, device=gate.device)[:, None]).to(gate.dtype)
    was_training = module.training
    theirs = module.eval()(probe)
    module.train(was_training)
    if not isinstance(theirs, Tensor) or theirs.shape != probe.shape:
        return f"{type(module).__name__} does not return a tensor like its input"
    error = (_fused(module)(probe).double() - theirs.double()).norm(dim=1)
    if bool((error <= TOLERANCE[gate.dtype] * theirs.double().norm(dim=1)).all()):
        return None
    return f"{type(module).__name__} does not compute down_proj(act(gate_proj(x)) * up_proj(x))"


def _fused(module: nn.Module) -> SharedExpert:
    gate, up, down = (getattr(module, part).weight.detach() for part in PARTS)
    order = tuple(name for name, _ in module.named_children() if name in PARTS)
    return SharedExpert(torch.cat([gate, up])[None], down.contiguous()[None], str(activation_name(module)), order)


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds) or "forward" in vars(module)


def _plain_names(module: SharedExpert, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A state dict hook: whoever saves the model gets the weights of the module that was there."""
    if f"{prefix}gate_up_proj" not in state:
        return
    gate_up, down = (state.pop(f"{prefix}{name}") for name in ("gate_up_proj", "down_proj"))
    gate_up, down = (w.dequantize() if isinstance(w, FrozenWeight) else w for w in (gate_up, down))
    gate, up = gate_up[0].chunk(2)
    plain = dict(zip(PARTS, (gate, up, down[0]), strict=True))
    state |= {f"{prefix}{part}.weight": plain[part] for part in module.order}


def _own_names(module: SharedExpert, state: dict[str, Any], prefix: str, *_: Any) -> None:
    names = [f"{prefix}{part}.weight" for part in PARTS]
    if all(name in state for name in names):
        gate, up, down = (state.pop(name) for name in names)
        state[f"{prefix}gate_up_proj"], state[f"{prefix}down_proj"] = torch.cat([gate, up])[None], down[None]
