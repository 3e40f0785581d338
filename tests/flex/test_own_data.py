"""docs/your-data.md as a stranger follows it: its commands, on a tiny model, in an empty folder."""

import csv
import re
from pathlib import Path

import pytest
from rich.console import Console
from tiny import read_log, records, save_model, write_records

from flex.cli import main
from flex.commands import train as command

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = re.findall(r"^flex train .*$", (ROOT / "docs" / "your-data.md").read_text(), re.MULTILINE)
SMALL = ["data.max_length=128", "lora.rank=4", "train.rounds=1", "train.steps=1", "train.batch_size=2", "threads=1"]
SMALL += ["evaluate.max_new_tokens=4", "graft.calibration_sequences=4"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the page's commands name: the configuration, a model, and files in three forms."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "console", Console(width=120))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    save_model(tmp_path / "MODEL")
    north, south = records("a", 8), records("b", 8, start=8)
    write_records(tmp_path / "north.jsonl", north)
    write_records(tmp_path / "south.jsonl", south)
    write_records(
        tmp_path / "all.jsonl",
        [{**row, "hospital": name} for name, rows in (("n", north), ("s", south)) for row in rows],
    )
    with (tmp_path / "all.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["question", "answer", "site"])
        rows.writerows([row["instruction"], row["response"], row["client"]] for row in (*north, *south))
    for name, own in (("a", north), ("b", south)):
        turns = [
            [("user", row["instruction"]), ("assistant", row["response"]), ("user", "which ?"), ("assistant", "kg")]
            for row in own
        ]
        said = [{"dialogue": [{"role": role, "content": text} for role, text in each]} for each in turns]
        write_records(tmp_path / f"{name}.jsonl", said)
    return tmp_path


def options(*settings):
    return [word for setting in settings for word in ("--set", setting)]


def test_the_page_has_commands():
    assert len(COMMANDS) == 4


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_page_tells_before_it_trains(folder, capsys, line):
    words = [word for word in line.split()[1:] if word != "--dry-run"]
    assert main([*words, *options(*SMALL), "--methods", "fedavg", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "nothing was written" in said
    assert 'note: data.template = "auto" stands for "chat"' in said
    assert not (folder / "runs").exists()


def test_conversations_of_two_sites_train_to_a_report(folder, capsys):
    line = COMMANDS[-1].split()[1:]
    assert main([*line, *options(*SMALL), "--methods", "flex", "--output", "run"]) == 0
    assert (folder / "run" / "report.html").exists()
    log = read_log(folder / "run" / "metrics.jsonl")
    assert {event["client_id"] for event in log if event["event"] == "evaluate"} == {"a", "b"}
    # The same again is done; the files moved are the same data, another file at a site is not.
    assert main([*line, *options(*SMALL), "--methods", "flex", "--output", "run"]) == 0
    (folder / "a.jsonl").rename(folder / "c.jsonl")
    moved = [word.replace("a=a.jsonl", "a=c.jsonl") for word in line]
    assert main([*moved, *options(*SMALL), "--methods", "flex", "--output", "run"]) == 0
    capsys.readouterr()
    turned = [word.replace("a=a.jsonl", "a=b.jsonl").replace("b=b.jsonl", "b=c.jsonl") for word in line]
    assert main([*turned, *options(*SMALL), "--methods", "flex", "--output", "run"]) == 2
    assert "holds a run on other data" in capsys.readouterr().err
