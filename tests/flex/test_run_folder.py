"""Which run a folder takes: the same one again, wherever its files lie, or anew where nothing came of the last."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from tiny import tiny_config

from flex.config import read_config, write_config
from flex.errors import FlexError
from flex.runs.run import run

QUIET = Console(quiet=True)


def test_a_run_that_came_to_nothing_takes_other_settings(tmp_path):
    config = tiny_config(tmp_path, train={"rounds": 1, "steps": 1, "batch_size": 2, "methods": ("fedavg",)})
    config = config.with_values(evaluate={"rouge": False})
    with pytest.raises(FlexError, match="clients_per_round is 9"):
        run(config.with_values(train={"clients_per_round": 9}), QUIET)
    assert not (tmp_path / "run").exists()
    run(config, QUIET)


def test_resuming_wants_the_same_data_and_base_wherever_they_lie(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, train={"rounds": 1, "steps": 1, "batch_size": 2, "methods": ("fedavg",)})
    config = config.with_values(evaluate={"rouge": False})
    run(config, QUIET)
    moved = tmp_path / "moved.jsonl"
    moved.write_text(Path(config.data.train).read_text())
    monkeypatch.chdir(tmp_path)
    run(config.with_values(data={"train": "moved.jsonl"}, evaluate={"batch_size": 3}), QUIET)
    assert read_config(tmp_path / "run" / "config.toml").data.train == str(moved)
    moved.write_text("".join(reversed(moved.read_text().splitlines(keepends=True))))
    with pytest.raises(FlexError, match="holds a run on other data"):
        run(config.with_values(data={"train": str(moved)}), QUIET)


def test_methods_of_earlier_calls_stay_in_the_runs_file(tmp_path):
    config = tiny_config(tmp_path, train={"rounds": 1, "steps": 1, "batch_size": 2, "methods": ("fedavg",)})
    config = config.with_values(evaluate={"rouge": False})
    run(config, QUIET)
    run(config.with_values(train={"methods": ("base",)}), QUIET)
    assert read_config(tmp_path / "run" / "config.toml").train.methods == ("fedavg", "base")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for the processes in /proc")
def test_nobody_is_at_work_any_more_once_the_run_is_killed(tmp_path):
    config = dataclasses.replace(tiny_config(tmp_path, train={"rounds": 1000}), workers=2)
    write_config(config, tmp_path / "c.toml")
    command = [sys.executable, "-m", "flex.cli", "train", str(tmp_path / "c.toml")]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("run/*/metrics.jsonl")) and time.monotonic() < deadline and started.poll() is None:
        time.sleep(0.01)
    workers = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    assert len(workers) >= 2
    started.kill()
    started.wait(30)

    def at_work() -> list[str]:
        left = [stat.read_text() for pid in workers if (stat := Path(f"/proc/{pid}/stat")).exists()]
        return [line for line in left if line.rpartition(") ")[2][0] != "Z"]

    deadline = time.monotonic() + 30
    while at_work() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not at_work()
