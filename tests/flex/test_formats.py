"""What earlier versions wrote: a run of format 1 resumes, is scored, is reported; later formats are refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import read_log, tiny_config

from flex.cli import main
from flex.config import FORMAT, read_config, write_config
from flex.errors import FlexError
from flex.store import events, files

KEPT = Path(__file__).resolve().parents[1] / "kept" / "format-1"


@pytest.fixture
def old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(KEPT, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path / "old" / "run"


def test_a_run_of_format_1_resumes_where_it_was_stopped(old_run, capsys):
    before = read_log(old_run / "flex-seed0" / "metrics.jsonl")
    finished = (old_run / "fedavg-seed0" / "metrics.jsonl").read_text()
    assert main(["train", "run/config.toml"]) == 0
    assert "report.html" in capsys.readouterr().out
    assert (old_run / "fedavg-seed0" / "metrics.jsonl").read_text() == finished
    after = read_log(old_run / "flex-seed0" / "metrics.jsonl")
    # What later versions say besides takes its default.
    known = [{k: v for k, v in event.items() if k in old} for event, old in zip(after, before, strict=False)]
    assert known == before
    whole = [e for e in read_log(KEPT / "whole.jsonl") if e.get("round", 0) == 2 and e["event"] == "evaluate"]
    spoken_of = {e["when"] for e in whole}  # what later versions score besides is no matter
    again = [e for e in after if e.get("round", 0) == 2 and e["event"] == "evaluate" and e["when"] in spoken_of]
    assert len(again) == len(whole) == 8
    key = lambda e: (e["client_id"], e["when"], e["split"])  # noqa: E731
    for ours, theirs in zip(sorted(again, key=key), sorted(whole, key=key), strict=True):
        assert key(ours) == key(theirs)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)  # another processor rounds otherwise
    assert "train.strategy" not in (old_run / "config.toml").read_text()
    assert read_config(old_run / "config.toml").strategy.name == "scaffold"


def test_a_run_of_format_1_is_scored_and_reported(old_run, capsys):
    assert main(["eval", "--run", "run", "--method", "fedavg"]) == 0
    printed = capsys.readouterr().out
    last = [e for e in read_log(old_run / "fedavg-seed0" / "metrics.jsonl") if e["event"] == "evaluate"]
    scores = {e["client_id"]: e for e in last if (e["when"], e["split"]) == ("after_aggregation", "test")}
    assert "after round 2" in printed
    shown = [float(number) for number in re.findall(r"\b\d+\.\d{3}\b", printed)]
    for event in scores.values():  # another processor rounds otherwise
        assert any(number == pytest.approx(event["loss"], abs=2e-3) for number in shown)
    assert main(["report", "--run", "run"]) == 0
    assert (old_run / "report.html").stat().st_size > 10_000


def test_all_files_carry_their_format(tmp_path):
    config = tiny_config(tmp_path)
    write_config(config, tmp_path / "c.toml")
    assert f"format = {FORMAT}" in (tmp_path / "c.toml").read_text()
    files.save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {"method": "flex"})
    assert files.load_tensors(tmp_path / "a.safetensors")[1] == {"method": "flex"}
    assert events.JobStarted(format=events.FORMAT).to_json()["format"] == events.FORMAT


def test_a_later_format_is_refused_with_both_numbers(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(f"format = {FORMAT + 1}\n")
    with pytest.raises(FlexError, match=f"format {FORMAT + 1}; this version reads formats 1 to {FORMAT}"):
        read_config(path)
    state, later = tmp_path / "a.safetensors", files.FORMAT + 1
    save_file({"x": torch.zeros(1)}, state, metadata={"flex": json.dumps({"format": later})})
    assert load_file(state)
    with pytest.raises(FlexError, match=f"format {later}; this version reads formats 1 to {files.FORMAT}"):
        files.load_tensors(state)
    log, later = tmp_path / "metrics.jsonl", events.FORMAT + 1
    log.write_text(json.dumps({"event": "job", "method": "flex", "seed": 0, "format": later}) + "\n")
    with pytest.raises(FlexError, match=f"line 1: this log has format {later}; this version reads formats 1 to"):
        events.read_events(log)
