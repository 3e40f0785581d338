"""Which tiles are tried, by `FLEX_TUNE=1` and by the benchmark, and which one wins. Nothing runs on a device.

`test_kernels_tuning.py` measures with the kernels, here the sweep gets products that cost nothing.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import triton
from torch import Tensor

from flex_kernels import tuning
from flex_kernels.backends.triton import tiles
from flex_kernels.backends.triton.launch import Target
from flex_kernels.backends.triton.tile_file import KERNELS, ExpertTiles, Kind, Measured, Tile

SIZES = (2048, 1408, 1408)


@pytest.mark.parametrize("chip", sorted(tuning.SHARED_BYTES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [SIZES, (2047, 1407, 0)], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
def test_neighbours_fit_and_begin_with_the_default(
    chip: str, dtype: torch.dtype, sizes: tuple[int, ...], few: bool
) -> None:
    defaults = tiles.table_tiles(Target(chip, 100), dtype, few, sizes)
    heights = []
    for kernel in KERNELS:
        default = getattr(defaults, kernel)
        tried = tuning.neighbours(kernel, default, chip, dtype.itemsize)
        assert tried[0] == default
        assert 4 <= len(set(tried)) == len(tried) <= 12
        for tile in tried:
            matrices = tile.block_m + (2 if kernel == "gate_up" else 1) * tile.block_n
            assert matrices * tile.block_k * tile.num_stages * dtype.itemsize <= tuning.SHARED_BYTES[chip], tile
            assert tile.block_n >= 32
            assert tile.block_m in (16, 32, 64, 128)
        heights.append({tile.block_m for tile in tried})
    assert all(len(of_kernel & heights[0]) >= 2 for of_kernel in heights)


def test_the_benchmark_tries_many_more() -> None:
    table = tiles.table_tiles(Target("sm90", 132), torch.bfloat16, False, SIZES)
    counts = {}
    for kernel in KERNELS:
        tried = list(tuning.all_candidates(kernel, getattr(table, kernel)))
        assert tried[0] == getattr(table, kernel)
        assert len(set(tried)) == len(tried)
        counts[kernel] = len(tried)
        assert {tile.per_processor for tile in tried} == {1, 2}
        pairs = {(replace(tile, per_processor=1)) for tile in tried if tile.per_processor == 2}
        assert not pairs & set(tried[1:]), "alone where two fit"
    assert counts == {"gate_up": 35, "down": 58, "d_preactivations": 58, "d_hidden": 58}


SMALL = Target("interpreter", 3, "a chip of this test", "cpu")
SMALL_TABLE = tiles.table_tiles(SMALL, torch.float32, True, (32, 24, 16))
SMALL_KIND = Kind(SMALL.name, "float32", 32, 24, 16, 3, "few", triton.__version__)
TILE = SMALL_TABLE.down  # the same for all four


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Measured]:
    """The sweep over four products that always come out the same, but for what `spoil` does to them; all tiles take
    2 ms, but those in `fast`."""

    def run(fast: dict[Tile, float], spoil: Callable[[str, Tile, Tensor], None] | None = None) -> Measured:
        def gemm(kernel: str, tile: Tile) -> list[Tensor]:
            last = torch.linspace(-1, 1, 1000).reshape(10, 100)
            if spoil is not None:
                spoil(kernel, tile, last)
            return [torch.ones(3), last]

        gemms = {kernel: partial(gemm, kernel) for kernel in KERNELS}
        monkeypatch.setattr(tuning, "gemms", lambda *_: gemms)
        monkeypatch.setattr(tuning, "milliseconds", lambda run: fast.get(run.args[-1], 2.0))
        return tuning.measure(SMALL_KIND, SMALL, torch.float32)

    return run


def test_the_default_wins_where_nothing_is_faster(sweep: Callable) -> None:
    assert sweep({}) == Measured(SMALL_TABLE, 8.0, 8.0)


def test_the_four_agree_on_the_height_of_the_least_sum(sweep: Callable) -> None:
    """Of 64 rows the best take 1 ms each. One of 16 rows is faster, but only `down` has it: the others would pay."""
    tall, low = replace(TILE, block_m=64, block_n=32), replace(TILE, block_m=16, block_n=32)

    def only_down(kernel: str, tile: Tile, result: Tensor) -> None:
        if tile == low and kernel != "down":
            raise RuntimeError("refused")

    measured = sweep({tall: 1.0, low: 0.1}, only_down)
    assert measured == Measured(ExpertTiles(tall, tall, tall, tall), 4.0, 8.0)
    assert sweep({tall: 1.0, low: 0.9}).tiles == ExpertTiles(low, low, low, low)


def test_a_height_that_one_kernel_cannot_do_is_out(sweep: Callable) -> None:
    def never_low(kernel: str, tile: Tile, result: Tensor) -> None:
        if kernel == "d_hidden" and tile.block_m == 16:
            raise tuning.TritonError("out of resource: shared memory")

    assert sweep({replace(TILE, block_m=16): 0.1}, never_low) == Measured(SMALL_TABLE, 8.0, 8.0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("wrong", [0.01, float("nan"), float("inf")])
def test_a_wrong_tile_never_wins(kernel: str, wrong: float, sweep: Callable) -> None:
    """A single number of its last result is enough."""
    fastest, second = replace(TILE, block_n=32), replace(TILE, num_warps=8)

    def spoil(of_kernel: str, tile: Tile, result: Tensor) -> None:
        if of_kernel == kernel and tile == fastest:
            result[7, 7] += wrong

    found = sweep({fastest: 0.1, second: 0.2}, spoil).tiles
    for name in KERNELS:
        assert getattr(found, name) == (second if name == kernel else fastest)


def test_what_is_wrong_with_the_default_is_said(sweep: Callable) -> None:
    def refuse(kernel: str, tile: Tile, result: Tensor) -> None:
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        sweep({}, refuse)
