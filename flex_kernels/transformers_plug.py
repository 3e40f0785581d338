"""One line in other people's MoE code: the experts implementation "flex" for transformers.

    flex_kernels.register()
    model.set_experts_implementation("flex")      # or from_pretrained(..., experts_implementation="flex")

An experts module with a true attribute `recompute` keeps less for the backward (see `grafted_experts`):

    for experts in flex_kernels.moe_layers(model).values():
        experts.recompute = True

transformers is imported by `register` alone, and only when it is called. An experts module may carry a graft under
the name `graft`; `grafts.py` puts it there.

Two paths, chosen per layer by `why_not_fused`, shown by `explain`:
    fused     plain gated experts ([E, 2I, H], gate rows first, no biases): `grafted_experts`
    general   every other layout: transformers' own grouped_mm (its eager code for weights that grouped_mm does not
              take: quantized, distributed, rows not aligned) computes the experts, then `combine` joins the graft
"""

import sys
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flex_kernels import plan
from flex_kernels.graft_watch import ZERO_3, graft_state, is_partitioned
from flex_kernels.layer import Graft
from flex_kernels.ops.experts import experts_made_by, grafted_experts
from flex_kernels.ops.router import combine as combine_op
from flex_kernels.weights import LAYOUT, format_of, unwrapped

NAME = "flex"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Classes by name, so that nothing needs importing; a class of the same name elsewhere is still the same formula.
ACTIVATION_BY_CLASS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
}


class ExpertWeights(NamedTuple):
    """A layer's experts in this library's layout: [E, 2I, H], [E, H, I], and the activation's name."""

    gate_up_proj: Tensor
    down_proj: Tensor
    activation: str


class LayerPath(NamedTuple):
    """Which path a layer takes: `implementation` (transformers' name), "fused", "general" or "not flex", and why."""

    name: str
    implementation: str
    path: str
    why: str


def register() -> None:
    """Adds "flex" to transformers' experts implementations. Calling it again changes nothing.

    Raises:
        ImportError: transformers is not installed, or too old to have the experts interface.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, flex_experts_forward)


def moe_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The experts modules of a transformers model by name, in layer order; empty for a model without any."""
    return {name: module for name, module in model.named_modules() if _is_experts(module)}


def why_not_fused(experts: nn.Module, gathered: bool = False) -> str | None:
    """None where the fused path computes this experts module, else the reason in a few words.

    `gathered`: weights that FSDP keeps in parts are asked about as they are in a forward, where it has joined them.
    """
    for attribute, wanted, default, reason in (
        ("has_gate", True, None, "the experts have no gate"),
        ("has_bias", False, None, "the experts have biases"),
        ("is_transposed", False, None, "the weights are stored transposed"),
        ("is_concatenated", True, None, "gate and up rows are interleaved"),
        ("has_post_expert_norm", False, False, "a norm follows each expert"),  # transformers before 5.23 has no such
    ):
        if getattr(experts, attribute, default) is not wanted:
            return reason
    if not _has_default_gate(experts):
        return f"{type(experts).__name__} has a gate function of its own"
    if activation_name(experts) is None:
        return f"its activation {type(getattr(experts, 'act_fn', None)).__name__} is unknown"
    gate_up_proj, down_proj = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        if isinstance(weight, Tensor) and is_partitioned(weight) and weight.dim() != 3:
            return ZERO_3.format(name)
        if not isinstance(weight, Tensor) or weight.dim() != 3 or weight.dtype not in DTYPES:
            return f"{name} is not a [E, ., .] tensor of an ordinary float dtype"
        if _is_distributed(weight) and not (gathered and not is_split(experts)):
            return f"{name} is distributed over several devices"
    num_experts, hidden_size, intermediate_size = down_proj.shape
    if gate_up_proj.shape != (num_experts, 2 * intermediate_size, hidden_size):
        return f"gate_up_proj {list(gate_up_proj.shape)} does not go with down_proj {list(down_proj.shape)}"
    if getattr(experts, "num_experts", num_experts) != num_experts:
        return f"num_experts is {experts.num_experts}, but there are weights for {num_experts}"
    return None


def flex_experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The function behind the name "flex" in transformers. [T, H], [T, K], [T, K] -> [T, H]."""
    if is_made_anew(self):
        with parametrize.cached(), experts_made_by(lambda: (self.gate_up_proj, self.down_proj)):
            return _forward(self, hidden_states, top_k_index, top_k_weights)
    return _forward(self, hidden_states, top_k_index, top_k_weights)


def is_made_anew(experts: nn.Module) -> bool:
    """Whether a parametrisation computes the weights at every access: bitsandbytes' dequantises 4-bit experts."""
    return any(parametrize.is_parametrized(experts, name) for name in ("gate_up_proj", "down_proj"))


def _forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    graft: Graft | None = getattr(self, "graft", None)
    if graft is not None and is_split(self):
        raise ValueError("this experts module is split over ranks, whose sum would count its graft several times")
    if why_not_fused(self) is not None:
        routed = _general_experts(self, hidden_states, top_k_index, top_k_weights)
        if graft is None:
            return routed
        return _with_graft(routed, graft, hidden_states)
    activation = activation_name(self)
    experts = (hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj)
    options = {"activation": activation, "recompute": bool(getattr(self, "recompute", False))}
    if graft is None:
        return grafted_experts(*experts, **options)
    if graft.activation != activation:
        return _with_graft(grafted_experts(*experts, **options), graft, hidden_states)
    own = (*graft.weights(), graft.logits(hidden_states))
    return grafted_experts(*experts, *own, combine=graft.combine, **options)


def _with_graft(routed: Tensor, graft: Graft, hidden_states: Tensor) -> Tensor:
    """The graft joined with the routed experts' sum, [T, H], outside the fused operation."""
    weights, graft_out = torch.ones_like(routed[:, :1]), graft(hidden_states)
    return combine_op(routed[:, None], weights, graft_out, graft.logits(hidden_states), graft.combine)


def expert_weights(experts: nn.Module) -> ExpertWeights:
    """The pretrained experts of a module in this library's layout (views), to be scored and grafted.

    Raises:
        ValueError: the layout is not `D (act(G x) * (U x))` in any orientation, so a part of it is no component.
    """
    reason = why_not_fused(experts)
    if reason is not None:
        raise ValueError(f"the experts of {type(experts).__name__} cannot be taken apart: {reason}")
    return ExpertWeights(experts.gate_up_proj, experts.down_proj, activation_name(experts))


def explain(model: nn.Module) -> list[LayerPath]:
    """Prints, layer by layer, which path its experts take and why. Returns the same as a list.

    Of a graft it says whether it is trained, frozen (`train_grafts` unfreezes it) or not started (it is zero and gets
    no gradient until it is filled).
    """
    paths = []
    for name, experts in moe_layers(model).items():
        implementation = str(getattr(experts.config, "_experts_implementation", None))
        reason = why_not_fused(experts, gathered=True)
        graft = getattr(experts, "graft", None)
        grafted = "" if graft is None else f", with a graft: {graft_state(graft)}"
        if implementation != NAME:
            path, why = "not flex", f"the model runs on {implementation!r}: model.set_experts_implementation('flex')"
        elif reason is not None:
            path, why = "general", reason + grafted
        else:
            weight = experts.gate_up_proj
            choose = plan.cuda_backend if weight.is_cuda else plan.cpu_backend
            backend = plan.backend_name(choose("experts", weight.dtype, unwrapped(weight)[0].dtype))
            kept = "made at every access" if is_made_anew(experts) else f"{format_of(weight)}, {LAYOUT}"
            where = f"{backend} on {weight.device.type}, {weight.dtype}, weights {kept}"
            path, why = "fused", where.replace("torch.", "") + grafted
        paths.append(LayerPath(name, implementation, path, why))
    for entry in paths:
        print(f"{entry.name}: {entry.path} ({entry.why})", file=sys.stdout)
    return paths


def is_split(experts: nn.Module) -> bool:
    """Whether every rank holds a part of these experts and the parts' outputs are summed (tensor, expert parallelism).

    Expert parallelism marks the module since transformers 5.23; before, `num_experts` is what one rank holds.
    """
    num_experts = experts.down_proj.shape[0]
    fewer = getattr(experts, "num_experts", num_experts) != num_experts
    mesh = getattr(experts.down_proj, "device_mesh", None)
    names = () if mesh is None else mesh.mesh_dim_names or ()
    return getattr(experts, "_is_expert_parallel", fewer) or "tp" in names or "ep" in names


def activation_name(experts: nn.Module) -> str | None:
    """The name of a module's activation in `reference.ACTIVATIONS`, or None where it is not among them."""
    act_fn = getattr(experts, "act_fn", None) or getattr(experts, "activation_fn", None)
    if type(act_fn) is nn.GELU:
        return "gelu_tanh" if act_fn.approximate == "tanh" else "gelu"
    if act_fn is nn.functional.silu:
        return "silu"
    return ACTIVATION_BY_CLASS.get(type(act_fn).__name__)


def _general_experts(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    names = ("gate_up_proj" if self.has_gate else "up_proj", "down_proj")
    if all(_grouped_mm_takes(getattr(self, name, None)) for name in names):
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
    return type(self).forward.__wrapped__(self, hidden_states, top_k_index, top_k_weights)


def _grouped_mm_takes(weight: Tensor | None) -> bool:
    if not isinstance(weight, Tensor) or weight.dtype not in DTYPES or _is_distributed(weight):
        return False
    return all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])  # what its rows must be aligned to


def _is_experts(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("_apply_gate", "is_transposed", "is_concatenated", "has_gate"))


def _has_default_gate(experts: nn.Module) -> bool:
    return type(experts)._apply_gate.__name__ == "_default_apply_gate" and "_apply_gate" not in experts.__dict__


def _is_distributed(weight: Tensor) -> bool:
    return getattr(weight, "device_mesh", None) is not None
