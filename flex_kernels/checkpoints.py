"""Checkpoints that another program has quantised, where they hold one of this library's formats.

    program              what is read                                                          as
    bitsandbytes         4 bits: NF4 in blocks of 64, absmax in fp32 or quantised itself       nf4
                         8 bits: LLM.int8, one scale per row                                   int8
    compressed-tensors   int-quantized, pack-quantized: 8 bits, symmetric, one scale per row   int8
    torchao              Int8Tensor: symmetric, one scale per row                              int8

Codes stay as they are; only the order of the two in a byte differs (NF4). int8 scales stay too; those of NF4, fp32
in the files, are rounded to bf16 where experts are kept in codes: at most 2^-8 of each weight. What is no expert is
dequantised with the scales of the file, to the dtype of the model. Activations stay as they are, also where the program
quantises them when it computes.

`read_checkpoint` reads the headers and, of bitsandbytes, the few numbers that say what the codes mean. So what cannot
be read is told before any weight is. The weights are `Part`s, read when they are asked for. Only safetensors are
opened: torch's own files are pickles.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flex_kernels import reference
from flex_kernels.reference import NF4_GROUP
from flex_kernels.weights import FrozenWeight, check_finite

DTYPES = {  # by their names in safetensors
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = ("U8", "I8", "I32")  # dtypes that are no weight by themselves
SCALES = ("F32", "BF16", "F16")
AT_ONCE = 2**20  # weights that are dequantised in one go: their temporaries take some MB
FP32_EPS = 1e-6  # two tables of the same 16 values


class Files:
    """The tensors of safetensors files by name. Only headers are read, and what is asked for."""

    def __init__(self, paths: list[Path]) -> None:
        self.slices: dict[str, Any] = {}
        self.headers: dict[str, str] = {}
        self.files: dict[str, tuple[Path, Any]] = {}
        for path in paths:
            try:
                opened = safe_open(path, "pt")
                names = list(opened.keys())
                self.headers |= opened.metadata() or {}
            except (OSError, ValueError, SafetensorError) as error:
                raise ValueError(f"{path} cannot be read: {error}") from None
            for name in names:
                self.slices[name], self.files[name] = opened.get_slice(name), (path, opened)

    def __contains__(self, name: str) -> bool:
        return name in self.slices

    def names(self, ending: str = "") -> list[str]:
        return [name for name in self.slices if name.endswith(ending)]

    def shape(self, name: str) -> list[int]:
        return list(self.slices[name].get_shape())

    def dtype(self, name: str) -> str:
        return self.slices[name].get_dtype()

    def read(self, name: str) -> Tensor:
        return self.files[name][1].get_tensor(name)

    def where(self, name: str) -> str:
        return f"{self.files[name][0]}: {name}"

    def check(self, name: str, beside: str, dtypes: tuple[str, ...], *shapes: list[int]) -> str:
        """The name of a tensor that stands beside `beside`.

        Raises:
            ValueError: it is not there, or of another dtype or shape.
        """
        if name not in self:
            raise ValueError(f"{self.where(beside)} has no {name.rpartition('.')[2]} beside it, expected {name}")
        dtype, shape = self.dtype(name), self.shape(name)
        if dtype not in dtypes or (shapes and shape not in shapes):
            expected = f"{' or '.join(dtypes)} {' or '.join(map(str, shapes))}".strip()
            raise ValueError(f"{self.where(name)} is {dtype} {shape}, expected {expected}")
        return name


class Part:
    """A tensor of a checkpoint, read when it is sliced: what transformers' loader takes in the place of one."""

    format = "dense"

    def __init__(self, files: Files, name: str) -> None:
        self.files, self.name = files, name
        self.shape, self.dtype = files.shape(name), DTYPES.get(files.dtype(name), torch.float32)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def get_shape(self) -> list[int]:
        return self.shape

    def __getitem__(self, _: Any) -> Tensor:
        return self.files.read(self.name)


class Quantised(Part):
    """A weight in codes: a `FrozenWeight` if `keep` is set, else dequantised to `dtype`.

    Args:
        name: of the tensor that holds the codes.
        unpack: gives codes [n, .] and a scale for each of the n; they are rows (int8) or groups (nf4) of the weight.
    """

    def __init__(
        self, files: Files, name: str, format: str, shape: list[int], unpack: Callable[[], tuple[Tensor, Tensor]]
    ) -> None:
        self.files, self.name, self.format, self.shape, self.unpack = files, name, format, shape, unpack
        self.dtype, self.keep = torch.float32, False

    def is_floating_point(self) -> bool:
        return False  # transformers asks for the dtype of the first tensor that is not quantised

    def why_not_kept(self) -> str | None:
        if self.format == "nf4" and self.shape[-1] % NF4_GROUP:
            return (
                f"{self.files.where(self.name)} has rows of {self.shape[-1]}, so that blocks of {NF4_GROUP} go over "
                f"their ends; expected a multiple of {NF4_GROUP}"
            )
        return None

    def __getitem__(self, _: Any) -> Tensor:
        codes, scales = self.unpack()
        *leading, columns = self.shape
        if self.keep:
            scales = scales.reshape(leading) if self.format == "int8" else scales.reshape(*leading, -1).bfloat16()
        check_finite(f"{self.files.where(self.name)}: its scales", scales)
        if self.keep:
            return FrozenWeight(codes.reshape(*leading, -1), scales, columns, self.dtype)
        width = columns if self.format == "int8" else NF4_GROUP
        out, step = torch.empty(len(codes), width, dtype=self.dtype), max(1, AT_ONCE // width)
        for start in range(0, len(codes), step):
            rows = slice(start, start + step)
            out[rows] = reference.dequantize(codes[rows], scales[rows], width, self.dtype)
        return out.flatten()[: math.prod(self.shape)].reshape(self.shape)


class Checkpoint(NamedTuple):
    """The tensors of a checkpoint, by the names that they would have in a dense one; `format` of the quantised."""

    parts: dict[str, Part]
    format: str

    def __deepcopy__(self, _: Any) -> "Checkpoint":
        return self  # transformers copies the configuration that carries it


def quantised_by(config: Any) -> dict[str, Any] | None:
    """`quantization_config` of a model's config.json, with the program's name as "quant_method"; None: it has none."""
    about = getattr(config, "quantization_config", None)
    if about is None:
        return None
    about = dict(about) if isinstance(about, dict) else about.to_dict()
    method = about.get("quant_method")
    if method is None and (about.get("load_in_4bit") or about.get("load_in_8bit")):
        method = "bitsandbytes"
    return {**about, "quant_method": getattr(method, "value", method)}


def read_checkpoint(paths: list[Path], about: dict[str, Any]) -> Checkpoint:
    """What the files of a checkpoint hold, no weight of it read yet.

    Args:
        paths: of all its safetensors files.
        about: of `quantised_by`.

    Raises:
        ValueError: another program, a format that is none of ours, or files that lack something or are damaged; the
            message names the file, the tensor, what it is and what was expected.
    """
    check_program(about)
    files = Files(paths)
    parts: dict[str, Part] = {}
    used: set[str] = set()
    for name, weight, beside in PROGRAMS[about["quant_method"]](files, about):
        parts[name] = weight
        used |= {weight.name, *beside}
    formats = {weight.format for weight in parts.values()}
    if len(formats) != 1:
        found = " and ".join(sorted(formats)) or "no quantised tensor"
        raise ValueError(f"{paths[0].parent} holds {found} of {about['quant_method']}, expected one format")
    for name in files.names():
        if name not in used:
            floating = files.dtype(name) in SCALES
            if not floating and (files.dtype(name) in CODES or files.dtype(name) not in DTYPES):
                raise ValueError(f"{files.where(name)} is {files.dtype(name)}, expected beside it what its codes mean")
            parts[name] = Part(files, name)
    return Checkpoint(parts, formats.pop())


def check_program(about: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: files of a program that are not read here.
    """
    if about["quant_method"] not in PROGRAMS:
        raise ValueError(
            f"the checkpoint is quantised by {about['quant_method']!r}, expected dense weights, the files of "
            f"save_prepared, or those of {', '.join(PROGRAMS)}: load it with that program, save it dense, and load that"
        )


Found = Iterator[tuple[str, Quantised, list[str]]]  # name in the dense model, the weight, the tensors beside its codes


def _bitsandbytes(files: Files, _: dict[str, Any]) -> Found:
    for entry in files.names():
        name, found, _type = entry.partition(".quant_state.bitsandbytes__")
        if found:
            yield _nf4(files, name, entry)
    for entry in files.names(".SCB"):
        stem = entry.removesuffix("SCB")
        name = files.check(f"{stem}weight", entry, ("I8",))
        rows, columns = _matrix(files, name)
        files.check(entry, name, ("F32",), [rows], [rows, 1])
        beside = [entry]
        if f"{stem}weight_format" in files:
            beside.append(f"{stem}weight_format")
            layout = int(files.read(beside[-1]))
            if layout != 0:
                raise ValueError(f"{files.where(name)} is in layout {layout} of LLM.int8, expected 0: row after row")

        def unpack(name: str = name, scales: str = entry) -> tuple[Tensor, Tensor]:
            return files.read(name), files.read(scales).flatten() / 127

        yield name, Quantised(files, name, "int8", [rows, columns], unpack), beside


def _nf4(files: Files, name: str, entry: str) -> tuple[str, Quantised, list[str]]:
    if name not in files:
        raise ValueError(f"{files.where(entry)} stands without its codes, expected {name}")
    try:
        state = json.loads(bytes(files.read(entry).tolist()))
        shape, quant_type, block = [int(size) for size in state["shape"]], state["quant_type"], state["blocksize"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{files.where(entry)} cannot be read: {error!r}") from None
    if quant_type != "nf4":
        raise ValueError(f"{files.where(name)} is in {quant_type!r} of bitsandbytes, expected 'nf4'")
    if block != NF4_GROUP:
        raise ValueError(f"{files.where(name)} has a scale per {block} weights, expected one per {NF4_GROUP}")
    count = math.prod(shape)
    blocks = -(-count // NF4_GROUP)
    held = files.shape(name)
    itemsize = DTYPES[files.dtype(name)].itemsize if files.dtype(name) in DTYPES else 0
    if len(shape) < 2 or math.prod(held) * itemsize != -(-count // 2):
        expected = f"{-(-count // 2)} bytes for a weight of {shape}"
        raise ValueError(f"{files.where(name)} is {files.dtype(name)} {held}, expected {expected}")
    values = files.check(f"{name}.quant_map", name, SCALES, [16])
    beside = [entry, values, f"{name}.absmax"]
    if not torch.allclose(files.read(values).float(), reference.nf4_values(torch.device("cpu")), rtol=0, atol=FP32_EPS):
        raise ValueError(f"{files.where(values)} has other values than the 16 published ones of NF4, expected those")
    nested = "nested_offset" in state
    files.check(beside[-1], name, ("U8",) if nested else ("F32",), [blocks])
    if nested:
        size = int(state.get("nested_blocksize", 256))
        beside.append(files.check(f"{name}.nested_absmax", name, ("F32",), [-(-blocks // size)]))
        beside.append(files.check(f"{name}.nested_quant_map", name, ("F32",), [256]))

    def unpack() -> tuple[Tensor, Tensor]:
        codes = files.read(name).contiguous().flatten().view(torch.uint8)
        codes = codes << 4 | codes >> 4  # theirs have the earlier one in the high half
        codes = torch.nn.functional.pad(codes, (0, blocks * NF4_GROUP // 2 - len(codes))).view(blocks, -1)
        scales = files.read(f"{name}.absmax")
        if nested:
            outer = files.read(f"{name}.nested_absmax").repeat_interleave(size)[:blocks]
            scales = files.read(f"{name}.nested_quant_map")[scales.int()] * outer + state["nested_offset"]
        return codes, scales[:, None]

    return name, Quantised(files, name, "nf4", shape, unpack), beside


def _compressed_tensors(files: Files, about: dict[str, Any]) -> Found:
    for group, scheme in (about.get("config_groups") or {}).items():
        _check_scheme(group, scheme, about)
    for key in ("transform_config", "sparsity_config"):
        given = about.get(key) or {}
        if given and given.get("format") != "dense" and given != {"config_groups": {}}:
            raise ValueError(f"the checkpoint has a {key} of compressed-tensors ({given}), expected none")
    for entry in files.names(".weight_scale"):
        stem = entry.removesuffix("weight_scale")
        packed = f"{stem}weight_packed"
        if packed in files:
            name = files.check(packed, entry, ("I32",))
            shape = files.read(files.check(f"{stem}weight_shape", name, ("I64", "I32"), [2])).tolist()
            rows, columns = shape
            files.check(name, entry, ("I32",), [rows, -(-columns // 4)])
            beside = [entry, f"{stem}weight_shape"]
        else:
            name = files.check(f"{stem}weight", entry, ("I8",))
            rows, columns = _matrix(files, name)
            beside = [entry]
        files.check(entry, name, SCALES, [rows, 1], [rows])
        beside += _zero(files, f"{stem}weight_zero_point")
        beside += [f"{stem}{which}_{what}" for which in ("input", "output") for what in ("scale", "zero_point")]

        def unpack(name: str = name, scales: str = entry, columns: int = columns) -> tuple[Tensor, Tensor]:
            codes = files.read(name)
            if codes.dtype == torch.int32:  # four of [0, 255] in a word, the earliest in its lowest byte
                codes = (codes.contiguous().view(torch.uint8)[:, :columns] ^ 128).view(torch.int8)
            return codes, files.read(scales).flatten().float()

        yield f"{stem}weight", Quantised(files, name, "int8", [rows, columns], unpack), beside


def _check_scheme(group: str, scheme: dict[str, Any], about: dict[str, Any]) -> None:
    weights, kind = scheme.get("weights") or {}, scheme.get("format") or about.get("format")
    wanted = {"type": "int", "num_bits": 8, "symmetric": True, "strategy": "channel"}
    found = {key: weights.get(key) for key in wanted}
    if kind not in ("int-quantized", "pack-quantized") or found != wanted:
        said = ", ".join(f"{key} {value}" for key, value in found.items())
        raise ValueError(
            f"{group} of the checkpoint is {kind!r} of compressed-tensors ({said}), expected int-quantized or "
            "pack-quantized of 8 bits, symmetric, strategy channel"
        )


def _torchao(files: Files, _: dict[str, Any]) -> Found:
    try:
        names = json.loads(files.headers.get("tensor_names", "null"))
        about = {name: json.loads(files.headers[name]) for name in names if files.headers[name]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"the files have no account of torchao's tensors in their headers, expected one: {error!r}"
        ) from None
    for full, own in about.items():
        kind = own.get("_type")
        if kind == "Tensor":
            continue
        if kind != "Int8Tensor":
            raise ValueError(f"{full} is a {kind} of torchao, expected an Int8Tensor with one scale per row")
        module, _, weight = full.rpartition(".")
        stem = f"{module}._{weight}_"
        name = f"{stem}qdata"
        if name not in files:
            raise ValueError(f"{full} is an Int8Tensor of torchao, expected its codes {name} in the files")
        files.check(name, name, ("I8",))
        *leading, columns = files.shape(name)
        scales = f"{stem}scale"
        files.check(scales, name, SCALES, [*leading, 1])
        if f"{stem}act_pre_scale" in files:
            raise ValueError(f"{files.where(name)} is for inputs that are scaled before (act_pre_scale), expected none")
        beside = [scales, *_zero(files, f"{stem}zero_point")]
        beside += [f"{stem}act_quant_{what}" for what in ("scale", "zero_point")]

        def unpack(name: str = name, scales: str = scales, columns: int = columns) -> tuple[Tensor, Tensor]:
            return files.read(name).reshape(-1, columns), files.read(scales).flatten().float()

        yield full, Quantised(files, name, "int8", [*leading, columns], unpack), beside


def _matrix(files: Files, name: str) -> list[int]:
    shape = files.shape(name)
    if len(shape) != 2:
        raise ValueError(f"{files.where(name)} has shape {shape}, expected [rows, columns]")
    return shape


def _zero(files: Files, name: str) -> list[str]:
    """Zero points of symmetric codes, where a file has them."""
    if name not in files:
        return []
    if files.read(name).any():
        raise ValueError(f"{files.where(name)} is not zero, expected symmetric codes")
    return [name]


PROGRAMS: dict[str, Callable[[Files, dict[str, Any]], Found]] = {
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed_tensors,
    "torchao": _torchao,
}
