"""What a method puts on the base and takes off again: LoRA on attention, grafts, and the controls in their place."""

import contextlib
import warnings
from collections.abc import Iterator

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

import flex_kernels
from flex.config import LoraSettings
from flex.errors import FlexError
from flex.methods import GraftSettings, Method
from flex.model import rivals
from flex.model.base import Base


def wrap(base: Base, method: Method, lora: LoraSettings, graft: GraftSettings, seed: int) -> None:
    """Puts the method's LoRA and grafts (or their rivals) on the base, in place; LoRA starts as `seed` alone says."""
    unwrap(base)
    if method.lora:
        check_targets(base.model, lora.targets)
        settings = peft.LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets)
        )
        torch.manual_seed(seed)
        with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 for a name that is deprecated there
            warnings.simplefilter("ignore", FutureWarning)
            base.adapter = peft.get_peft_model(base.model, settings)
            if method.rival == "lora":
                rivals.add_private_lora(base.adapter, lora, graft, base.layers)
        for layer in base.model.modules():
            if isinstance(layer, LoraLayer):
                for name, matrix in (*layer.lora_A.items(), *layer.lora_B.items()):
                    matrix.parameter_roles = {"weight": "personal" if name == rivals.PRIVATE else method.lora}
    if method.rival == "expert":
        rivals.attach_adapted(base.layers)
    if method.graft:
        graft = graft.of(method)
        low_rank = {"rank": graft.rank, "alpha": graft.alpha} if graft.training == "lora" else {}
        for index, layer in enumerate(base.layers.values()):
            # fp32, whatever the base's dtype: a step of 4e-5 is lost in bf16.
            grafts = flex_kernels.attach_graft(
                base.model,
                graft.graft_width(layer.down_proj.shape[-1]),
                graft.combine,
                graft.logit_bias,
                [index],
                dtype=torch.float32,
                **low_rank,
            )
            for attached in grafts.values():
                attached.watch.told_training = True  # a run knows when its grafts start and which of them are frozen


def unwrap(base: Base) -> None:
    """Takes LoRA and grafts off again; the base is as it was loaded."""
    flex_kernels.detach_graft(base.model)
    rivals.detach_adapted(base.layers)
    if base.adapter is not None:
        base.adapter.unload()
        base.adapter = None
    base.model.requires_grad_(False)


def check_targets(model: nn.Module, targets: tuple[str, ...]) -> None:
    """Raises FlexError where the model has no linear layer of one of these names."""
    linears = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    missing = [t for t in targets if t not in linears]
    if missing:
        raise FlexError(f"lora.targets names {missing}, which the model lacks; it has {', '.join(sorted(linears))}")


@contextlib.contextmanager
def pretrained_only(base: Base, keep_lora: bool = False) -> Iterator[nn.Module]:
    """The model as it was pretrained: whatever `wrap` put on it is out of the way inside the block, and nothing trains.

    `keep_lora`: the LoRA stays at work, with the values it has.
    """
    added = [
        (layer, name, module)
        for layer in base.layers.values()
        for name in ("graft", "adapted")
        if (module := getattr(layer, name, None)) is not None
    ]
    training, trained = base.model.training, [p for p in base.model.parameters() if p.requires_grad]
    off = base.adapter is not None and not keep_lora
    try:
        for layer, name, _ in added:
            setattr(layer, name, None)
        base.model.eval().requires_grad_(False)
        with base.adapter.disable_adapter() if off else contextlib.nullcontext():
            yield base.model
    finally:
        for layer, name, module in added:
            setattr(layer, name, module)
        base.model.train(training).requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
