"""How the frozen experts of a layer are kept: the one table of formats, and the weight that holds one of them.

    dense   as the checkpoint has them
    int8    a code of 8 bits and, per output row, an fp32 scale: `w = code * scale`
    nf4     a code of 4 bits into the 16 published NF4 values and, per 64 neighbours along the input, a bf16 scale:
            `w = NF4[code] * scale`; two codes a byte, the earlier one in the low half. Rows are padded to whole groups

What a format means is said in `reference.py` (`quantize`, `dequantize`); everybody else reads `FORMATS`. A weight is
[E, rows, columns], `columns` being the input of the forward's product. Both of its products read the same codes: the
forward sums along a row, and the backward's `dX = dY W` reads whole rows as the steps of its sum, a row's scales with
them. So nothing is kept twice, and there is no transposed copy.

`Stored` is what the backends get. `FrozenWeight` is the same as a tensor, so that it can stand where the dense
parameter stood: `shape`, `dtype`, `device`, `to` and `state_dict` are those of the dense weight, and an operation that
knows nothing of formats gets it dequantised. The layout is "plain", the same bytes on every processor.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flex_kernels import reference
from flex_kernels.reference import NF4_GROUP

LAYOUT = "plain"


class Format(NamedTuple):
    """One way to keep a frozen weight. `codes`: their dtype in memory, which tells the format; None: no codes."""

    name: str
    codes: torch.dtype | None
    codes_per_byte: int
    scales: torch.dtype | None
    group: int  # weights along a row that share a scale; 0: all of the row


FORMATS = {
    entry.name: entry
    for entry in (
        Format("dense", None, 0, None, 0),
        Format("int8", torch.int8, 1, torch.float32, 0),
        Format("nf4", torch.uint8, 2, torch.bfloat16, NF4_GROUP),
    )
}
QUANTIZED = tuple(name for name, entry in FORMATS.items() if entry.codes is not None)
_BY_CODES = {entry.codes: entry for entry in FORMATS.values() if entry.codes is not None}
CODE_DTYPES = tuple(_BY_CODES)


class Stored(NamedTuple):
    """A quantised weight as kernels read it: all experts' codes and scales, and how long a row is without padding."""

    codes: Tensor  # [E, rows, columns] int8, or [E, rows, padded columns / 2] uint8
    scales: Tensor  # [E, rows] fp32, or [E, rows, padded columns / 64] bf16
    columns: int

    @property
    def format(self) -> Format:
        return _BY_CODES[self.codes.dtype]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.codes.shape[:-1], self.columns))

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes: what a backend is chosen by."""
        return self.codes.dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def contiguous(self) -> "Stored":
        return Stored(self.codes.contiguous(), self.scales.contiguous(), self.columns)

    def experts(self, index: Any, dtype: torch.dtype) -> Tensor:
        """The weights at `index` of the leading dimensions (an expert, or experts and rows), dequantised."""
        return reference.dequantize(self.codes[index], self.scales[index], self.columns, dtype)

    def column_vectors(self, expert: Tensor, column: Tensor, dtype: torch.dtype) -> Tensor:
        """[n, rows]: column `column[i]` of expert `expert[i]`."""
        if self.format.group == 0:
            return (self.codes[expert, :, column].float() * self.scales[expert]).to(dtype)
        codes = self.codes[expert, :, column // 2] >> (4 * (column % 2))[:, None].to(torch.uint8) & 15
        scales = self.scales[expert, :, column // self.format.group].float()
        return (reference.nf4_values(codes.device)[codes.long()] * scales).to(dtype)


Experts = Tensor | Stored


def expert_of(weights: Experts, index: int, dtype: torch.dtype | None = None) -> Tensor:
    """[rows, columns] of one expert in `dtype`; None: dense in its own, dequantised in fp32."""
    if isinstance(weights, Stored):
        return weights.experts(index, dtype or torch.float32)
    weight = weights[index]
    return weight if dtype in (None, weight.dtype) else weight.to(dtype)


def stored(codes: Tensor, scales: Tensor | None, columns: int) -> Experts:
    """A weight from the tensors that an operation was given: without scales they are the dense weight."""
    return codes if scales is None else Stored(codes, scales, columns)


class FrozenWeight(Tensor):
    """A quantised weight in the place of a dense one: [E, rows, columns] of `dtype`, never trained.

    Indexing an expert, rows or columns dequantises those alone; weights of one format are stacked, and joined along
    their rows or experts, as they are; any other operation sees the dense weight, made for it and forgotten. `copy_`
    (and so `load_state_dict`) quantises what comes.
    """

    codes: Tensor
    scales: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor, columns: int, dtype: torch.dtype) -> "FrozenWeight":
        shape = (*codes.shape[:-1], columns)
        own = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device, requires_grad=False)
        own.codes, own.scales = codes, scales
        return own

    @classmethod
    def quantize(cls, weight: Tensor, format: str, name: str = "the weight") -> "FrozenWeight":
        """A dense [..., rows, columns], one matrix at a time.

        Raises:
            ValueError: NaN or infinite values (the message names them `name`), or a format without codes.
        """
        check_format(format)
        check_finite(name, weight)
        *leading, rows, columns = weight.shape
        weight = weight.detach()
        parts = [reference.quantize(matrix, format) for matrix in weight.reshape(-1, rows, columns)]
        if not parts:
            parts = [tuple(part[:0] for part in reference.quantize(weight.new_zeros(1, columns), format))]
            stacked = (part.new_empty(*leading, rows, *part.shape[1:]) for part in parts[0])
        else:
            stacked = (torch.stack(part).reshape(*leading, *part[0].shape) for part in zip(*parts, strict=True))
        return cls(*stacked, columns, weight.dtype)

    @property
    def stored(self) -> Stored:
        return Stored(self.codes, self.scales, self.shape[-1])

    @property
    def format(self) -> str:
        return _BY_CODES[self.codes.dtype].name

    def dequantize(self) -> Tensor:
        """The dense weight in its dtype."""
        return reference.dequantize(self.codes, self.scales, self.shape[-1], self.dtype)

    @property
    def stored_bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def __repr__(self, **_: Any) -> str:  # torch.Tensor's would print the dense values
        return f"FrozenWeight({list(self.shape)}, {self.dtype}, format={self.format!r}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scales"], (self.shape[-1], self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> "FrozenWeight":
        return FrozenWeight(inner["codes"], inner["scales"], *context)

    def _with(self, codes: Tensor, scales: Tensor, dtype: torch.dtype | None = None) -> "FrozenWeight":
        return FrozenWeight(codes, scales, self.shape[-1], dtype or self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, aten = kwargs or {}, torch.ops.aten
        own = args[0] if args and isinstance(args[0], cls) else None
        if own is not None and func in (aten.detach.default, aten.alias.default):
            return own._with(own.codes, own.scales)
        if own is not None and func is aten.clone.default:
            return own._with(own.codes.clone(), own.scales.clone())
        if own is not None and func is aten._to_copy.default:
            place = {key: value for key, value in kwargs.items() if key in ("device", "non_blocking")}
            dtype = kwargs.get("dtype") or own.dtype
            if dtype.is_floating_point:  # another dtype means the same codes
                here = kwargs.get("device") in (None, own.device)
                parts = (own.codes, own.scales)
                return own._with(*(part if here else aten._to_copy.default(part, **place) for part in parts), dtype)
        if own is not None and func is aten.copy_.default:
            source = args[1]
            if not (isinstance(source, cls) and source.format == own.format):
                dense = source.dequantize() if isinstance(source, cls) else source
                source = cls.quantize(dense.expand(own.shape).to(own.device), own.format)
            own.codes.copy_(source.codes)
            own.scales.copy_(source.scales)
            return own
        if func in (aten.stack.default, aten.cat.default):
            joined = cls._joined(func, *args, **kwargs)
            if joined is not None:
                return joined
        if own is not None and own.dim() == 3 and func is aten.select.int and args[1] in (0, -3):
            return own.stored.experts(args[2], own.dtype)
        if own is not None and own.dim() == 3 and func is aten.index.Tensor:
            found = own._indexed(args[1])
            if found is not None:
                return found
        return func(*_dense(cls, args), **_dense(cls, kwargs))

    @classmethod
    def _joined(cls, func: Any, tensors: list[Tensor], dim: int = 0) -> "FrozenWeight | None":
        """Weights of one format stacked, or joined along experts or rows, where no scale changes; None: otherwise."""
        first = tensors[0]
        if not all(isinstance(tensor, cls) for tensor in tensors):
            return None
        kinds = {(tensor.format, tensor.scales.dtype, tensor.dtype, tensor.shape[-1]) for tensor in tensors}
        if len(kinds) != 1 or not 0 <= dim < first.dim() - 1:
            return None
        return first._with(*(func([getattr(each, part) for each in tensors], dim) for part in ("codes", "scales")))

    def _indexed(self, indices: list[Tensor | None]) -> Tensor | None:
        """`w[experts, rows]` and `w[experts, :, columns]` without the rest; None: another kind of index."""
        indices = [*indices, *[None] * (3 - len(indices))]
        integers = [index is not None and index.dtype in (torch.int64, torch.int32) for index in indices]
        if integers == [True, True, False] and indices[2] is None:
            return self.stored.experts((indices[0], indices[1]), self.dtype)
        if integers == [True, False, True] and indices[1] is None and indices[0].dim() == indices[2].dim() == 1:
            expert, column = torch.broadcast_tensors(indices[0], indices[2])
            return self.stored.column_vectors(expert, column, self.dtype)
        return None


def _dense(cls: type, tree: Any) -> Any:
    return torch.utils._pytree.tree_map_only(cls, FrozenWeight.dequantize, tree)


def stored_checked(name: str, format: Format, codes: Tensor | None, scales: Tensor | None, columns: int) -> Stored:
    """Codes and scales that came from elsewhere, as one weight.

    Raises:
        ValueError: one of them is missing, or of a dtype or shape that is not the format's; scales are not finite.
    """
    if codes is None or scales is None:
        raise ValueError(f"{name} has no {'codes' if codes is None else 'scales'}, expected both")
    groups = -(-columns // format.group) if format.group else None
    width = columns if groups is None else groups * format.group // format.codes_per_byte
    want = {
        "codes": (codes, format.codes, [*codes.shape[:-1], width]),
        "scales": (scales, format.scales, [*codes.shape[:-1], *([] if groups is None else [groups])]),
    }
    for part, (tensor, dtype, shape) in want.items():
        if tensor.dtype != dtype or list(tensor.shape) != shape:
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"{name}: the {part} are {found}, expected {dtype} {shape} for {format.name}")
    check_finite(f"{name}: the scales", scales)
    return Stored(codes, scales, columns)


def format_of(weight: Tensor) -> str:
    """The name of the format that a layer's weight is kept in."""
    return weight.format if isinstance(weight, FrozenWeight) else "dense"


def unwrapped(weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """What an operation is given of a weight: its codes and scales, or itself and None."""
    return (weight.codes, weight.scales) if isinstance(weight, FrozenWeight) else (weight, None)


def check_format(format: str) -> None:
    if format not in QUANTIZED:
        raise ValueError(f"format is {format!r}, expected one of {', '.join(QUANTIZED)}, or None for dense weights")


def check_finite(name: str, weight: Tensor) -> None:
    """
    Raises:
        ValueError: NaN or infinite values; no scale could be given to their group.
    """
    if isinstance(weight, FrozenWeight):
        weight = weight.scales
    if weight.numel() and not weight.is_meta and not torch.isfinite(torch.stack(weight.detach().aminmax())).all():
        broken = int((~torch.isfinite(weight)).sum())
        raise ValueError(f"{name} has {broken} NaN or infinite values, expected finite weights")


def check_frozen(name: str, weight: Tensor) -> None:
    """
    Raises:
        ValueError: a quantised weight that asks for a gradient.
    """
    if isinstance(weight, FrozenWeight) and weight.requires_grad:
        raise ValueError(
            f"{name} is kept in {weight.format} and requires grad, expected it frozen: experts that train are dense "
            "(prepare_experts(model, None) gives them back)"
        )


_keeping = 0


@contextlib.contextmanager
def keep_stored() -> Iterator[None]:
    """Inside, `state_dict` of a prepared model holds its `FrozenWeight`s as they are, and not dense tensors."""
    global _keeping
    _keeping += 1
    try:
        yield
    finally:
        _keeping -= 1


def dense_in_state_dict(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A state dict hook: whoever saves the model gets plain weights."""
    if _keeping:
        return
    for name, parameter in module._parameters.items():
        if isinstance(parameter, FrozenWeight) and isinstance(state.get(prefix + name), FrozenWeight):
            state[prefix + name] = state[prefix + name].dequantize()
