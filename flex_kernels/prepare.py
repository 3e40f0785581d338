"""The experts of a loaded model in another format, in the place of those that are there (`weights.py` has the formats).

    flex_kernels.prepare_experts(model, "nf4")     # 4.25 bits a weight
    flex_kernels.prepare_experts(model, None)      # dense again, as far as they are known

Layer by layer and matrix by matrix: beside the model there is at most one dense matrix and what becomes of it.
"""

import torch
from torch import nn

from flex_kernels.layer import GraftedMoE
from flex_kernels.transformers_plug import is_made_anew, is_split, moe_layers, why_not_fused
from flex_kernels.weights import FrozenWeight, check_finite, check_format, dense_in_state_dict, format_of

MATRICES = ("gate_up_proj", "down_proj")


def prepare_experts(model: nn.Module, format: str | None = "nf4") -> dict[str, str]:
    """Replaces the experts' weights by the same in `format`, frozen. Nothing else of the model changes.

    The dense weights are gone afterwards. `state_dict` and `save_pretrained` give plain weights, of the dtype that they
    had and of the values that the format keeps of them; `load_state_dict` takes plain weights and quantises them.

    Args:
        model: of transformers, with the experts interface, or one with `GraftedMoE` layers.
        format: "int8", "nf4", or None for dense weights.

    Returns:
        The format that each layer had before, by its name.

    Raises:
        ValueError: an unknown format, no MoE layers, a layout that the fused path does not take, experts that are split
            over ranks or computed at every access, NaN or infinite weights, or another format than that asked for: then
            no layer has changed.
    """
    if format is not None:
        check_format(format)
    layers = prepared_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MoE layers, expected some whose experts are to be prepared")
    before = {name: _check(name, experts, format) for name, experts in layers.items()}
    for name, experts in layers.items():
        if before[name] == (format or "dense"):
            continue
        for matrix in MATRICES:
            _replace(experts, matrix, format, f"{name}.{matrix}" if name else matrix)
    return before


def prepared_layers(model: nn.Module) -> dict[str, nn.Module]:
    """What `prepare_experts` looks at, by name: experts modules of transformers and `GraftedMoE` layers."""
    own = {name: module for name, module in model.named_modules() if isinstance(module, GraftedMoE)}
    return {**moe_layers(model), **own}


def _check(name: str, experts: nn.Module, format: str | None) -> str:
    """The format that a layer has; it can be brought into the one that is wanted."""
    if not isinstance(experts, GraftedMoE):
        if is_made_anew(experts):
            raise ValueError(f"the experts of {name} are computed at every access, expected plain parameters")
        reason = why_not_fused(experts)
        if reason is None and is_split(experts):
            reason = "they are split over ranks"
        if reason is not None:
            raise ValueError(f"the experts of {name} cannot be kept in {format or 'dense'}: {reason}")
    has = format_of(experts.gate_up_proj)
    if has not in ("dense", format or "dense"):
        if format is not None:
            raise ValueError(
                f"the experts of {name} are kept in {has}, expected dense ones to be kept in {format}: a format of a "
                "format loses twice (prepare_experts(model, None) first, if that is wanted)"
            )
    elif has == "dense" and format is not None:
        for matrix in MATRICES:
            check_finite(f"{name}.{matrix}" if name else matrix, getattr(experts, matrix))
    return has


@torch.no_grad()
def _replace(experts: nn.Module, matrix: str, format: str | None, name: str) -> None:
    weight = experts._parameters[matrix]
    if format is None:
        new = weight.dequantize()
    else:
        new = FrozenWeight.quantize(weight, format, name)
        if dense_in_state_dict not in experts._state_dict_hooks.values():
            experts._register_state_dict_hook(dense_in_state_dict)
    setattr(experts, matrix, nn.Parameter(new, requires_grad=False))
