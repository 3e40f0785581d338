"""The sweep with the real kernels: Triton's interpreter runs it at tiny sizes, with a clock of the test's own."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import triton
from cases import Case, layer_inputs
from compare import forward_and_grads
from torch import Tensor

import flex_kernels
from flex_kernels import plan, tuning
from flex_kernels.backends.triton import experts_fwd, launch, tile_file, tiles
from flex_kernels.backends.triton.launch import Target
from flex_kernels.backends.triton.tile_file import KERNELS, ExpertTiles, Kind, Measured, Tile

pytestmark = pytest.mark.skipif(not plan.INTERPRET, reason="a real device measures in test_kernels_gpu.py")
CASE = Case("tune", 9, 2, 32, 24, 3, 16, "few rows, a graft narrower than an expert")
DTYPE = torch.float32
TARGET = Target("interpreter", 3, "a chip of this test", "cpu")
TABLE = tiles.table_tiles(TARGET, DTYPE, True, (32, 24, 16))
KIND = Kind(TARGET.name, "float32", 32, 24, 16, 3, "few", triton.__version__)


@dataclass
class Clock:
    """Stands in for `tuning.milliseconds`: all tiles take `otherwise`, but those in `fast`."""

    fast: dict[Tile, float] = field(default_factory=dict)
    otherwise: float = 2.0
    asked: list[Tile] = field(default_factory=list)

    def __call__(self, run: partial) -> float:
        tile = run.args[-1]
        self.asked.append(tile)
        return self.fast.get(tile, self.otherwise)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tuning, "milliseconds", clock)
    return clock


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of a process on a chip with a name, which wants to measure; a few rows are enough."""
    path = tmp_path / "tiles.json"
    monkeypatch.setenv("FLEX_TILES", str(path))
    monkeypatch.setenv("FLEX_TUNE", "1")
    monkeypatch.setattr(tiles, "_chosen", {})
    monkeypatch.setattr(launch, "_INTERPRETER", TARGET)
    monkeypatch.setattr(tuning, "ROWS_PER_EXPERT", {"few": 5, "many": 40})
    monkeypatch.setattr(tuning, "MOST_NEIGHBOURS", 6)  # two of each height
    tile_file.remembered.cache_clear()
    yield path
    tile_file.remembered.cache_clear()


def layer(inputs: list) -> list[Tensor]:
    """Forward and backward with frozen experts."""
    results = forward_and_grads(
        flex_kernels.grafted_experts, inputs, torch.ones(CASE.num_tokens, CASE.hidden_size), frozen=(3, 4)
    )
    return [result for result in results if result is not None]


def test_the_first_call_measures_and_the_others_use_it(path: Path, clock: Clock) -> None:
    winner = replace(TABLE.down, block_n=32)
    clock.fast[winner] = 0.5
    inputs = layer_inputs(CASE, DTYPE)
    state = torch.random.get_rng_state()
    with pytest.warns(RuntimeWarning, match=rf"measuring tiles once for Kind\(chip='a chip of this test'.*{path}"):
        first = layer(inputs)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(clock.asked) == len(KERNELS) * tuning.MOST_NEIGHBOURS
    assert tile_file.read(path) == {KIND: ExpertTiles(winner, winner, winner, winner)}
    (entry,) = json.loads(path.read_text())["entries"]
    assert (entry["ms"], entry["default_ms"]) == (2.0, 8.0)

    asked = len(clock.asked)
    with warnings.catch_warnings(action="error"):
        for a, b in zip(first, layer(inputs), strict=True):
            assert torch.equal(a, b)
        assert tiles.expert_tiles(TARGET, DTYPE, 18, 3, (32, 24, 16)).down == winner
    assert len(clock.asked) == asked


def test_results_are_those_of_the_table(path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    clock.fast = {replace(TABLE.down, block_m=16): 0.5}
    inputs = layer_inputs(CASE, DTYPE)
    with pytest.warns(RuntimeWarning, match="measuring tiles"):
        ours = layer(inputs)
    assert tile_file.read(path)[KIND].block_m == 16
    monkeypatch.setattr(launch, "_INTERPRETER", replace(TARGET, name=""))
    for a, b in zip(ours, layer(inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_remembered_entry_is_used_without_measuring(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    remembered = ExpertTiles(*(replace(TABLE.down, block_m=16),) * 4)
    tile_file.write(path, KIND, Measured(remembered, 1.0, 2.0))
    monkeypatch.delenv("FLEX_TUNE")
    heights = []
    original = experts_fwd.make_schedule
    monkeypatch.setattr(experts_fwd, "make_schedule", lambda *args: heights.append(args[-1]) or original(*args))
    layer(layer_inputs(CASE, DTYPE))
    assert heights == [16]
    assert not clock.asked


def test_nothing_is_measured_on_the_interpreter_itself(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_INTERPRETER", replace(TARGET, name=""))
    layer(layer_inputs(CASE, DTYPE))
    assert not clock.asked
    assert not path.exists()


def test_a_wrong_tile_never_wins(path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    clock.fast = {replace(TABLE.down, block_n=32): 0.1}

    real = tuning.gemms

    def gemms(*args: object) -> dict[str, tuning.Gemm]:
        runs = real(*args)
        return {**runs, "d_hidden": partial(one_wrong_number, runs["d_hidden"])}

    def one_wrong_number(gemm: tuning.Gemm, tile: Tile) -> list[Tensor]:
        (d_rows,) = gemm(tile)
        if tile != TABLE.d_hidden:
            d_rows[3, 7] += 0.1
        return [d_rows]

    monkeypatch.setattr(tuning, "gemms", gemms)
    found = tuning.measure(KIND, TARGET, DTYPE).tiles
    assert found.down == replace(TABLE.down, block_n=32)
    assert found.d_hidden == TABLE.d_hidden


@pytest.mark.parametrize("graft_size", [0, 16], ids=["no graft", "graft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gemms_compute_every_number(graft_size: int, dtype: torch.dtype) -> None:
    """Fresh memory is NaN in the tests; and two tiles agree."""
    sizes = tuning.Sizes(7, 2, 32, 24, graft_size, 3)
    runs = tuning.gemms(sizes, dtype, TARGET)
    assert tuple(runs) == KERNELS == tuple(asdict(TABLE))
    for run in runs.values():
        results = run(TABLE.down)
        assert all(torch.isfinite(result).all() and result.numel() for result in results)
        assert tuning.agree(run(replace(TABLE.down, block_m=16, block_n=32, block_k=16)), results)


def test_without_a_file_the_process_remembers(path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEX_TILES", "")
    inputs = layer_inputs(CASE, DTYPE)
    with pytest.warns(RuntimeWarning, match="FLEX_TILES is empty: this process alone"):
        layer(inputs)
    asked = len(clock.asked)
    assert asked > 0
    tiles._chosen.clear()  # as for a second chip of the same name
    layer(inputs)
    assert len(clock.asked) == asked
    assert not path.exists()
