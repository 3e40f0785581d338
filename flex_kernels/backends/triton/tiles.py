"""Tile sizes: plain functions of chip, dtype and rows per expert; the layer's may be measured on this chip.

A grouped GEMM covers the rows of each expert with tiles of `block_m` rows. All GEMMs of one call share `block_m`, since
they share one schedule of row tiles; the other sizes belong to the single kernel. Every entry of the tables compiles
without a spill and within the chip's shared memory (`make aot`); none was measured on a device, so they are safe
defaults. Nothing is measured at run time unless the user says `FLEX_TUNE=1`; the result is in a file (`tile_file.py`)
and from then on comes before the tables.
"""

import os
from collections.abc import Callable
from dataclasses import replace

import torch
import triton

from flex_kernels.backends.triton.launch import Target, alignment
from flex_kernels.backends.triton.tile_file import ExpertTiles, Kind, Tile, file_path, read, remembered

# Below this many, a tile has 64 rows (the least a Hopper HGMMA takes) instead of 128: at 128 most of an expert's last
# row tile is padding. Above, padding costs less than reading 1.67 times as many bytes of L2 for a row of output.
FEW_ROWS_PER_EXPERT = 96
# Measures a kind of call, writes it into the user's file, and gives the winners; None if there was no memory for it.
Measure = Callable[[Kind, Target, torch.dtype], ExpertTiles | None]

_measure: Measure | None = None
_chosen: dict[tuple, ExpertTiles] = {}  # by the arguments of `expert_tiles`, rows by their class


def measure_with(measure: Measure | None) -> None:
    """Sets who measures with `FLEX_TUNE=1`. Measuring runs the kernels, so it stands above them (`tuning.py`)."""
    global _measure
    _measure = measure


# chip -> block_m -> tiles of (gate_up, down, d_preactivations, d_hidden): block_n, block_k, num_warps, num_stages, and
# per_processor, as many as the registers and shared memory that the compiler reports leave room for (`make aot`).
_TABLE_16_BIT: dict[str, dict[int, tuple[tuple[int, int, int, int, int], ...]]] = {
    "interpreter": {32: ((64, 32, 1, 1, 1),) * 4},
    "sm80": {
        64: ((64, 64, 4, 3, 2), (128, 64, 4, 3, 2), (64, 32, 4, 4, 3), (128, 64, 4, 3, 2)),
        128: ((64, 64, 4, 3, 2), (128, 64, 8, 3, 1), (64, 64, 8, 3, 1), (128, 64, 8, 3, 1)),
    },
    "sm90": {
        64: ((128, 64, 8, 4, 1), (256, 64, 8, 4, 1), (256, 64, 8, 4, 1), (256, 64, 8, 4, 1)),
        128: ((128, 64, 8, 4, 1), (256, 64, 8, 4, 1), (256, 64, 8, 4, 1), (256, 64, 8, 4, 1)),
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


# Codes are dequantised in registers, beside the accumulators: of those a thread has at most so many, for a chip, a
# product and a format. More spilled (Triton 3.7, `make aot`); where nothing is said, the table's tiles fit.
_BESIDE_CODES: dict[tuple[str, str, str], int] = {
    ("sm80", "gate_up", "int8"): 64,
    ("sm80", "gate_up", "nf4"): 64,
    ("sm80", "d_hidden", "nf4"): 32,
    ("sm80", "d_preactivations", "int8"): 16,
    ("sm80", "d_preactivations", "nf4"): 16,
    ("sm90", "d_preactivations", "int8"): 64,
    ("sm90", "d_preactivations", "nf4"): 64,
    ("sm100", "gate_up", "nf4"): 32,
    ("sm100", "d_preactivations", "nf4"): 16,
}


def beside_codes(target: Target, kernel: str, format: str, tile: Tile) -> Tile:
    """The tile, as narrow as this product of codes needs it."""
    most, columns = _BESIDE_CODES.get((target.chip, kernel, format)), 2 if kernel == "gate_up" else 1
    while most and tile.block_n > 32 and columns * tile.block_m * tile.block_n > most * 32 * tile.num_warps:
        tile = replace(tile, block_n=tile.block_n // 2)
    return tile


def few_rows(num_rows: int, num_experts: int) -> bool:
    """The class of a call: whether its experts get few rows each, on average."""
    return num_rows < FEW_ROWS_PER_EXPERT * num_experts


def table_tiles(target: Target, dtype: torch.dtype, few: bool, sizes: tuple[int, ...]) -> ExpertTiles:
    """The default, from the tables, whatever was measured."""
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

    Those measured on this very chip for these sizes, else the table's. With `FLEX_TUNE=1` the first call of its kind
    measures; while a CUDA graph is captured that is impossible, and the call takes the table. Without I_g (scoring),
    and for a target that is not there (compile checks), always the table.

    Raises:
        ValueError: the file of measured tiles cannot be read, or FLEX_TUNE is neither 0 nor 1.
    """
    few = few_rows(num_rows, num_experts)
    call = (target, dtype, few, num_experts, sizes)
    tiles = _chosen.get(call)
    if tiles is None:
        tiles = table_tiles(target, dtype, few, sizes)
        if target.name and len(sizes) == 3:
            rows = "few" if few else "many"
            kind = Kind(target.name, str(dtype).removeprefix("torch."), *sizes, num_experts, rows, triton.__version__)
            capturing = target.device != "cpu" and torch.cuda.is_current_stream_capturing()
            tiles = _measured_tiles(kind, target, dtype, may_measure=not capturing) or tiles
            if capturing:  # the next call outside may measure
                return tiles
        _chosen[call] = tiles
    return tiles


def _measured_tiles(kind: Kind, target: Target, dtype: torch.dtype, may_measure: bool) -> ExpertTiles | None:
    """The file's tiles for this kind of call, or those measured now, if the user wants that and it is possible."""
    path, known = file_path(), remembered()
    if kind not in known and _tuning_wanted() and may_measure and _measure is not None:
        if path is not None:
            known.update(read(path))  # another process may have been here
        if kind not in known and (found := _measure(kind, target, dtype)) is not None:
            known[kind] = found
    return known.get(kind)


def _tuning_wanted() -> bool:
    value = os.environ.get("FLEX_TUNE", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"FLEX_TUNE is {value!r}, expected 0 or 1")
    return value == "1"


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
