"""Grafts as files: what peft's adapters and `from_pretrained` leave behind is saved beside them, and found again.

    flex_kernels.save_grafts(model, folder)       # grafts.safetensors and grafts.json
    flex_kernels.load_grafts(model, folder)       # on a model with the same experts, with or without grafts

With Hugging Face's Trainer, `trainer.add_callback(flex_kernels.graft_callback())` does both for every checkpoint. The
JSON says what each graft is (width, combine, activation, rank): an additive graft never becomes a convex one.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flex_kernels.grafts import attach_graft, sizes_of
from flex_kernels.layer import Graft, LoraGraft
from flex_kernels.transformers_plug import activation_name, moe_layers, trainer_callback_class

TENSORS, DESCRIPTION = "grafts.safetensors", "grafts.json"
FORMAT = 1
TOLD = ("hidden_size", "width", "combine", "activation", "training", "rank", "alpha")


def save_grafts(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Writes every graft of a model into `folder`, whole or not at all.

    Args:
        model: a transformers model, also inside peft's wrapper.

    Returns:
        The folder.

    Raises:
        ValueError: the model carries no graft. OSError: the folder cannot be written.
    """
    folder = Path(folder)
    layers = list(moe_layers(model).items())
    grafts = {index: (name, experts.graft) for index, (name, experts) in enumerate(layers) if _graft_of(experts)}
    if not grafts:
        raise ValueError(f"{type(model).__name__} carries no graft, expected attach_graft before save_grafts")
    tensors: dict[str, Tensor] = {}
    for index, (_, graft) in grafts.items():
        own = {key: tensor.detach().to("cpu").contiguous() for key, tensor in graft.state_dict().items()}
        tensors |= {f"{index}.{key}": tensor for key, tensor in own.items()}
    description = {
        "format": FORMAT,
        "num_layers": len(layers),
        "grafts": [{"layer": index, "module": name, **describe(graft)} for index, (name, graft) in grafts.items()],
    }
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / TENSORS, lambda part: save_file(tensors, part, metadata={"format": "pt"}))
    text = json.dumps(description, indent=1) + "\n"
    _replace(folder / DESCRIPTION, lambda part: part.write_text(text, encoding="utf-8"))
    return folder


def load_grafts(
    model: nn.Module, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> dict[str, Graft]:
    """Puts the grafts of a folder on a model, or their values into the grafts that it carries.

    Args:
        model: a transformers model with the same experts, also inside peft's wrapper.
        dtype: of what trains, where a graft is attached; None takes that of the file.

    Returns:
        The grafts by the name of the experts module they hang on.

    Raises:
        FileNotFoundError: nothing that `save_grafts` wrote lies in `folder`.
        ValueError: the files are damaged or of a later format, the model has other experts, or carries a graft of
            another width, combine, activation, training or rank.
    """
    description, tensors = _read(Path(folder))
    layers = list(moe_layers(model).items())
    if description["num_layers"] != len(layers):
        raise ValueError(
            f"{folder} is of a model with {description['num_layers']} MoE layers, this one has {len(layers)}"
        )
    grafts: dict[str, Graft] = {}
    for told in description["grafts"]:
        index = told["layer"]
        name, experts = layers[index]
        own = {key.partition(".")[2]: value for key, value in tensors.items() if key.partition(".")[0] == str(index)}
        if _graft_of(experts) is None:
            _check_fits(name, {**told, **_of_layer(experts)}, told)
            low_rank = {"rank": told["rank"], "alpha": told["alpha"]} if told["training"] == "lora" else {}
            trained = own["logit_weight"].dtype if dtype is None else dtype
            attach_graft(model, told["width"], told["combine"], layers=[index], dtype=trained, **low_rank)
        else:
            _check_fits(name, describe(experts.graft), told)
        experts.graft.load_state_dict(own)
        grafts[name] = experts.graft
    return grafts


def train_grafts(model: nn.Module) -> int:
    """Lets every graft of a model train, whatever froze it: peft freezes all that was there before its adapter.

    Call it after `get_peft_model`, or after a trainer that takes a `peft_config` was made. A low-rank graft's copy of
    the pretrained weights stays frozen.

    Returns:
        How many numbers of the grafts train.
    """
    count = 0
    for experts in moe_layers(model).values():
        graft = _graft_of(experts)
        for name, parameter in graft.named_parameters() if graft is not None else ():
            if graft.parameter_roles.get(name) == "personal":
                parameter.requires_grad_(True)
                count += parameter.numel()
    return count


def graft_callback() -> Any:
    """A callback for Hugging Face's Trainer: saves the grafts with every checkpoint and at the end, and has them back
    when a training is resumed; the optimizer's moments come back with Trainer's own files.

    Raises:
        ImportError: transformers is not installed.
    """

    class GraftCallback(trainer_callback_class()):
        """See `graft_callback`."""

        def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
            if state.global_step > 0:
                named = args.resume_from_checkpoint
                folder = Path(named if isinstance(named, str) else _checkpoint(args, state))
                if not (folder / DESCRIPTION).exists():
                    raise FileNotFoundError(f"no grafts in the checkpoint {folder}, expected {DESCRIPTION}")
                load_grafts(model, folder)

        def on_save(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
            if state.is_world_process_zero:
                save_grafts(model, _checkpoint(args, state))

        def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
            if state.is_world_process_zero:
                save_grafts(model, args.output_dir)

    return GraftCallback()


def describe(graft: Graft) -> dict[str, Any]:
    """What a graft is, apart from its values."""
    low_rank = isinstance(graft, LoraGraft)
    return {
        "hidden_size": graft.hidden_size,
        "width": graft.width,
        "combine": graft.combine,
        "activation": graft.activation,
        "training": "lora" if low_rank else "full",
        "rank": graft.rank if low_rank else None,
        "alpha": graft.alpha if low_rank else None,
    }


def _graft_of(experts: nn.Module) -> Graft | None:
    return getattr(experts, "graft", None)


def _of_layer(experts: nn.Module) -> dict[str, Any]:
    return {"hidden_size": sizes_of(experts)[0], "activation": activation_name(experts) or "silu"}


def _check_fits(name: str, own: dict[str, Any], told: dict[str, Any]) -> None:
    for key in TOLD:
        if own[key] != told[key]:
            raise ValueError(f"the graft of {name} has {key} {told[key]!r} in the file, expected {own[key]!r}")


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = folder / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(f"no {DESCRIPTION} in {folder}, expected a folder that save_grafts wrote")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        number = description["format"]
        if number != FORMAT:
            raise ValueError(f"it has format {number}, this version reads {FORMAT}")
        missing = [key for told in description["grafts"] for key in ("layer", *TOLD) if key not in told]
        if missing or "num_layers" not in description:
            raise ValueError(f"it lacks {(missing or ['num_layers'])[0]!r}")
        with safe_open(folder / TENSORS, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no grafts that can be read: {error}") from None
    return description, tensors


def _replace(path: Path, write: Any) -> None:
    """Writes under a temporary name, then renames: a reader sees a whole file or none."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
