"""The model of one job: a pretrained base, LoRA on its attention (peft), one graft per MoE layer.

The base is loaded once and lives for the whole run. A job wraps it in place and takes the wrapping off again, so the
frozen weights are never copied, and never change.
"""

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import logging as transformers_logging

import flex_kernels
from flex.config import ModelConfig
from flex.errors import FlexError, first_line
from flex_kernels.weight_files import DenseExpertsError, keeps_experts
from flex_kernels.weights import keep_stored

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


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of the base alone: in a moment, where its model may take minutes.

    Raises:
        FlexError: nothing can be loaded from `config.path`, or there is no tokenizer in it.
    """
    if not config.path:
        raise FlexError("model.path is empty; expected a folder or a hub name of a Mixture-of-Experts model")
    path = _expanded(config.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # a loader's own: a package that is missing, a format
        raise _not_loaded(config, error) from None
    # Without its files, transformers builds a tokenizer that knows no word.
    if not tokenizer("Write a response.", add_special_tokens=False)["input_ids"]:
        raise FlexError(f"no tokenizer in model.path = {config.path!r}; expected its files beside the model's")
    return tokenizer


def load_base(config: ModelConfig, tokenizer: Any = None) -> Base:
    """The base model and its tokenizer, everything frozen, experts on the `flex` implementation.

    Args:
        tokenizer: of `load_tokenizer`, where it is loaded already.

    Raises:
        FlexError: nothing can be loaded from `config.path` or onto `config.device`, tensors are missing or not finite,
            the model has no MoE layers, or its folder has no tokenizer.
    """
    tokenizer = tokenizer or load_tokenizer(config)
    path = _expanded(config.path)
    device = _device(config.device)
    flex_kernels.register()
    transformers_logging.disable_progress_bar()
    dtype = getattr(torch, config.dtype, "auto")
    if config.dtype == "auto" and device.type == "cpu":
        dtype = torch.float32
    try:
        options = {
            "dtype": dtype,
            "experts_implementation": config.experts_implementation,
            "ignore_mismatched_sizes": True,  # `_check_loaded` names them
            "output_loading_info": True,
        }
        model, found = _load(path, None if config.experts == "auto" else config.experts, options)
    except Exception as error:  # a loader's own: a package that is missing, a format, a memory that is too small
        raise _not_loaded(config, error) from None
    _check_loaded(config.path, found)
    layers = flex_kernels.moe_layers(model)
    if not layers:
        raise FlexError(f"{config.path} ({type(model).__name__}) has no MoE layers; FLEx grafts experts, it needs some")
    model.requires_grad_(False)
    _check_finite(config.path, model)
    if config.shared_experts != "auto":
        try:
            flex_kernels.prepare_shared_experts(
                model, None if config.shared_experts == "dense" else config.shared_experts
            )
        except ValueError as error:
            raise FlexError(f"model.shared_experts = {config.shared_experts!r}: {error}") from None
    try:
        model.to(device).eval()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise FlexError(f"{config.path} does not fit the memory of {device}: {first_line(error)}") from None
    return Base(model, tokenizer, layers, fingerprint(model))


def _load(path: str, experts: str | None, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """`experts`: their format; None: as they are in the files."""
    if experts is not None or keeps_experts(path):
        try:
            return flex_kernels.load_prepared(path, experts, **options)
        except DenseExpertsError:  # something else is quantised: its own program loads it
            pass
    return AutoModelForCausalLM.from_pretrained(path, **options)


def _not_loaded(config: ModelConfig, error: Exception) -> FlexError:
    return FlexError(f"no model can be loaded from model.path = {config.path!r}: {first_line(error)}")


def _check_loaded(path: str, found: dict[str, Any]) -> None:
    """transformers fills tensors that a checkpoint lacks with random numbers, and goes on."""
    missing = sorted(found.get("missing_keys") or ())
    mismatched = sorted(str(key[0] if isinstance(key, tuple) else key) for key in found.get("mismatched_keys") or ())
    for names, what in ((missing, "lacks"), (mismatched, "has another shape for")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise FlexError(
                f"model.path = {path!r} {what} the tensor {names[0]}{more} of its model; expected a whole checkpoint, "
                "with the names that transformers gives its tensors"
            )


def _check_finite(path: str, model: nn.Module) -> None:
    """A base with NaN or infinite weights scores and trains to nothing."""
    for name, parameter in model.named_parameters():
        # The sum tells most tensors apart in one pass; where it overflows, every number is looked at.
        if isinstance(parameter, flex_kernels.FrozenWeight):
            continue  # its scales were looked at when it was made or read
        if parameter.is_floating_point() and not parameter.sum(dtype=torch.float32).isfinite():
            broken = int((~parameter.isfinite()).sum())
            if broken:
                raise FlexError(
                    f"model.path = {path!r} has {broken} NaN or infinite values in {name}; expected finite weights"
                )


def _expanded(path: str) -> str:
    """The folder or hub name, `~` spelled out. What begins with something that is there is no hub name."""
    expanded = os.path.expanduser(path)
    local = not HUB_NAME.fullmatch(expanded) or Path(expanded.partition("/")[0]).exists()
    if local and not Path(expanded).is_dir():
        raise FlexError(f"no folder at model.path = {path!r}; expected a folder with a model, or a hub name")
    if local and (Path(expanded) / "adapter_config.json").exists() and not (Path(expanded) / "config.json").exists():
        raise FlexError(
            f"model.path = {path!r} is a peft adapter; expected the base that it was trained on, or a folder with "
            "both merged (`merge_and_unload`, then `save_pretrained`)"
        )
    return expanded


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError) as error:
        expected = '"auto", "cpu", "cuda" or "cuda:0"'
        raise FlexError(f"model.device is {name!r}; expected {expected}: {first_line(error)}") from None


def fingerprint(model: nn.Module) -> str:
    """A name for these weights: a hash over names, shapes and evenly spaced values of every tensor.

    It tells bases apart (a client's state belongs to one of them); it is no proof against tampering.
    """
    digest = hashlib.sha256()
    with keep_stored():
        state = model.state_dict()
    for name, tensor in state.items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        parts = [tensor]
        if isinstance(tensor, flex_kernels.FrozenWeight):  # other codes or another format are another base
            digest.update(tensor.format.encode())
            parts = [tensor.codes, tensor.scales]
        for part in parts:
            flat = part.detach().reshape(-1)
            values = flat[:: max(1, flat.numel() // FINGERPRINT_SAMPLES)].float().cpu()
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


def experts_sizes(layer: nn.Module) -> tuple[int, int]:
    """(hidden size, intermediate size) of an experts module, whichever way its weights lie."""
    _, rows, columns = layer.down_proj.shape
    return (columns, rows) if getattr(layer, "is_transposed", False) else (rows, columns)


def can_be_taken_apart(layer: nn.Module) -> bool:
    """Whether the experts of a layer are `D (act(G x) * (U x))`, so that they can be scored and grafted."""
    return flex_kernels.transformers_plug.why_not_fused(layer) is None


def weights_of(name: str, layer: nn.Module) -> flex_kernels.ExpertWeights:
    """The layer's experts as [E, 2I, H], [E, H, I] and their activation; FlexError where they cannot be taken apart."""
    try:
        return flex_kernels.expert_weights(layer)
    except ValueError as error:
        raise FlexError(f"nothing can be grafted at {name}: {error}") from None


def router_of(base: Base, name: str) -> Tensor:
    """[E, H]: the weight of the router that stands beside a layer's experts.

    Raises:
        FlexError: no module beside them has such a weight and nothing else.
    """
    parent = base.model.get_submodule(name.rpartition(".")[0])
    num_experts, hidden_size, _ = base.layers[name].down_proj.shape
    for own_name, module in parent.named_children():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.shape == (num_experts, hidden_size):
            if extra := [n for n, _ in (*module.named_parameters(), *module.named_buffers()) if n != "weight"]:
                raise FlexError(
                    f"{type(base.model).__name__}: the router {own_name!r} beside {name} has {extra[0]} besides its "
                    "weight; expected a softmax of the weight alone"
                )
            return weight
    raise FlexError(
        f"{type(base.model).__name__} has no router with a weight of [{num_experts}, {hidden_size}] beside {name}; "
        "expected one for graft.criterion = 'renormalized' and graft.gate = 'router'"
    )
