"""`flex train --dry-run`: what it tells is what a run then does, and it writes nothing."""

import re

import pytest
import torch
from rich.console import Console
from tiny import read_log, tiny_config

from flex.cli import main
from flex.commands import train as command
from flex.config import write_config
from flex.runs.forecast import forecast
from flex.runs.memory import available_bytes, peak_of
from flex.runs.run import prepared, run

METHODS = ("base", "local", "fedavg", "scaffold", "flex")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A configuration, its forecast, and the log of the run that follows."""
    folder = tmp_path_factory.mktemp("forecast")
    graft = {"criterion": "reconstruction", "refit": False, "target": "output"}
    config = tiny_config(folder, graft=graft, train={"methods": METHODS, "rounds": 1, "steps": 1, "batch_size": 3})
    there = sorted(folder.rglob("*"))
    config, _, world = prepared(config, Console(quiet=True))
    before = {name: p.clone() for name, p in world.base.model.state_dict().items()}
    made = forecast(config, world)
    after = world.base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sorted(folder.rglob("*")) == there
    run(config, Console(quiet=True))
    return config, made, read_log(folder / "run" / "metrics.jsonl")


def test_what_is_trained_and_sent_is_what_the_run_trains_and_sends(told):
    config, made, log = told
    assert [cost.method for cost in made.costs] == list(config.train.methods)
    for cost in made.costs:
        events = [event for event in log if event.get("method") == cost.method]
        (job,) = [event for event in events if event["event"] == "job"]
        if cost.method == "base":
            assert (cost.sent_bytes, cost.train_seconds, cost.step_bytes) == (0, 0, 0)
            continue
        assert job["trained_parameters"] == cost.trained
        (up,) = [event["tensors"] for event in events if event["event"] == "sent" and event["direction"] == "up"]
        assert (len(up), sum(tensor["bytes"] for tensor in up)) == (cost.tensors, cost.sent_bytes)
        assert cost.step_seconds > 0
        assert cost.step_bytes > 0
        assert (cost.choose_seconds > 0) == (cost.method == "flex")


def test_lengths_and_the_prompt_are_those_of_the_examples(told):
    config, made, _ = told
    assert {(row.client_id, row.part): row.count for row in made.lengths} == {
        (client, part): count for client in "ab" for part, count in (("train", 10), ("test", 6))
    }
    assert all(
        row.quantiles[0] <= row.quantiles[1] <= row.quantiles[2] <= config.data.max_length for row in made.lengths
    )
    assert "which is larger" in made.prompt
    assert "kg" in made.answer
    assert made.seconds == sum(cost.seconds for cost in made.costs)


def test_the_largest_batch_is_as_large_as_the_memory(told):
    config, made, _ = told
    for cost in made.costs[1:]:
        length = config.data.max_length
        fits = cost.fixed_bytes + cost.token_bytes * cost.fits * length
        assert fits <= made.available < fits + cost.token_bytes * length


def test_the_command_tells_and_writes_nothing(told, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "console", Console(width=80))
    config, _, _ = told
    write_config(config.with_values(train={"methods": ("fedavg",)}), tmp_path / "c.toml")
    output = tmp_path / "never"
    assert main(["train", str(tmp_path / "c.toml"), "--output", str(output), "--dry-run"]) == 0
    said = capsys.readouterr().out
    for words in ("tokens of an example", "which is larger", "what the methods train", "nothing was written"):
        assert words in said
    assert re.search(r"time: \d+ (s|min)", said)
    assert re.search(r"largest train.batch_size: about \d+ examples of data.max_length = 64 tokens", said)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "c.toml"]
    assert main(["train", str(tmp_path / "c.toml"), "--dry-run", "--set", "data.train=none.jsonl"]) == 2


def test_a_peak_counts_what_is_alive_at_once():
    x = torch.randn(1000)

    def work():
        y = x * 2  # 4 kB
        del y
        a, b = x + 1, x.view(10, 100)  # 4 kB; a view is nothing new
        return a + b.flatten()  # 4 kB more

    assert peak_of(work, [x], CPU) == 8000
    y = x.clone().requires_grad_(True)
    assert peak_of(lambda: (y.exp() * 2).sum().backward(), [x, y], CPU) >= 8000


def test_there_is_memory():
    assert 2**20 < available_bytes(CPU) < 2**50
