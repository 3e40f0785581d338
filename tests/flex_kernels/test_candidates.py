"""Which tiles are tried, on the user's chip and by the benchmark: the default first, and nothing that cannot fit."""

from dataclasses import replace

import pytest
import torch

from flex_kernels import candidates
from flex_kernels.backends.triton import tiles
from flex_kernels.backends.triton.tiles import Target

SIZES = (2048, 1408, 1408)


@pytest.mark.parametrize("chip", sorted(candidates.SHARED_BYTES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [SIZES, (2047, 1407, 0)], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
def test_neighbours_fit_and_begin_with_the_default(
    chip: str, dtype: torch.dtype, sizes: tuple[int, ...], few: bool
) -> None:
    defaults = tiles.table_tiles(Target(chip, 100), dtype, few, sizes)
    heights = []
    for kernel in candidates.KERNELS:
        default = getattr(defaults, kernel)
        tried = candidates.neighbours(kernel, default, chip, dtype.itemsize)
        assert tried[0] == default
        assert 4 <= len(set(tried)) == len(tried) <= 12
        for tile in tried:
            matrices = tile.block_m + (2 if kernel == "gate_up" else 1) * tile.block_n
            assert matrices * tile.block_k * tile.num_stages * dtype.itemsize <= candidates.SHARED_BYTES[chip], tile
            assert tile.block_n >= 32
            assert tile.block_m in (16, 32, 64, 128)
        heights.append({tile.block_m for tile in tried})
    assert all(len(of_kernel & heights[0]) >= 2 for of_kernel in heights)


def test_the_benchmark_tries_many_more() -> None:
    table = tiles.table_tiles(Target("sm90", 132), torch.bfloat16, False, SIZES)
    counts = {}
    for kernel in candidates.KERNELS:
        tried = list(candidates.all_candidates(kernel, getattr(table, kernel)))
        assert tried[0] == getattr(table, kernel)
        assert len(set(tried)) == len(tried)
        counts[kernel] = len(tried)
        assert {tile.per_processor for tile in tried} == {1, 2}
        pairs = {(replace(tile, per_processor=1)) for tile in tried if tile.per_processor == 2}
        assert not pairs & set(tried[1:]), "alone where two fit"
    assert counts == {"gate_up": 35, "down": 58, "d_preactivations": 58, "d_hidden": 58}
