"""The model of one job: a pretrained base, LoRA on its attention (peft), one graft per MoE layer.

The base is loaded once and lives for the whole run. A job wraps it in place and takes the wrapping off again, so the
frozen weights are never copied, and never change.
"""

import contextlib
import hashlib
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import logging as transformers_logging

import flex_kernels
from flex import rivals
from flex.config import LoraSettings, ModelConfig
from flex.errors import FlexError
from flex.methods import GraftSettings, Method

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")  # `name` or `owner/name`; any other path is one on this machine
FINGERPRINT_SAMPLES = 256  # values of each tensor that go into the fingerprint


@dataclass
class Base:
    """A loaded base model. `layers`: the experts modules by name, in layer order; `fingerprint` names these weights."""

    model: nn.Module
    tokenizer: Any
    layers: dict[str, nn.Module]
    fingerprint: str
    adapter: peft.PeftModel | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_base(config: ModelConfig) -> Base:
    """The base model and its tokenizer, everything frozen, experts on the `flex` implementation.

    Raises:
        FlexError: nothing can be loaded from `config.path` or onto `config.device`, the model has no MoE layers, or
            its folder has no tokenizer.
    """
    if not config.path:
        raise FlexError("model.path is empty; wanted a folder or a hub name of a Mixture-of-Experts model")
    path = _expanded(config.path)
    device = _device(config.device)
    flex_kernels.register()
    transformers_logging.disable_progress_bar()
    dtype = getattr(torch, config.dtype, "auto")
    if config.dtype == "auto" and device.type == "cpu":
        dtype = torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, experts_implementation=config.experts_implementation
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FlexError(f"no model can be loaded from model.path = {config.path!r}: {reason}") from None
    # Without its files, transformers builds a tokenizer that knows no word.
    if not tokenizer("Write a response.", add_special_tokens=False)["input_ids"]:
        raise FlexError(f"no tokenizer in model.path = {config.path!r}; wanted its files beside the model's")
    layers = flex_kernels.moe_layers(model)
    if not layers:
        raise FlexError(f"{config.path} ({type(model).__name__}) has no MoE layers; FLEx grafts experts, it needs some")
    model.requires_grad_(False)
    model.to(device).eval()
    return Base(model, tokenizer, layers, fingerprint(model))


def _expanded(path: str) -> str:
    """The folder or hub name, `~` spelled out. What begins with something that is there is no hub name."""
    expanded = os.path.expanduser(path)
    local = not HUB_NAME.fullmatch(expanded) or Path(expanded.partition("/")[0]).exists()
    if local and not Path(expanded).is_dir():
        raise FlexError(f"no folder at model.path = {path!r}; wanted a folder with a model, or a hub name")
    return expanded


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FlexError(f'model.device is {name!r}; wanted "auto", "cpu", "cuda" or "cuda:0": {reason}') from None


def fingerprint(model: nn.Module) -> str:
    """A name for these weights: a hash over names, shapes and evenly spaced values of every tensor.

    It tells bases apart (a client's state belongs to one of them); it is no proof against tampering.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // FINGERPRINT_SAMPLES)].float().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


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
            flex_kernels.attach_graft(
                base.model,
                graft.graft_width(layer.down_proj.shape[-1]),
                graft.combine,
                graft.logit_bias,
                [index],
                dtype=torch.float32,
                **low_rank,
            )


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
