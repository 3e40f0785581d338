"""Measured tiles: the file that remembers them, who believes it, and which tile wins. Nothing runs on a device.

`test_kernels_tune.py` measures with the kernels, here the sweep gets products that cost nothing.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flex_kernels import candidates
from flex_kernels import tuning as tune
from flex_kernels.backends.triton import tiles
from flex_kernels.backends.triton.tiles import Target, Tile

CHIP = Target("sm90", 132, "NVIDIA H200", "cuda:0")
SIZES = (2048, 1408, 1408)
CALL = (torch.bfloat16, 64 * 60, 60, SIZES)  # few rows an expert
TABLE = tiles.table_tiles(CHIP, torch.bfloat16, True, SIZES)
WINNER = replace(TABLE, down=replace(TABLE.down, num_stages=3), gate_up=replace(TABLE.gate_up, group_m=16))
KIND = tune.Kind("NVIDIA H200", "bfloat16", *SIZES, 60, "few", tune.triton.__version__)
MEASURED = tune.Measured(WINNER, 1.25, 1.5)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of a process that has asked nothing yet, which does not want to measure."""
    path = tmp_path / "cache" / "tiles.json"
    monkeypatch.setenv("FLEX_TILES", str(path))
    monkeypatch.delenv("FLEX_TUNE", raising=False)
    monkeypatch.setattr(tiles, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # builds without CUDA cannot say
    tune._remembered.cache_clear()
    yield path
    tune._remembered.cache_clear()


def test_an_entry_comes_before_the_table(path: Path) -> None:
    tune.write(path, KIND, MEASURED)
    assert tiles.expert_tiles(CHIP, *CALL) == WINNER != TABLE
    assert tiles.expert_tiles(replace(CHIP, device="cuda:1"), *CALL) == WINNER


@pytest.mark.parametrize(
    ("target", "call"),
    [
        (replace(CHIP, name="NVIDIA H100"), CALL),
        (CHIP, (torch.float16, *CALL[1:])),
        (CHIP, (torch.bfloat16, 192 * 60, 60, SIZES)),
        (CHIP, (torch.bfloat16, 64 * 60, 64, SIZES)),
        (CHIP, (torch.bfloat16, 64 * 60, 60, (2048, 1408, 1024))),
        (CHIP, (torch.bfloat16, 64 * 60, 60, SIZES[:2])),
    ],
    ids=["chip", "dtype", "rows", "experts", "graft", "scoring"],
)
def test_an_entry_is_for_its_kind_alone(path: Path, target: Target, call: tuple) -> None:
    tune.write(path, KIND, MEASURED)
    dtype, num_rows, num_experts, sizes = call
    assert tiles.expert_tiles(target, *call) == tiles.table_tiles(
        target, dtype, tiles.few_rows(num_rows, num_experts), sizes
    )


def test_another_triton_measured_something_else(path: Path) -> None:
    tune.write(path, replace(KIND, triton="0.1"), MEASURED)
    assert tiles.expert_tiles(CHIP, *CALL) == TABLE


def test_the_file_is_read_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune.write(path, KIND, MEASURED)
    tiles.expert_tiles(CHIP, *CALL)
    path.unlink()
    assert tiles.expert_tiles(replace(CHIP, device="cuda:1"), *CALL) == WINNER
    monkeypatch.setattr(tune, "measured_tiles", None)  # a call of a known kind does not even ask
    assert tiles.expert_tiles(CHIP, *CALL) == WINNER


def test_an_empty_name_means_no_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(path.parent.parent))
    monkeypatch.delenv("FLEX_TILES")
    assert tune.file_path() == path.parent.parent / "flex" / "tiles.json"
    tune.write(tune.file_path(), KIND, MEASURED)
    monkeypatch.setenv("FLEX_TILES", "")
    assert tune.file_path() is None
    assert tiles.expert_tiles(CHIP, *CALL) == TABLE
    tiles._chosen.clear()
    tune._remembered.cache_clear()
    monkeypatch.delenv("FLEX_TILES")
    assert tiles.expert_tiles(CHIP, *CALL) == WINNER


def test_compile_checks_do_not_look(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.parent.mkdir()
    path.write_text("not ours")
    monkeypatch.setenv("FLEX_TUNE", "1")
    try:
        tiles.force_target(Target("sm90", 132))
        assert tiles.expert_tiles(tiles.target_of(torch.device("cuda", 0)), *CALL) == TABLE
    finally:
        tiles.force_target(None)
    with pytest.raises(ValueError, match="delete it"):
        tiles.expert_tiles(CHIP, *CALL)


def test_a_capture_takes_the_table_and_a_later_call_measures(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setenv("FLEX_TUNE", "1")
    monkeypatch.setattr(tune, "measure", lambda *_: asked.append("measured") or MEASURED)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tiles.expert_tiles(CHIP, *CALL) == TABLE
    assert not asked
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.warns(RuntimeWarning, match="measuring tiles once"):
        assert tiles.expert_tiles(CHIP, *CALL) == WINNER
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tiles.expert_tiles(CHIP, *CALL) == WINNER
    assert asked == ["measured"]


def test_what_another_process_measured_meanwhile_is_not_measured_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEX_TUNE", "1")
    assert tune._remembered() == {}
    tune.write(path, KIND, MEASURED)
    assert tiles.expert_tiles(CHIP, *CALL) == WINNER


def test_no_memory_means_the_table_and_a_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("2 GiB wanted")

    monkeypatch.setenv("FLEX_TUNE", "1")
    monkeypatch.setattr(tune, "measure", no_memory)
    said = pytest.warns(RuntimeWarning, match=r"no memory .* default ones are used: 2 GiB wanted")
    with pytest.warns(RuntimeWarning, match="measuring tiles once"), said:
        assert tiles.expert_tiles(CHIP, *CALL) == TABLE
    assert not path.exists()


def test_a_folder_that_cannot_be_written_costs_the_file_only(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError("read-only file system")

    monkeypatch.setenv("FLEX_TUNE", "1")
    monkeypatch.setattr(tune, "measure", lambda *_: MEASURED)
    monkeypatch.setattr(Path, "mkdir", read_only)
    said = pytest.warns(RuntimeWarning, match=r"cannot be written \(read-only file system\)")
    with pytest.warns(RuntimeWarning, match="measuring tiles once"), said:
        assert tiles.expert_tiles(CHIP, *CALL) == WINNER
    tiles._chosen.clear()
    assert tiles.expert_tiles(CHIP, *CALL) == WINNER


def test_only_0_and_1_are_understood(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEX_TUNE", "0")
    assert tiles.expert_tiles(CHIP, *CALL) == TABLE
    tiles._chosen.clear()
    monkeypatch.setenv("FLEX_TUNE", "yes")
    with pytest.raises(ValueError, match="FLEX_TUNE is 'yes', want 0 or 1"):
        tiles.expert_tiles(CHIP, *CALL)


def test_the_file_can_be_read_by_a_person(path: Path) -> None:
    tune.write(path, KIND, MEASURED)
    assert not list(path.parent.glob("*.part"))
    content = json.loads(path.read_text())
    assert content["format"] == 1
    (entry,) = content["entries"]
    assert entry["chip"] == "NVIDIA H200"
    assert entry["tiles"]["down"] == {
        "block_m": 64, "block_n": 256, "block_k": 64, "num_warps": 8, "num_stages": 3, "per_processor": 1, "group_m": 8
    }  # fmt: skip
    assert (entry["ms"], entry["default_ms"], entry["rows"]) == (1.25, 1.5, "few")
    assert set(entry) >= {"torch", "triton", "date", "dtype", "hidden_size", "num_experts"}


def test_an_entry_that_knows_nothing_of_shared_processors_is_measured_anew(path: Path) -> None:
    tune.write(path, KIND, MEASURED)
    content = json.loads(path.read_text())
    for tile in content["entries"][0]["tiles"].values():
        del tile["per_processor"]
    path.write_text(json.dumps(content))
    assert tune.read(path) == {}
    tune.write(path, KIND, MEASURED)
    assert tune.read(path) == {KIND: WINNER}


def test_a_new_entry_takes_the_place_of_the_old(path: Path) -> None:
    tune.write(path, KIND, MEASURED)
    tune.write(path, replace(KIND, rows="many"), MEASURED)
    tune.write(path, KIND, tune.Measured(TABLE, 1.0, 1.0))
    assert tune.read(path) == {KIND: TABLE, replace(KIND, rows="many"): WINNER}
    assert len(json.loads(path.read_text())["entries"]) == 2


def test_writers_at_the_same_time_lose_nothing(path: Path) -> None:
    kinds = [replace(KIND, num_experts=number) for number in range(1, 17)]
    threads = [threading.Thread(target=tune.write, args=(path, kind, MEASURED)) for kind in kinds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(tune.read(path)) == set(kinds)


def test_killed_half_way_leaves_the_old_file(path: Path) -> None:
    tune.write(path, KIND, MEASURED)
    before = path.read_bytes()
    code = """
import os, sys
from dataclasses import replace
from pathlib import Path
from flex_kernels import tuning as tune
path = Path(sys.argv[1])
(kind, tiles), = tune.read(path).items()
os.replace = lambda *_: os._exit(9)
tune.write(path, replace(kind, rows="many"), tune.Measured(tiles, 1.0, 1.0))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    assert subprocess.run([sys.executable, "-c", code, str(path)], env=environment, check=False).returncode == 9
    assert path.read_bytes() == before
    tune.write(path, replace(KIND, rows="many"), MEASURED)  # nobody holds the lock
    assert len(tune.read(path)) == 2


def test_an_error_while_writing_leaves_nothing_behind(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune.write(path, KIND, MEASURED)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as context:
        context.setattr(os, "replace", full)
        with pytest.raises(OSError, match="no space left"):
            tune.write(path, replace(KIND, rows="many"), MEASURED)
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["tiles.json", "tiles.json.lock"]


def entry(**changes: object) -> dict:
    return {**asdict(KIND), "tiles": asdict(WINNER), **changes}


def with_down(**changes: object) -> dict:
    return {**asdict(WINNER), "down": {**asdict(WINNER.down), **changes}}


BAD = {
    "no JSON": ('{"format": 1, "entr', "Expecting|Unterminated"),
    "another format": ({"format": 2, "entries": []}, "format 2, want 1"),
    "a list": ([], "format 'list', want 1"),
    "no entries": ({"format": 1}, "entries"),
    "no chip": ({"format": 1, "entries": [{}]}, r"entry 0: KeyError\('chip'\)"),
    "no tiles": ({"format": 1, "entries": [entry(), entry(tiles={})]}, "entry 1: TypeError"),
    "unknown size": ({"format": 1, "entries": [entry(tiles=with_down(blocks=3))]}, "blocks"),
    "odd block": ({"format": 1, "entries": [entry(tiles=with_down(block_n=96))]}, "powers of two"),
    "no number": ({"format": 1, "entries": [entry(tiles=with_down(num_stages="3"))]}, "whole numbers"),
    "two heights": ({"format": 1, "entries": [entry(tiles=with_down(block_m=128))]}, "block_m differs"),
}


@pytest.mark.parametrize(("content", "reason"), BAD.values(), ids=BAD)
def test_a_file_that_is_not_ours_is_refused_and_kept(path: Path, content: object, reason: str) -> None:
    path.parent.mkdir()
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    before = path.read_bytes()
    for use in (lambda: tiles.expert_tiles(CHIP, *CALL), lambda: tune.write(path, KIND, MEASURED)):
        with pytest.raises(ValueError, match=rf"{path} is no file of measured tiles .*{reason}.*delete it"):
            use()
    assert path.read_bytes() == before


def test_a_folder_instead_of_a_file_is_refused(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"tiles\.json is no file .*delete it, or name another in FLEX_TILES"):
        tiles.expert_tiles(CHIP, *CALL)


SMALL = Target("interpreter", 3, "a chip of this test", "cpu")
SMALL_TABLE = tiles.table_tiles(SMALL, torch.float32, True, (32, 24, 16))
SMALL_KIND = tune.Kind(SMALL.name, "float32", 32, 24, 16, 3, "few", tune.triton.__version__)
TILE = SMALL_TABLE.down  # the same for all four


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tune.Measured]:
    """The sweep over four products that always come out the same, but for what `spoil` does to them; all tiles take
    2 ms, but those in `fast`."""

    def run(fast: dict[Tile, float], spoil: Callable[[str, Tile, Tensor], None] | None = None) -> tune.Measured:
        def gemm(kernel: str, tile: Tile) -> list[Tensor]:
            last = torch.linspace(-1, 1, 1000).reshape(10, 100)
            if spoil is not None:
                spoil(kernel, tile, last)
            return [torch.ones(3), last]

        gemms = {kernel: partial(gemm, kernel) for kernel in candidates.KERNELS}
        monkeypatch.setattr(tune, "gemms", lambda *_: gemms)
        monkeypatch.setattr(tune, "milliseconds", lambda run: fast.get(run.args[-1], 2.0))
        return tune.measure(SMALL_KIND, SMALL, torch.float32)

    return run


def test_the_default_wins_where_nothing_is_faster(sweep: Callable) -> None:
    assert sweep({}) == tune.Measured(SMALL_TABLE, 8.0, 8.0)


def test_the_four_agree_on_the_height_of_the_least_sum(sweep: Callable) -> None:
    """Of 64 rows the best take 1 ms each. One of 16 rows is faster, but only `down` has it: the others would pay."""
    tall, low = replace(TILE, block_m=64, block_n=32), replace(TILE, block_m=16, block_n=32)

    def only_down(kernel: str, tile: Tile, result: Tensor) -> None:
        if tile == low and kernel != "down":
            raise RuntimeError("refused")

    measured = sweep({tall: 1.0, low: 0.1}, only_down)
    assert measured == tune.Measured(tiles.ExpertTiles(tall, tall, tall, tall), 4.0, 8.0)
    assert sweep({tall: 1.0, low: 0.9}).tiles == tiles.ExpertTiles(low, low, low, low)


def test_a_height_that_one_kernel_cannot_do_is_out(sweep: Callable) -> None:
    def never_low(kernel: str, tile: Tile, result: Tensor) -> None:
        if kernel == "d_hidden" and tile.block_m == 16:
            raise tune.TritonError("out of resource: shared memory")

    assert sweep({replace(TILE, block_m=16): 0.1}, never_low) == tune.Measured(SMALL_TABLE, 8.0, 8.0)


@pytest.mark.parametrize("kernel", candidates.KERNELS)
@pytest.mark.parametrize("wrong", [0.01, float("nan"), float("inf")])
def test_a_wrong_tile_never_wins(kernel: str, wrong: float, sweep: Callable) -> None:
    """A single number of its last result is enough."""
    fastest, second = replace(TILE, block_n=32), replace(TILE, num_warps=8)

    def spoil(of_kernel: str, tile: Tile, result: Tensor) -> None:
        if of_kernel == kernel and tile == fastest:
            result[7, 7] += wrong

    found = sweep({fastest: 0.1, second: 0.2}, spoil).tiles
    for name in candidates.KERNELS:
        assert getattr(found, name) == (second if name == kernel else fastest)


def test_what_is_wrong_with_the_default_is_said(sweep: Callable) -> None:
    def refuse(kernel: str, tile: Tile, result: Tensor) -> None:
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        sweep({}, refuse)
