"""Grafts on any transformers model whose experts carry the experts interface: put on, taken off, found in a state dict.

    grafts = flex_kernels.attach_graft(model)     # switches the model to "flex" as well

The graft hangs on the experts module under the name `graft`. Its keys in the model's state dict are

    <name of the experts module>.graft.{gate_up_proj,down_proj,logit_weight,logit_bias}
    <name of the experts module>.graft.{gate_up,down}_lora_{a,b}                          with a rank

and no other key changes, so what `save_pretrained` writes is the base model's own tensors plus these, and
`from_pretrained` still finds the base in it. A family whose files name the modules otherwise (Mixtral's
`block_sparse_moe` for `mlp`) has its grafts renamed along; `load_state_dict` finds them again.

What trains on one's own text forgets some of what the base knew. An anchor, a few general sequences beside each batch,
holds it (`examples/anchor.py` runs this; `docs/knowledge.md` says what it keeps):

    model.requires_grad_(False).eval()
    with torch.no_grad():  # the base's answers to general text, once, before there are grafts
        base = model(input_ids=general).logits.log_softmax(-1)
    for graft in flex_kernels.attach_graft(model, dtype=torch.float32).values():
        graft.reset_parameters()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for own in batches:
        pick = torch.randint(len(general), (4,))
        now = model(input_ids=general[pick]).logits.log_softmax(-1).flatten(0, 1)
        kl = torch.nn.functional.kl_div(now, base[pick].flatten(0, 1), log_target=True, reduction="batchmean")
        (model(input_ids=own, labels=own).loss + 0.1 * kl).backward()
        optimizer.step()
        optimizer.zero_grad()
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flex_kernels.fused_router import fuse, refuse_router_logits, router_of, unfuse
from flex_kernels.graft_watch import GraftWatch, before_state_dict, is_partitioned, refuse_partitioned
from flex_kernels.layer import Device, Graft, LoraGraft
from flex_kernels.transformers_plug import NAME, activation_name, is_split, moe_layers, register


def attach_graft(
    model: nn.Module,
    width: int | Sequence[int] | None = None,
    combine: str = "additive",
    logit_bias: float = -4.0,
    layers: list[int] | None = None,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    device: Device = None,
    dtype: torch.dtype | None = None,
    fuse_router: bool = False,
) -> dict[str, Graft]:
    """Puts a graft and its gate on the experts modules of a transformers model, and switches it to "flex".

    The output stays what it was: a graft's weights start at zero (fill them, see `Graft`). With a rank the weights are
    a frozen copy, and what trains is a low-rank part of it (see `LoraGraft`).

    Args:
        width: I_g, or one for each of the layers; None takes each layer's own intermediate size.
        combine, logit_bias: as in `Graft`.
        layers: positions in `moe_layers(model)`; None takes all.
        rank, alpha: as in `LoraGraft`; without a rank all of the graft trains.
        device, dtype: of what trains; None takes those of the layer's experts, as a LoRA's frozen copy always does.
        fuse_router: compute each layer's router together with its graft's gate (`grafted_route`). At a tie of two
            experts the lower index then wins, where `torch.topk` promises nothing.

    Returns:
        The grafts by the name of the experts module they hang on.

    Raises:
        ValueError: no MoE layers, a position that is not there, widths that are not one per layer, a graft already
            there, experts split over ranks or partitioned by DeepSpeed ZeRO-3; with fuse_router, a router that is not
            softmax and top-k, or `output_router_logits`, which is refused at each forward as well.
    """
    found = list(moe_layers(model).items())
    if not found:
        raise ValueError(f"{type(model).__name__} has no MoE layers with transformers' experts interface")
    if layers is not None and (wrong := [index for index in layers if not 0 <= index < len(found)]):
        raise ValueError(f"layers has {wrong}, expected positions from 0 to {len(found) - 1}")
    if alpha is not None and rank is None:
        raise ValueError(f"alpha is {alpha} but there is no rank, expected both or none")
    chosen = found if layers is None else [found[index] for index in layers]
    widths = [width] * len(chosen) if width is None or isinstance(width, int) else list(width)
    if len(widths) != len(chosen):
        raise ValueError(f"width has {len(widths)} entries, expected one for each of {len(chosen)} layers")
    for name, experts in chosen:
        if getattr(experts, "graft", None) is not None:
            raise ValueError(f"{name} already carries a graft; detach_graft(model) takes it off")
        refuse_partitioned(name, experts)
        if is_split(experts):
            raise ValueError(f"{name} is split over ranks, whose sum would count its graft several times")
    routers = {name: router_of(model, name) for name, _ in chosen} if fuse_router else {}
    if fuse_router:
        refuse_router_logits(model, (), {})
    _switch_on(model, [experts for _, experts in chosen])
    if fuse_router and "_router_guard" not in vars(model):
        model._router_guard = model.register_forward_pre_hook(refuse_router_logits, with_kwargs=True)
    grafts: dict[str, Graft] = {}
    watches = (getattr(getattr(experts, "graft", None), "watch", None) for _, experts in found)
    watch = next(filter(None, watches), None) or GraftWatch()  # one for the model, however often this is called
    for (name, experts), own_width in zip(chosen, widths, strict=True):
        pretrained = experts.down_proj
        hidden_size, intermediate_size = _sizes(experts)
        width_and_rank = (intermediate_size if own_width is None else own_width,)
        options: dict[str, Any] = {"combine": combine, "activation": activation_name(experts) or "silu"}
        options["device"] = pretrained.device if device is None else device
        options["dtype"] = pretrained.dtype if dtype is None else dtype
        if rank is not None:
            width_and_rank += (rank, alpha)
            options["copy_dtype"] = pretrained.dtype
        make = Graft if rank is None else LoraGraft
        experts.graft = grafts[name] = make(hidden_size, *width_and_rank, logit_bias=logit_bias, **options)
        if fuse_router:
            fuse(routers[name], experts)
        grafts[name].watch = watch
        grafts[name].register_state_dict_pre_hook(before_state_dict)
        experts._graft_guard = experts.register_forward_pre_hook(_before_forward)
    watch.grafts |= grafts
    watch.looked = False
    if "_graft_finder" not in vars(model):
        model._graft_finder = model.register_load_state_dict_pre_hook(_find_renamed_grafts)
    return grafts


def detach_graft(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Takes every graft off again, with a fused router. Returns their state dicts by the name of the experts module."""
    states = {}
    unfuse(model)
    if "_router_guard" in vars(model):
        model._router_guard.remove()
        del model._router_guard
    for name, experts in moe_layers(model).items():
        graft = getattr(experts, "graft", None)
        if hasattr(experts, "_graft_guard"):
            experts._graft_guard.remove()
            del experts._graft_guard
        if graft is not None:
            states[name] = graft.state_dict()
        if hasattr(experts, "graft"):
            del experts.graft
    if "_graft_finder" in vars(model):
        model._graft_finder.remove()
        del model._graft_finder
    return states


def _sizes(experts: nn.Module) -> tuple[int, int]:
    _, rows, columns = experts.down_proj.shape
    return (columns, rows) if experts.is_transposed else (rows, columns)


def _switch_on(model: nn.Module, chosen: list[nn.Module]) -> None:
    register()
    if all(experts.config._experts_implementation == NAME for experts in chosen):
        return
    if not hasattr(model, "set_experts_implementation"):
        raise ValueError(f"{type(model).__name__} has no set_experts_implementation; switch its model to 'flex' first")
    model.set_experts_implementation(NAME)


def _before_forward(experts: nn.Module, _: Any) -> None:
    _refuse_other_implementations(experts)
    graft = getattr(experts, "graft", None)
    if graft is None or torch.compiler.is_compiling():
        return
    if is_partitioned(graft.down_proj):
        refuse_partitioned("the graft", graft)
    watch: GraftWatch | None = getattr(graft, "watch", None)  # None where somebody hung up a graft by hand
    if watch is not None and experts.training:
        watch.before_forward(graft)


def _refuse_other_implementations(experts: nn.Module) -> None:
    implementation = experts.config._experts_implementation
    if getattr(experts, "graft", None) is not None and implementation != NAME:
        raise RuntimeError(f"a graft hangs on these experts, but the model runs on {implementation!r}, expected 'flex'")


def _find_renamed_grafts(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Gives the grafts in a state dict the names they have here, where only modules above them are named otherwise."""
    grafts = {name: module for name, module in model.named_modules() if isinstance(module, Graft)}
    own = {f"{prefix}{name}.{key}" for name, graft in grafts.items() for key, _ in graft.named_parameters()}
    places: dict[tuple[str, ...], list[str]] = {}
    for key in state:
        if ".graft." in key and key not in own:
            places.setdefault(_place(key), []).append(key)
    for name in sorted(own - state.keys()):
        if len(found := places.get(_place(name), [])) == 1:
            state[name] = state.pop(found[0])


def _place(key: str) -> tuple[str, ...]:
    """Layer numbers and the parameter's own name: `model.layers.3.mlp.experts.graft.down_proj` -> (3, down_proj)."""
    return (*re.findall(r"(?<=\.)\d+(?=\.)", key), key.rpartition(".")[2])
