"""The grafts of a model in a folder of their own, beside whatever holds the base model and its adapters.

    flex_kernels.save_grafts(model, "my-grafts")
    flex_kernels.load_grafts(AutoModelForCausalLM.from_pretrained(base), "my-grafts")      # attaches them

    grafts.safetensors    the tensors, named <name of the experts module>.graft.<parameter>, and their description
    grafts.json           the same description, for people: `load_grafts` reads the one in grafts.safetensors, so what
                          it loads is always one file's, whole

The names are those the modules have in the bare model: what peft, DDP and torch.compile put around it is left out, and
where a family's modules have other names the layer numbers find them.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flex_kernels.graft_watch import is_sharded, know_saving, own_parameters, refuse_partitioned
from flex_kernels.grafts import attach_graft, detach_graft
from flex_kernels.layer import Graft, LoraGraft
from flex_kernels.transformers_plug import moe_layers

TENSORS, DESCRIPTION = "grafts.safetensors", "grafts.json"
FORMAT = 1
HEADER = "flex_grafts"
# What peft (model, LoRA on expert weights), DDP, FSDP and torch.compile put into a module's name.
WRAPPERS = re.compile(
    r"^(_orig_mod\.|module\.)*(base_model\.model\.)?|(?<=\.)(_orig_mod|_fsdp_wrapped_module)\.|\.base_layer\b"
)
FITS = ("hidden_size", "width", "combine", "activation", "training", "rank", "alpha", "gate_bias")

Folder = str | os.PathLike[str]


def save_grafts(model: nn.Module, folder: Folder, *, write: bool = True) -> None:
    """Writes every graft of a model to `folder`: grafts.safetensors and grafts.json. The base model is not in them.

    Each file is written under a temporary name, brought to the disk and renamed: a reader finds the old one or the new
    one, never a part. A merged `LoraGraft` is saved without the low-rank part in its copy, as in `state_dict`.

    Args:
        model: what carries the grafts, also inside a peft model, DDP or torch.compile.
        folder: made where it is not there; other files in it stay.
        write: False on ranks that do not write. Grafts that FSDP2 has sharded are gathered by all ranks, so all call
            this; otherwise one rank alone may.

    Raises:
        ValueError: no graft on the model, or one that DeepSpeed ZeRO-3 has partitioned.
        OSError: the folder cannot be written. What was there before is there still.
    """
    write_grafts(model, folder, write=write)


def load_grafts(model: nn.Module, folder: Folder) -> dict[str, Graft]:
    """Brings back what `save_grafts` wrote: attaches grafts to a model that has none, or fills those that are there.

    A model without grafts is switched to "flex" and gets them as `attach_graft` puts them on: on the device of its
    experts, what trains in the dtype it was saved in, the frozen copy of a `LoraGraft` in that of the experts. What is
    there keeps its device, dtype, sharding and whether it is frozen; a merged `LoraGraft` is no longer merged. After
    an error the model's tensors are what they were.

    Args:
        model: of the family that was saved, also inside a peft model, DDP or torch.compile.
        folder: of `save_grafts`.

    Returns:
        The grafts by the name of the experts module they hang on.

    Raises:
        FileNotFoundError: no grafts.safetensors there.
        ValueError: that file is damaged, or of another format; a layer is not in the model, or carries a graft that
            does not fit (width, combine, activation, rank, alpha, ...), or the model has a graft that the file has not;
            and what `attach_graft` refuses.
    """
    header, tensors = read_grafts(folder)
    experts = moe_layers(model)
    layers = _found(header["layers"], experts)
    there = {name: module.graft for name, module in experts.items() if getattr(module, "graft", None) is not None}
    for name, graft in there.items():
        refuse_partitioned(name, graft)
        if name not in layers:
            raise ValueError(f"{name} carries a graft, but {Path(folder) / TENSORS} has none for it")
    for name, entry in layers.items():
        _check_tensors(entry, tensors)
        if there and name not in there:
            raise ValueError(f"{name} carries no graft, but other layers do and the file has one for it")
        if there:
            _check_fit(name, entry, describe(name, there[name]))
    grafts = there or _attached(model, list(experts), layers)
    for name, entry in layers.items():
        prefix = _prefix(entry["name"])
        state = {key: tensors[prefix + key] for key, _ in grafts[name].named_parameters()}
        _fill(grafts[name], state)
    know_saving(grafts)
    return {name: grafts[name] for name in layers}


def train_grafts(model: nn.Module) -> dict[str, Graft]:
    """Unfreezes what trains of every graft, whoever froze it: peft does when it wraps a model that carries grafts.

    Of a `LoraGraft` that is the factors and the gate; its copy stays frozen. Nothing else of the model is touched. An
    optimizer takes what is trained when it is made, so this comes before.

    Returns:
        The grafts by the name of the experts module they hang on; empty for a model without any.
    """
    grafts = grafts_of(model)
    for graft in grafts.values():
        for parameter in own_parameters(graft):
            parameter.requires_grad_(True)
    return grafts


def grafts_of(model: nn.Module) -> dict[str, Graft]:
    """The grafts of a model by the name of the experts module they hang on."""
    layers = moe_layers(model).items()
    return {name: experts.graft for name, experts in layers if getattr(experts, "graft", None) is not None}


def describe(name: str, graft: Graft) -> dict[str, Any]:
    """All that is needed to make such a graft again, for JSON."""
    lora = isinstance(graft, LoraGraft)
    return {
        "name": WRAPPERS.sub("", name),
        "hidden_size": graft.hidden_size,
        "width": graft.width,
        "combine": graft.combine,
        "activation": graft.activation,
        "training": "lora" if lora else "full",
        "rank": graft.rank if lora else None,
        "alpha": graft.alpha if lora else None,
        "dtype": str(graft.logit_weight.dtype).removeprefix("torch."),
        "gate_bias": getattr(graft, "logit_bias", None) is not None,
    }


def write_grafts(model: nn.Module, folder: Folder, *, write: bool = True, **more: Any) -> None:
    """`save_grafts`, with more in the header."""
    grafts = grafts_of(model)
    if not grafts:
        raise ValueError(f"{type(model).__name__} carries no graft, so there is nothing to save")
    know_saving(grafts)
    layers, tensors = [], {}
    for name, graft in grafts.items():
        refuse_partitioned(name, graft)
        layers.append(describe(name, graft))
        prefix = _prefix(layers[-1]["name"])
        tensors |= {prefix + key: _whole(tensor) for key, tensor in graft.state_dict().items()}
    if not write:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"format": FORMAT, **more, "layers": layers}, indent=1)
    _write(folder / TENSORS, lambda part: save_file(tensors, part, metadata={"format": "pt", HEADER: header}))
    _write(folder / DESCRIPTION, lambda part: part.write_text(header + "\n"))


def read_grafts(folder: Folder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(header, tensors) of what `save_grafts` wrote."""
    path = Path(folder) / TENSORS
    if not path.is_file():
        raise FileNotFoundError(f"no {TENSORS} in {Path(folder)}; save_grafts(model, folder) writes it")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path} does not describe its grafts; expected a file that save_grafts wrote")
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} has format {header.get('format')!r}, expected {FORMAT}")
    return header, tensors


def _found(entries: list[dict[str, Any]], experts: dict[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """What the file has, by the names of the experts modules here: same name, or else alone with its layer numbers."""
    by_name = {WRAPPERS.sub("", name): name for name in experts}
    by_number: dict[tuple[str, ...], list[str]] = {}
    for name in experts:
        by_number.setdefault(_numbers(name), []).append(name)
    numbers = [_numbers(entry["name"]) for entry in entries]
    layers = {}
    for entry, number in zip(entries, numbers, strict=True):
        here = by_name.get(entry["name"])
        if here is None and len(by_number.get(number, [])) == 1 and numbers.count(number) == 1:
            here = by_number[number][0]
        if here is None:
            raise ValueError(
                f"the file has a graft for {entry['name']}, but the model's MoE layers are {list(experts)}"
            )
        layers[here] = entry
    return {name: layers[name] for name in experts if name in layers}


def _numbers(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split(".") if part.isdigit())


def _check_fit(name: str, came: dict[str, Any], expected: dict[str, Any]) -> None:
    for field in FITS:
        if came[field] != expected[field]:
            raise ValueError(f"{name}: the file's graft has {field} {came[field]!r}, expected {expected[field]!r}")


def _check_tensors(entry: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    graft = _blueprint(entry)
    for key, parameter in graft.named_parameters():
        name = _prefix(entry["name"]) + key
        shape = list(tensors[name].shape) if name in tensors else "no tensor"
        if shape != list(parameter.shape):
            raise ValueError(f"the file has {shape} for {name}, expected {list(parameter.shape)}")


def _blueprint(entry: dict[str, Any]) -> Graft:
    """The described graft without memory."""
    options = {"combine": entry["combine"], "activation": entry["activation"], "device": "meta"}
    sizes = (entry["hidden_size"], entry["width"])
    if entry["training"] == "lora":
        return LoraGraft(*sizes, entry["rank"], entry["alpha"], **options)
    return Graft(*sizes, **options)


def _attached(model: nn.Module, names: list[str], layers: dict[str, dict[str, Any]]) -> dict[str, Graft]:
    """Grafts as described, each layer's its own; all of them or none."""
    grafts: dict[str, Graft] = {}
    try:
        for name, entry in layers.items():
            options = {key: entry[key] for key in ("width", "combine", "rank", "alpha")}
            dtype = getattr(torch, entry["dtype"])
            grafts |= attach_graft(model, layers=[names.index(name)], dtype=dtype, **options)
            grafts[name].activation = entry["activation"]
            _check_fit(name, entry, describe(name, grafts[name]))
    except Exception:
        detach_graft(model)
        raise
    return grafts


def _fill(graft: Graft, state: dict[str, Tensor]) -> None:
    for key, parameter in graft.named_parameters():
        if is_sharded(parameter):
            from torch.distributed.tensor import distribute_tensor

            whole = state[key].to(parameter.device, parameter.dtype)
            state[key] = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
    graft.load_state_dict(state)


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return tensor.detach().cpu().contiguous()


def _prefix(name: str) -> str:
    return f"{name}.graft." if name else "graft."


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        _to_disk(part)
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):
            raise OSError(f"cannot write {path}: {error}") from None
        raise
    _to_disk(path.parent)  # the rename too


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
