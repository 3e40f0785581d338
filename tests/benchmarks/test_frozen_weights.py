"""`benchmarks.frozen_weights` on a base and a file of one's own."""

from pathlib import Path

import pytest

from benchmarks import frozen_weights
from flex.demo.data import BASE_FOLDER, write_demo_data


def test_a_base_and_a_file_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_demo_data(tmp_path, 5)
    data = str(tmp_path / "general.jsonl")
    asked = ["--model", str(BASE_FOLDER), "--data", data, "--template", "chat", "--limit", "40"]
    assert frozen_weights.main(asked) == 0
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in capsys.readouterr().out.splitlines()]
    found = {row[4]: row for row in rows[2:]}
    assert list(found) == ["dense", "int8", "nf4"]
    losses = {name: float(row[5]) for name, row in found.items()}
    assert losses["dense"] < 0.5  # the base knows these answers
    kl = {name: float(row[6]) for name, row in found.items()}
    assert kl["dense"] == 0
    assert kl["int8"] < kl["nf4"] < 0.05
    assert losses["nf4"] == pytest.approx(losses["dense"], abs=0.05)
    assert len({row[3] for row in found.values()}) == 1  # of the same tokens
