"""Models with prepared experts from files and to files: no dense copy of all experts is ever in memory or on disk.

    model = flex_kernels.load_prepared("Qwen/Qwen1.5-MoE-A2.7B", "nf4")      # from dense files, straight into a format
    model = flex_kernels.load_prepared("somebody/Qwen-MoE-bnb-4bit")         # as bitsandbytes has quantised it
    flex_kernels.save_prepared(model, "qwen-nf4")
    model = flex_kernels.load_prepared("qwen-nf4")

The folder of `save_prepared` has what `save_pretrained` writes, but that an experts matrix `NAME` stands in it as
`NAME.codes` and `NAME.scales`, and that its files have names of their own: transformers alone finds no model there, and
does not fill the experts with random numbers. The index, and each safetensors file in its header, says under
"flex_experts" of which version, format and layout it is and of what it was made; a file's header also how long the rows
of its experts are.
"""

import contextlib
import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flex_kernels.checkpoints import PROGRAMS, Checkpoint, Part, Quantised, check_program, quantised_by, read_checkpoint
from flex_kernels.prepare import MATRICES, prepared_layers
from flex_kernels.weights import (
    FORMATS,
    LAYOUT,
    QUANTIZED,
    FrozenWeight,
    check_format,
    dense_in_state_dict,
    keep_stored,
    stored_checked,
)

METHOD = "flex_experts"  # in the index and in the header of each file
VERSION = 1
SHARD_BYTES = 2**31
# The steps by which transformers joins experts that stay as they are: stacked, and gate rows before up rows.
JOINS = ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
INDEX = "prepared.safetensors.index.json"

Folder = str | os.PathLike[str]


def save_prepared(model: nn.Module, folder: Folder, source: str = "") -> None:
    """Writes a transformers model with prepared experts as it stands in memory, in files of at most 2 GB if it can.

    Args:
        folder: made where it is not there.
        source: of what the model was made, for people; by default the name that it was loaded by.

    Raises:
        ValueError: experts that are dense, of several formats, or computed at every access.
        OSError: the folder cannot be written.
    """
    formats = {format for _, format in _formats(model)}
    if len(formats) != 1 or not formats <= {*QUANTIZED}:
        found = ", ".join(sorted(formats)) or "none"
        raise ValueError(f"the model's experts are {found}, expected all in one of {', '.join(QUANTIZED)}")
    source = source or getattr(model.config, "_name_or_path", "") or ""
    writer = PreparedWriter(folder, model.config, formats.pop(), source)
    with keep_stored():
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        for name, tensor in model.state_dict().items():
            if name not in tied:
                writer.add(name, tensor)
    writer.close()
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


class PreparedWriter:
    """Writes such a folder tensor by tensor, holding no more than one file's worth: a model need not exist as a whole.

    Args:
        config: of the model, transformers' own.
        format, source: as in `save_prepared`.
    """

    def __init__(self, folder: Folder, config: Any, format: str, source: str) -> None:
        check_format(format)
        self.folder, self.config = Path(folder), config
        self.folder.mkdir(parents=True, exist_ok=True)
        self.about = {"version": VERSION, "format": format, "layout": LAYOUT, "source": source}
        self.held: dict[str, Tensor] = {}
        self.experts: dict[str, dict[str, Any]] = {}
        self.places: dict[str, str] = {}
        self.bytes = self.total = self.files = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """A tensor under its name in the model's state dict."""
        kept = isinstance(tensor, FrozenWeight)
        parts = {f"{name}.codes": tensor.codes, f"{name}.scales": tensor.scales} if kept else {name: tensor}
        size = sum(part.nbytes for part in parts.values())
        if self.held and self.bytes + size > SHARD_BYTES:
            self._write()
        if kept:
            self.experts[name] = {"columns": tensor.shape[-1], "dtype": str(tensor.dtype).removeprefix("torch.")}
        self.held |= {key: part.detach().cpu().contiguous() for key, part in parts.items()}
        self.bytes += size

    def close(self) -> None:
        """Writes the rest, config.json and the index: before, nothing reads the folder as a model."""
        self._write()
        self.config.save_pretrained(self.folder)
        index = {"metadata": {"total_size": self.total, METHOD: self.about}, "weight_map": self.places}
        (self.folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

    def _write(self) -> None:
        self.files += 1
        name = f"prepared-{self.files:05}.safetensors"
        header = {"format": "pt", METHOD: json.dumps({**self.about, "experts": self.experts})}
        try:
            save_file(self.held, self.folder / name, header)
        except SafetensorError as error:
            raise OSError(f"cannot write {self.folder / name}: {error}") from None
        self.places |= dict.fromkeys(self.held, name)
        self.total += self.bytes
        self.held, self.experts, self.bytes = {}, {}, 0


class DenseExpertsError(ValueError):
    """A checkpoint whose experts are dense, and no format that they are to be kept in."""


def load_prepared(path: Folder, format: str | None = None, *, model_class: Any = None, **options: Any) -> Any:
    """A transformers model with its experts in a format, from dense files, quantised ones or those of `save_prepared`.

    Dense files go straight into the format, expert by expert: beside what the model will take there are at most one
    layer's experts, as they come from the files. Of files that bitsandbytes, compressed-tensors or torchao have
    quantised, experts that are in one of our formats stay in it (`checkpoints.py` says which are), and every other
    quantised weight is dequantised to the model's dtype; none of these programs is needed.

    Args:
        path: a folder, or the name of a model (but for files of `save_prepared`).
        format: "int8" or "nf4"; None takes that of the files.
        model_class: with a `from_pretrained`; `AutoModelForCausalLM` if not given.
        options: for `from_pretrained`. The experts run on "flex" unless `experts_implementation` says otherwise.

    Raises:
        ValueError: an unknown format or another than the files', experts that the fused path does not take, NaN or
            infinite experts or scales (the tensor named), files that another program has quantised otherwise, of
            another version or layout, damaged, or no safetensors.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from flex_kernels.transformers_plug import register

    register()
    if format is not None:
        check_format(format)
    model_class = model_class or AutoModelForCausalLM
    options = {"experts_implementation": "flex", **options}
    config = options.pop("config", None) or AutoConfig.from_pretrained(path)
    about, index = quantised_by(config), read_index(path)
    if index is None and about is None:
        if format is None:
            raise DenseExpertsError(f"{path} has dense experts, expected a format for them: {' or '.join(QUANTIZED)}")
        loaded = _load(path, format, model_class, config, {"use_safetensors": True, **options})
    elif index is None:
        check_program(about)
        checkpoint = read_checkpoint(_checkpoint_files(path, options), about)
        config = copy.deepcopy(config)
        del config.quantization_config
        loaded = _load(path, format, model_class, config, options, checkpoint)
    else:
        if format not in (None, index["format"]):
            raise ValueError(f"{path} has its experts in {index['format']}, expected {format}")
        loaded = _from_state(path, model_class, config, dict(_read(Path(path), index)), options)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    wrong = [name for name, found in _formats(model) if found not in QUANTIZED]
    if wrong:
        raise ValueError(f"the experts of {wrong[0]} were not in the files of {path}, expected all layers'")
    for experts in prepared_layers(model).values():
        for matrix in MATRICES:
            getattr(experts, matrix).requires_grad_(False)
        if dense_in_state_dict not in experts._state_dict_hooks.values():
            experts._register_state_dict_hook(dense_in_state_dict)
    return loaded


def keeps_experts(path: Folder) -> bool:
    """Whether files are `save_prepared`'s, or of a program whose quantised experts `load_prepared` may read."""
    from transformers import AutoConfig

    if read_index(path) is not None:
        return True
    about = quantised_by(AutoConfig.from_pretrained(path))
    return about is not None and about["quant_method"] in PROGRAMS


def _from_state(path: Folder, model_class: Any, config: Any, state: dict[str, Any], options: dict[str, Any]) -> Any:
    from transformers import GenerationConfig

    with contextlib.suppress(OSError):  # a model need not have one
        options = {"generation_config": GenerationConfig.from_pretrained(path, **_where(options)), **options}
    mapping = getattr(model_class, "_model_mapping", None)  # an Auto class wants a name, and there is none
    concrete = model_class if mapping is None else mapping[type(config)]
    loaded = concrete.from_pretrained(None, config=config, state_dict=state, **options)
    (loaded[0] if isinstance(loaded, tuple) else loaded).config._name_or_path = str(path)
    return loaded


def _where(options: dict[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained` that say where files come from."""
    return {key: options[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in options}


def _checkpoint_files(path: Folder, options: dict[str, Any]) -> list[Path]:
    """The safetensors files of a quantised checkpoint, from a folder or, fetched, by its name.

    Raises:
        ValueError: there are none, or one of them is missing.
    """
    from transformers.utils import cached_file

    def found(name: str) -> Path | None:
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **_where(options))
        return None if file is None else Path(file)

    whole, index = found("model.safetensors"), found("model.safetensors.index.json")
    if whole is not None or index is None:
        if whole is None:
            raise ValueError(f"{path} has no model.safetensors, expected it: other files may be pickles, never opened")
        return [whole]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} cannot be read: {error!r}") from None
    files = [found(name) for name in names if name.endswith(".safetensors")]
    if missing := [name for name, file in zip(names, files, strict=False) if file is None]:
        raise ValueError(f"{path} has no {missing[0]}, expected it: {index.name} names it")
    if len(files) < len(names):
        raise ValueError(f"{index} names files that are no safetensors, expected only such")
    return files


def read_index(path: Folder) -> dict[str, Any] | None:
    """What the index in a folder of `save_prepared` says: version, format, layout, source and files; None: no index.

    Raises:
        ValueError: a damaged index, or of a version or layout that is not read here.
    """
    file = Path(path) / INDEX
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        about, files = content["metadata"][METHOD], sorted(set(content["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read: {error!r}") from None
    _check_about(about, str(file))
    return {**about, "files": files}


def _check_about(about: Any, where: str) -> None:
    about = about if isinstance(about, dict) else {}
    for key, values in {"version": (VERSION,), "format": QUANTIZED, "layout": (LAYOUT,)}.items():
        if about.get(key) not in values:
            expected = " or ".join(str(value) for value in values)
            raise ValueError(f"{where} has {key} {about.get(key)!r} of prepared experts, expected {expected}")


def _read(folder: Path, index: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by its name in the model, experts as `FrozenWeight`s; memory-mapped, so nothing is read yet."""
    for file in index["files"]:
        try:
            with safe_open(folder / file, "pt") as opened:
                header = json.loads((opened.metadata() or {}).get(METHOD, "{}"))
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"{folder / file} cannot be read: {error}") from None
        _check_about(header, str(folder / file))
        if header["format"] != index["format"]:
            raise ValueError(f"{folder / file} has experts in {header['format']}, expected {index['format']}")
        for name, own in header["experts"].items():
            parts = (tensors.pop(f"{name}.codes", None), tensors.pop(f"{name}.scales", None))
            stored = stored_checked(f"{folder / file}: {name}", FORMATS[index["format"]], *parts, own["columns"])
            yield name, FrozenWeight(stored.codes, stored.scales, own["columns"], getattr(torch, own["dtype"]))
        yield from tensors.items()


def _formats(model: nn.Module) -> Iterator[tuple[str, str]]:
    for name, experts in prepared_layers(model).items():
        for matrix in MATRICES:
            weight = experts._parameters.get(matrix)
            yield name, weight.format if isinstance(weight, FrozenWeight) else "dense"


def _load(
    path: Folder,
    format: str | None,
    model_class: Any,
    config: Any,
    options: dict[str, Any],
    checkpoint: Checkpoint | None = None,
) -> Any:
    """By transformers' own loader, told to hand the experts over as it reads them.

    `checkpoint`: what is read in the place of dense files.
    """
    quantizer, quantization_config = _quantizer()
    asked = {**options, "quantization_config": quantization_config(format, checkpoint)}
    try:
        if checkpoint is None:
            loaded = model_class.from_pretrained(path, config=config, **asked)
        else:
            loaded = _from_state(path, model_class, config, checkpoint.parts, asked)
    except Exception:
        if quantizer.broken:
            raise ValueError(quantizer.broken[0]) from None
        raise
    finally:
        quantizer.broken.clear()
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    for module in model.modules():  # nothing of a quantised model in transformers' sense: its Trainer would refuse it
        own = getattr(module, "config", None)
        for attribute in ("quantization_config", "_is_quantized", "_pre_quantization_dtype"):
            if own is not None and attribute in vars(own):
                delattr(own, attribute)
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        if attribute in vars(model):
            delattr(model, attribute)
    return loaded


def _quantizer() -> tuple[Any, Any]:
    """Our quantizer for transformers' loader and its configuration, registered when they are first asked for."""
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AUTO_QUANTIZER_MAPPING,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if METHOD in AUTO_QUANTIZER_MAPPING:
        return AUTO_QUANTIZER_MAPPING[METHOD], AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD]

    @register_quantization_config(METHOD)
    class ExpertsConfig(QuantizationConfigMixin):
        def __init__(self, format: str | None = None, checkpoint: Checkpoint | None = None, **_: Any) -> None:
            self.quant_method, self.format, self.checkpoint = METHOD, format, checkpoint

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": METHOD, "format": self.format}

    class Quantize(ConversionOps):
        """The last step: the whole matrix, where its parts were not quantised already."""

        def __init__(self, quantizer: Any) -> None:
            self.quantizer = quantizer

        def convert(self, tensors: dict[str, Any], **_: Any) -> dict[str, nn.Parameter]:
            ((name, weight),) = tensors.items()
            shape = self.quantizer.model.get_parameter(name).shape
            weight = _kept(weight[0] if isinstance(weight, list) else weight, self.quantizer, name, shape)
            return {name: nn.Parameter(weight, requires_grad=False)}

    class QuantizeParts(Quantize):
        """The first step: experts one by one, before they are joined. Their rows stay whole, and so do their scales."""

        def __deepcopy__(self, _: Any) -> Any:
            return self  # every matrix gets a copy of its converter

        def convert(self, tensors: dict[str, Any], full_layer_name: str = "", **_: Any) -> dict[str, Any]:
            if full_layer_name in self.quantizer.names:
                for parts in tensors.values():
                    for i in range(len(parts)):  # in place: a part that is quantised is not kept dense beside
                        parts[i] = _kept(parts[i], self.quantizer, full_layer_name)
            return tensors

    @register_quantizer(METHOD)
    class ExpertsQuantizer(HfQuantizer):
        broken: list[str] = []  # noqa: RUF012 - what could not be quantised in the last load

        def __init__(self, quantization_config: Any, **options: Any) -> None:
            super().__init__(quantization_config, **options)
            self.names, self.checkpoint = frozenset(), quantization_config.checkpoint
            self.asked = quantization_config.format
            self.format = self.asked or self.checkpoint.format

        def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
            for part in self.checkpoint.parts.values() if self.checkpoint else ():
                if isinstance(part, Quantised):
                    part.dtype = dtype
            return dtype

        def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
            from flex_kernels.transformers_plug import why_not_fused

            layers = prepared_layers(model)
            if not layers:
                raise ValueError(f"{type(model).__name__} has no MoE layers, expected some")
            for name, experts in layers.items():
                reason = why_not_fused(experts)
                if reason is not None:
                    raise ValueError(f"the experts of {name} cannot be kept in {self.format}: {reason}")
            self.names = frozenset(f"{name}.{matrix}" for name in layers for matrix in MATRICES)
            self.model = model

        def update_weight_conversions(self, conversions: list[Any], *model: Any) -> list[Any]:
            conversions = super().update_weight_conversions(conversions, *model)
            if self.checkpoint is not None:
                self._keep_experts(conversions)
            return [self._with_parts_first(conversion) for conversion in conversions]

        def _keep_experts(self, conversions: list[Any]) -> None:
            """Marks the quantised parts that become experts, before anything is read; what cannot be one is refused."""
            for target, (sources, operations) in _sources_of(self.model, conversions, self.checkpoint.parts).items():
                if target not in self.names:
                    continue
                found = {part.format for part in sources}
                if found == {"dense"}:
                    if self.asked is None:
                        raise DenseExpertsError(
                            f"{target} is dense in the checkpoint, expected a format for it: {' or '.join(QUANTIZED)}"
                        )
                    continue
                if found != {self.format}:
                    raise ValueError(f"{target} is in {' and '.join(sorted(found))}, expected {self.format}")
                if operations and _kinds_of(operations) not in JOINS:
                    raise ValueError(f"the parts of {target} are not only joined when it is loaded, expected them so")
                for part in sources:
                    if reason := part.why_not_kept():
                        raise ValueError(reason)
                    part.keep = True

        def _with_parts_first(self, conversion: Any) -> Any:
            operations = getattr(conversion, "operations", ())
            targets = [name for name in self.names if any(target in name for target in conversion.target_patterns)]
            if not targets or _kinds_of(operations) not in JOINS:
                return conversion
            conversion = copy.copy(conversion)
            conversion.operations = [QuantizeParts(self), *operations]
            return conversion

        def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
            for conversion in getattr(model, "_weight_conversions", None) or ():  # by which the model is saved
                operations = getattr(conversion, "operations", ())
                if operations and isinstance(operations[0], QuantizeParts):
                    conversion.operations = operations[1:]

        def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
            return param_name in self.names

        def get_quantize_ops(self) -> Any:
            return Quantize(self)

        @property
        def is_trainable(self) -> bool:
            return True

        def is_serializable(self) -> bool:
            return False

    return ExpertsQuantizer, ExpertsConfig


def _kinds_of(operations: Any) -> list[tuple[str, int | None]]:
    return [(type(each).__name__, getattr(each, "dim", None)) for each in operations]


def _sources_of(model: nn.Module, conversions: list[Any], parts: dict[str, Part]) -> dict[str, tuple[list, Any]]:
    """Which parts become a tensor of the model, and by which operations, as the loader will find out."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = copy.deepcopy(conversions)  # they remember what they were used for
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    operations = {pattern: each.operations for each in converters for pattern in each.source_patterns}
    own, prefix, found = model.state_dict(), model.base_model_prefix, {}
    for name in sorted(parts):
        target, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if target not in own and name in own:
            target, pattern = rename_source_key(name, [], [], prefix, own)
        found.setdefault(target, ([], operations.get(pattern)))[0].append(parts[name])
    return found


def _kept(weight: Tensor, quantizer: Any, name: str, shape: torch.Size | None = None) -> FrozenWeight:
    try:
        if shape not in (None, weight.shape):
            raise ValueError(f"{name} is {list(weight.shape)} in the files, expected {list(shape)}")
        if isinstance(weight, FrozenWeight):
            return weight
        return FrozenWeight.quantize(weight, quantizer.format, name)
    except ValueError as error:  # the loader would go on, and fill the matrix with random numbers
        quantizer.broken.append(str(error))
        raise
