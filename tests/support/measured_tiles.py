"""A chip, a call and a measured entry for it, and the file of measured tiles of a process that has asked nothing."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton

from flex_kernels import tuning
from flex_kernels.backends.triton import tile_file, tiles
from flex_kernels.backends.triton.launch import Target
from flex_kernels.backends.triton.tile_file import Kind, Measured

CHIP = Target("sm90", 132, "NVIDIA H200", "cuda:0")
SIZES = (2048, 1408, 1408)
CALL = (torch.bfloat16, 64 * 60, 60, SIZES)  # few rows per expert
TABLE = tiles.table_tiles(CHIP, torch.bfloat16, True, SIZES)
WINNER = replace(TABLE, down=replace(TABLE.down, num_stages=3), gate_up=replace(TABLE.gate_up, group_m=16))
KIND = Kind("NVIDIA H200", "bfloat16", *SIZES, 60, "few", triton.__version__)
MEASURED = Measured(WINNER, 1.25, 1.5)


@pytest.fixture(name="path")
def tiles_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of a process that has asked nothing yet, which does not want to measure."""
    path = tmp_path / "cache" / "tiles.json"
    monkeypatch.setenv("FLEX_TILES", str(path))
    monkeypatch.delenv("FLEX_TUNE", raising=False)
    monkeypatch.setattr(tiles, "_chosen", {})
    monkeypatch.setattr(tiles, "_measure", tuning.tune)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # builds without CUDA cannot say
    tile_file.remembered.cache_clear()
    yield path
    tile_file.remembered.cache_clear()
