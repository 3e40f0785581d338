"""Tile sizes: plain functions of chip, dtype and rows per expert; for the layer, what was measured on this chip first.

A grouped GEMM covers the rows of each expert with tiles of `block_m` rows. All GEMMs of one call share `block_m`, since
they share one schedule of row tiles; the other sizes belong to the single kernel. Every entry of the tables compiles
without a spill and within the chip's shared memory (`tests/test_aot.py`); none was measured on a device, so they are
safe defaults. Nothing is measured at run time unless the user says `FLEX_TUNE=1`; what that found is in a file, and
from then on comes before the tables (`tune.py`).
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRET = triton.knobs.runtime.interpret
# Below this many rows an expert's last row tile is mostly padding at 128 rows; 64 is the least a Hopper HGMMA takes.
FEW_ROWS_PER_EXPERT = 192
# The tensor memory accelerator wants bases and row strides in multiples of 16 bytes.
TMA_ALIGNMENT = 16


@dataclass(frozen=True)
class Tile:
    """`block_m` rows by `block_n` columns of output, `block_k` of the sum at a time, `group_m` row tiles an L2 visit.

    `per_processor` programs share a processor: while one stores its tile, another multiplies. More than fit is slower
    by little: those that find no place begin when others end.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    per_processor: int = 1
    group_m: int = 8


@dataclass(frozen=True)
class ExpertTiles:
    """The tiles of one layer call; `block_m` is the same in all of them."""

    gate_up: Tile  # two accumulators: gate and up columns
    down: Tile
    d_preactivations: Tile  # large epilogue
    d_hidden: Tile

    @property
    def block_m(self) -> int:
        return self.gate_up.block_m


@dataclass(frozen=True)
class Target:
    """What kernels are shaped for: a family of chips and how many processors a persistent grid fills.

    Where there is a chip, also which: nothing is measured on the others, nor remembered of them.
    """

    chip: str
    num_processors: int
    name: str = ""  # as the driver says it
    device: str = "meta"  # as torch says it

    @property
    def has_tma(self) -> bool:
        return self.chip in ("sm90", "sm100")

    def programs(self, tile: Tile, max_tiles: int) -> int:
        """How many a persistent grid starts, each of which takes every so manieth tile."""
        return min(max_tiles, self.num_processors * tile.per_processor)


# Three programs: persistent loops take several turns even at test sizes.
_INTERPRETER = Target("interpreter", 3, device="cpu")
_forced_target: Target | None = None
_chosen: dict[tuple, ExpertTiles] = {}  # by the arguments of `expert_tiles`, rows by their class


def target_of(device: torch.device) -> Target:
    """The chip behind `device`; under `TRITON_INTERPRET=1` the interpreter."""
    if _forced_target is not None:
        return _forced_target
    return _INTERPRETER if INTERPRET else _device_target(device.index or 0)


def force_target(target: Target | None) -> None:
    """Shape kernels for a chip that is not there (compile checks); None goes back to the device."""
    global _forced_target
    _forced_target = target


@cache
def _device_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        chip = "gfx942" if properties.gcnArchName.startswith(("gfx942", "gfx950")) else "small"
    else:
        # 8.6, 8.9 and 12.x have 99 KB of shared memory a block; the chips named here have 163 KB and more.
        chip = {(8, 0): "sm80", (8, 7): "sm80", (9, 0): "sm90", (10, 0): "sm100", (10, 3): "sm100"}.get(
            (properties.major, properties.minor), "small"
        )
    return Target(chip, properties.multi_processor_count, properties.name, f"cuda:{index}")


# chip -> block_m -> tiles of (gate_up, down, d_preactivations, d_hidden): block_n, block_k, num_warps, num_stages, and
# per_processor, as many as the registers and shared memory that the compiler reports leave room for (`make aot`).
_TABLE_16_BIT: dict[str, dict[int, tuple[tuple[int, int, int, int, int], ...]]] = {
    "interpreter": {32: ((64, 32, 1, 1, 1),) * 4},
    "sm80": {
        64: ((64, 64, 4, 3, 2), (128, 64, 4, 3, 2), (64, 64, 4, 3, 3), (128, 64, 4, 3, 2)),
        128: ((64, 64, 8, 3, 2), (128, 64, 8, 3, 1), (64, 64, 8, 3, 1), (128, 64, 8, 3, 1)),
    },
    "sm90": {
        64: ((128, 64, 8, 4, 1), (256, 64, 8, 4, 1), (128, 64, 8, 4, 2), (256, 64, 8, 4, 1)),
        128: ((128, 64, 8, 4, 1), (256, 64, 8, 4, 1), (128, 64, 8, 4, 1), (256, 64, 8, 4, 1)),
    },
    "sm100": {
        64: ((128, 64, 8, 3, 1), (256, 64, 8, 3, 1), (128, 64, 8, 3, 1), (128, 64, 4, 3, 1)),
        128: ((128, 64, 8, 3, 1), (256, 64, 8, 3, 1), (128, 64, 8, 3, 1), (256, 64, 8, 3, 1)),
    },
    "gfx942": {
        64: ((64, 64, 4, 2, 2), (128, 64, 4, 2, 2), (64, 64, 4, 2, 3), (128, 64, 4, 2, 2)),
        128: ((64, 32, 8, 2, 2), (128, 64, 8, 2, 1), (64, 64, 8, 2, 2), (128, 64, 8, 2, 1)),
    },
    "small": {
        64: ((32, 32, 4, 3, 4), (64, 32, 4, 3, 4), (64, 32, 4, 3, 4), (64, 32, 4, 3, 4)),
    },
}
# fp32 products run in full precision (`ieee`): on NVIDIA plain FMA, no tensor cores, so small tiles.
_TILES_32_BIT = ((32, 16, 4, 2, 2),) * 4
# Rows whose length is no multiple of 16 bytes are read element by element; a large tile would need too many addresses.
_TILES_UNALIGNED = ((32, 32, 4, 2, 2),) * 4


def cdiv(a: int, b: int) -> int:
    """Rounded up. Triton's own costs the host 2 us a call, and a layer's forward and backward make 28."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


def alignment(*sizes: int) -> int:
    """What all row lengths are multiples of: 16, 8 or, no good for wide loads, 1."""
    common = math.gcd(16, *sizes)
    return common if common >= 8 else 1


def few_rows(num_rows: int, num_experts: int) -> bool:
    """The class of a call: whether its experts get few rows each, on average."""
    return num_rows < FEW_ROWS_PER_EXPERT * num_experts


def table_tiles(target: Target, dtype: torch.dtype, few: bool, sizes: tuple[int, ...]) -> ExpertTiles:
    """The default: what the tables say, whatever was measured."""
    if target.chip == "interpreter":
        table = _TABLE_16_BIT["interpreter"]
    elif dtype == torch.float32:
        table = {64: _TILES_32_BIT}
    elif alignment(*sizes) == 1:
        table = {64: _TILES_UNALIGNED}
    else:
        table = _TABLE_16_BIT[target.chip]
    block_m = min(table) if few else max(table)
    return ExpertTiles(*(Tile(block_m, *sizes) for sizes in table[block_m]))


def expert_tiles(
    target: Target, dtype: torch.dtype, num_rows: int, num_experts: int, sizes: tuple[int, ...]
) -> ExpertTiles:
    """The tiles for `num_rows` (token, slot) pairs spread over `num_experts`; `sizes` are H, I and the graft's I_g.

    What was measured on this very chip for these sizes, else the table. With `FLEX_TUNE=1` the first call of its kind
    measures (`tune.py`); in the middle of capturing a CUDA graph that cannot be, and the call takes the table. Without
    I_g (scoring), and for a target that is not there (compile checks), always the table.

    Raises:
        ValueError: the file of measured tiles cannot be read, or FLEX_TUNE is neither 0 nor 1.
    """
    few = few_rows(num_rows, num_experts)
    call = (target, dtype, few, num_experts, sizes)
    tiles = _chosen.get(call)
    if tiles is None:
        tiles = table_tiles(target, dtype, few, sizes)
        if target.name and len(sizes) == 3:
            from flex_kernels import tuning as tune

            capturing = target.device != "cpu" and torch.cuda.is_current_stream_capturing()
            tiles = tune.measured_tiles(target, dtype, few, num_experts, sizes, may_measure=not capturing) or tiles
            if capturing:  # the next call outside may measure
                return tiles
        _chosen[call] = tiles
    return tiles


def score_tile(target: Target, dtype: torch.dtype, sizes: tuple[int, ...]) -> Tile:
    """The tile of `score_experts`: one accumulator, and an epilogue that reads the target."""
    if target.chip == "interpreter":
        return Tile(16, 32, 32, 1, 1)
    if dtype == torch.float32:
        return Tile(64, 32, 16, 4, 2)
    if alignment(*sizes) == 1:
        return Tile(64, 32, 32, 4, 2)
    return {
        "sm80": Tile(128, 64, 64, 8, 3),
        "sm90": Tile(128, 128, 64, 8, 4),
        "sm100": Tile(128, 128, 64, 8, 3),
        "gfx942": Tile(64, 64, 64, 4, 2),
        "small": Tile(64, 64, 32, 4, 2),
    }[target.chip]


def neuron_tile(target: Target, dtype: torch.dtype, sizes: tuple[int, ...]) -> Tile:
    """The tile of `score_neurons`: three accumulators and five operand tiles a step."""
    if target.chip == "interpreter":
        return Tile(16, 32, 32, 1, 1)
    if dtype == torch.float32:
        return Tile(32, 32, 16, 4, 2)
    if alignment(*sizes) == 1:
        return Tile(64, 32, 32, 4, 2)
    return {
        "sm80": Tile(64, 32, 32, 4, 3),
        "sm90": Tile(128, 64, 64, 8, 3),
        "sm100": Tile(128, 64, 64, 8, 3),
        "gfx942": Tile(64, 32, 32, 4, 2),
        "small": Tile(64, 32, 32, 4, 2),
    }[target.chip]


def use_tma(target: Target, *weights: Tensor | None) -> bool:
    """Whether all weights can be read through tensor descriptors on this chip."""
    if not (target.has_tma or target.chip == "interpreter"):
        return False
    return all(
        weight is None
        or (
            weight.numel() > 0
            and weight.data_ptr() % TMA_ALIGNMENT == 0
            and weight.shape[-1] * weight.element_size() % TMA_ALIGNMENT == 0
        )
        for weight in weights
    )


def operand(weight: Tensor | None, tma: bool, block_shape: list[int]) -> Tensor | TensorDescriptor | None:
    """A weight as a kernel takes it: a descriptor over all its rows, or the tensor (a pointer), or None."""
    if weight is None or not tma:
        return weight
    rows = weight.view(-1, weight.shape[-1])
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), block_shape)


def token_tile(device: torch.device, hidden_size: int) -> tuple[int, int, int]:
    """(tokens, columns, warps) of a kernel that streams rows of `hidden_size`: one 16-byte load a thread."""
    if target_of(device).chip == "interpreter":
        return 16, 32, 1
    columns = max(128, min(next_power_of_2(hidden_size), 1024))
    return 1, columns, columns // 256 if columns >= 512 else 1


def reduction_tokens(device: torch.device, width: int) -> int:
    """Tokens a program of the per-token reductions takes; each holds a row of `width` numbers in registers."""
    return 16 if target_of(device).chip == "interpreter" else max(1, min(32, 1024 // width))


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What every launcher starts with: autograd hands over transposed and stride-0 tensors."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)
