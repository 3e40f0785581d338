"""The file of measured tiles: what is in it, who may write it, and what is refused."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from measured_tiles import CALL, CHIP, KIND, MEASURED, TABLE, WINNER, tiles_path  # noqa: F401

from flex_kernels.backends.triton import tile_file, tiles
from flex_kernels.backends.triton.tile_file import Measured


def test_the_file_can_be_read_by_a_person(path: Path) -> None:
    tile_file.write(path, KIND, MEASURED)
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


def test_an_entry_that_knows_nothing_of_shared_processors_is_measured_again(path: Path) -> None:
    tile_file.write(path, KIND, MEASURED)
    content = json.loads(path.read_text())
    for tile in content["entries"][0]["tiles"].values():
        del tile["per_processor"]
    path.write_text(json.dumps(content))
    assert tile_file.read(path) == {}
    tile_file.write(path, KIND, MEASURED)
    assert tile_file.read(path) == {KIND: WINNER}


def test_a_new_entry_takes_the_place_of_the_old(path: Path) -> None:
    tile_file.write(path, KIND, MEASURED)
    tile_file.write(path, replace(KIND, rows="many"), MEASURED)
    tile_file.write(path, KIND, Measured(TABLE, 1.0, 1.0))
    assert tile_file.read(path) == {KIND: TABLE, replace(KIND, rows="many"): WINNER}
    assert len(json.loads(path.read_text())["entries"]) == 2


def test_writers_at_the_same_time_lose_nothing(path: Path) -> None:
    kinds = [replace(KIND, num_experts=number) for number in range(1, 17)]
    threads = [threading.Thread(target=tile_file.write, args=(path, kind, MEASURED)) for kind in kinds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(tile_file.read(path)) == set(kinds)


def test_killed_half_way_leaves_the_old_file(path: Path) -> None:
    tile_file.write(path, KIND, MEASURED)
    before = path.read_bytes()
    code = """
import os, sys
from dataclasses import replace
from pathlib import Path
from flex_kernels.backends.triton.tile_file import Measured, read, write
path = Path(sys.argv[1])
(kind, tiles), = read(path).items()
os.replace = lambda *_: os._exit(9)
write(path, replace(kind, rows="many"), Measured(tiles, 1.0, 1.0))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    assert subprocess.run([sys.executable, "-c", code, str(path)], env=environment, check=False).returncode == 9
    assert path.read_bytes() == before
    tile_file.write(path, replace(KIND, rows="many"), MEASURED)  # nobody holds the lock
    assert len(tile_file.read(path)) == 2


def test_an_error_while_writing_leaves_nothing_behind(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tile_file.write(path, KIND, MEASURED)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as context:
        context.setattr(os, "replace", full)
        with pytest.raises(OSError, match="no space left"):
            tile_file.write(path, replace(KIND, rows="many"), MEASURED)
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["tiles.json", "tiles.json.lock"]


def entry(**changes: object) -> dict:
    return {**asdict(KIND), "tiles": asdict(WINNER), **changes}


def with_down(**changes: object) -> dict:
    return {**asdict(WINNER), "down": {**asdict(WINNER.down), **changes}}


BAD = {
    "no JSON": ('{"format": 1, "entr', "Expecting|Unterminated"),
    "another format": ({"format": 2, "entries": []}, "format 2, expected 1"),
    "a list": ([], "format 'list', expected 1"),
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
    for use in (lambda: tiles.expert_tiles(CHIP, *CALL), lambda: tile_file.write(path, KIND, MEASURED)):
        with pytest.raises(ValueError, match=rf"{path} is no file of measured tiles .*{reason}.*delete it"):
            use()
    assert path.read_bytes() == before


def test_a_folder_instead_of_a_file_is_refused(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"tiles\.json is no file .*delete it, or name another in FLEX_TILES"):
        tiles.expert_tiles(CHIP, *CALL)
