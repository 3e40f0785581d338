"""Which tiles a call gets: measured ones for its own kind, else the table's. Nothing runs on a device."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from measured_tiles import CALL, CHIP, KIND, MEASURED, SIZES, TABLE, WINNER, tiles_path  # noqa: F401

from flex_kernels import tuning
from flex_kernels.backends.triton import launch, tile_file, tiles
from flex_kernels.backends.triton.launch import Target


def test_an_entry_comes_before_the_table(path: Path) -> None:
    tile_file.write(path, KIND, MEASURED)
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
    tile_file.write(path, KIND, MEASURED)
    dtype, num_rows, num_experts, sizes = call
    assert tiles.expert_tiles(target, *call) == tiles.table_tiles(
        target, dtype, tiles.few_rows(num_rows, num_experts), sizes
    )


def test_another_triton_measured_something_else(path: Path) -> None:
    tile_file.write(path, replace(KIND, triton="0.1"), MEASURED)
    assert tiles.expert_tiles(CHIP, *CALL) == TABLE


def test_the_file_is_read_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tile_file.write(path, KIND, MEASURED)
    tiles.expert_tiles(CHIP, *CALL)
    path.unlink()
    assert tiles.expert_tiles(replace(CHIP, device="cuda:1"), *CALL) == WINNER
    monkeypatch.setattr(tiles, "_measured_tiles", None)  # a call of a known kind does not even ask
    assert tiles.expert_tiles(CHIP, *CALL) == WINNER


def test_an_empty_name_means_no_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(path.parent.parent))
    monkeypatch.delenv("FLEX_TILES")
    assert tile_file.file_path() == path.parent.parent / "flex" / "tiles.json"
    tile_file.write(tile_file.file_path(), KIND, MEASURED)
    monkeypatch.setenv("FLEX_TILES", "")
    assert tile_file.file_path() is None
    assert tiles.expert_tiles(CHIP, *CALL) == TABLE
    tiles._chosen.clear()
    tile_file.remembered.cache_clear()
    monkeypatch.delenv("FLEX_TILES")
    assert tiles.expert_tiles(CHIP, *CALL) == WINNER


def test_compile_checks_do_not_look(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.parent.mkdir()
    path.write_text("not ours")
    monkeypatch.setenv("FLEX_TUNE", "1")
    try:
        launch.force_target(Target("sm90", 132))
        assert tiles.expert_tiles(launch.target_of(torch.device("cuda", 0)), *CALL) == TABLE
    finally:
        launch.force_target(None)
    with pytest.raises(ValueError, match="delete it"):
        tiles.expert_tiles(CHIP, *CALL)


def test_a_capture_takes_the_table_and_a_later_call_measures(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setenv("FLEX_TUNE", "1")
    monkeypatch.setattr(tuning, "measure", lambda *_: asked.append("measured") or MEASURED)
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
    assert tile_file.remembered() == {}
    tile_file.write(path, KIND, MEASURED)
    assert tiles.expert_tiles(CHIP, *CALL) == WINNER


def test_no_memory_means_the_table_and_a_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("2 GiB wanted")

    monkeypatch.setenv("FLEX_TUNE", "1")
    monkeypatch.setattr(tuning, "measure", no_memory)
    said = pytest.warns(RuntimeWarning, match=r"no memory .* default ones are used: 2 GiB wanted")
    with pytest.warns(RuntimeWarning, match="measuring tiles once"), said:
        assert tiles.expert_tiles(CHIP, *CALL) == TABLE
    assert not path.exists()


def test_a_folder_that_cannot_be_written_costs_the_file_only(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError("read-only file system")

    monkeypatch.setenv("FLEX_TUNE", "1")
    monkeypatch.setattr(tuning, "measure", lambda *_: MEASURED)
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
    with pytest.raises(ValueError, match="FLEX_TUNE is 'yes', expected 0 or 1"):
        tiles.expert_tiles(CHIP, *CALL)
