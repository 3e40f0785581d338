"""The linear layers of a model's attention, found from the model: what `lora.targets = "auto"` stands for.

Every family names them in its own way (`q_proj`, `q_a_proj` and `kv_b_proj` of latent attention, a fused `qkv_proj`),
but each model of transformers declares which of its modules are attention.
"""

from collections.abc import Iterable

from torch import nn

import flex_kernels
from flex.config import LoraSettings
from flex.errors import FlexError

AUTO = ("auto",)
# By the names of their classes: attention that a model does not declare, and what within attention only picks tokens
# for it, and so gets no gradient.
ATTENTION, INDEXER = "Attention", "Indexer"
# peft takes these for the experts of an older checkpoint, wherever they stand: an output gate called so stays as it is.
EXPERTS_NAMES = {"gate_proj", "up_proj", "down_proj"}


def attention_linears(model: nn.Module, rank: int = 1) -> list[str]:
    """Their full names, in the order of the model's modules; only beside the MoE layers, not in a tower of images, and
    none whose smaller side is below `rank`: a LoRA would be larger than the layer.

    Raises:
        FlexError: there are none.
    """
    stack = _stack(flex_kernels.moe_layers(model))
    declared = _declared(model)
    found: dict[str, None] = {}
    for name, module in model.named_modules():
        if not name.startswith(stack) or not (isinstance(module, declared) or ATTENTION in type(module).__name__):
            continue
        pickers = [n for n, inner in module.named_modules(prefix=name) if INDEXER in type(inner).__name__]
        for inner_name, inner in module.named_modules(prefix=name):
            left_out = any(inner_name.startswith(f"{picker}.") for picker in pickers)
            left_out |= inner_name.rpartition(".")[2] in EXPERTS_NAMES
            plain = isinstance(inner, nn.Linear) and _plain(inner)
            if plain and not left_out and min(inner.in_features, inner.out_features) >= rank:
                found[inner_name] = None
    if not found:
        raise FlexError(
            f'{type(model).__name__} has no linear layers of attention that lora.targets = "auto" could find and '
            f"a LoRA of rank {rank} fits; expected the names of some, or a lower lora.rank"
        )
    return list(found)


def targets_of(model: nn.Module, lora: LoraSettings) -> tuple[str, ...]:
    """What `lora.targets` stands for on this model, by the last parts of the names where these say the same.

    Raises:
        FlexError: the model has no linear layer of one of these names, one is smaller than the rank, or "auto" finds
            none.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if lora.targets != AUTO:
        missing = [t for t in lora.targets if not any(_is_called(name, t) for name in linears)]
        if missing:
            last = sorted({name.rpartition(".")[2] for name in linears})
            raise FlexError(
                f"lora.targets names {missing}, which the model lacks; it has {', '.join(last)} "
                '(expected some of them, or "auto": those of its attention)'
            )
        for name, linear in linears.items():
            smaller = min(linear.in_features, linear.out_features)
            if lora.rank > smaller and any(_is_called(name, t) for t in lora.targets):
                raise FlexError(
                    f"lora.rank is {lora.rank}; expected at most {smaller}, the smaller side of {name} "
                    f"({linear.out_features} x {linear.in_features})"
                )
        return lora.targets
    full = attention_linears(model, lora.rank)
    short = tuple(dict.fromkeys(name.rpartition(".")[2] for name in full))
    meant = {name for name in linears if any(_is_called(name, own) for own in short)}
    return short if meant == set(full) else tuple(full)


def _is_called(name: str, target: str) -> bool:
    """As peft matches a module with a target."""
    return name == target or name.endswith(f".{target}")


def _plain(linear: nn.Linear) -> bool:
    """Whether it multiplies all of its input by all of its weight; a subclass may do so by groups."""
    return type(linear).forward is nn.Linear.forward or not type(linear).__module__.startswith("transformers.")


def _stack(layers: Iterable[str]) -> str:
    """What the names of the MoE layers begin with, before the layer's number."""
    first = next(iter(layers), "")
    parts: list[str] = []
    for part in first.split("."):
        if part.isdecimal():
            break
        parts.append(part)
    return "".join(f"{part}." for part in parts) if len(parts) < len(first.split(".")) else ""


def _declared(model: nn.Module) -> tuple[type, ...]:
    """The classes that the parts of the model declare as attention (`_can_record_outputs` in transformers)."""
    classes: list[type] = []
    for module in model.modules():
        recorded = getattr(type(module), "_can_record_outputs", None)
        own = recorded.get("attentions") if isinstance(recorded, dict) else None
        for entry in own if isinstance(own, list | tuple) else [own]:
            kind = getattr(entry, "target_class", entry)
            classes += [kind] if isinstance(kind, type) else []
    return tuple(dict.fromkeys(classes))
