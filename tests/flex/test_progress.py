"""What a person sees of a run that goes on: a line a round, a bar on a terminal, curves in TensorBoard."""

import dataclasses
import io
import re
import sys

import pytest
from rich.console import Console
from same_run import plug_pulled
from tiny import read_log, tiny_config

from flex.errors import FlexError
from flex.runs.progress import duration, job_lines
from flex.runs.run import run
from flex.store.events import Trained

LINE = re.compile(r"fedavg seed 0: round (\d)/(\d), loss ([\d.]+), ([\d.]+ s), ([\d.]+ s) left")


def small(folder, **train):
    train = {"rounds": 3, "steps": 1, "batch_size": 2, "methods": ("base", "fedavg"), **train}
    return tiny_config(folder, train=train, evaluate={"rouge": False})


def told(folder, config, **console):
    out = io.StringIO()
    run(config, Console(file=out, width=200, **console))
    return out.getvalue()


def losses(folder, method="fedavg"):
    by_round = {}
    for event in read_log(folder / f"{method}-seed0" / "metrics.jsonl"):
        if event["event"] == "train":
            by_round.setdefault(event["round"], []).append(event["loss"])
    return {at: sum(values) / len(values) for at, values in by_round.items()}


def test_without_a_terminal_a_round_is_one_line_with_loss_seconds_and_time_left(tmp_path):
    text = told(tmp_path, small(tmp_path))
    lines = [match for line in text.splitlines() if (match := LINE.fullmatch(line))]
    assert [(m[1], m[2]) for m in lines] == [("1", "3"), ("2", "3"), ("3", "3")]
    for m in lines:
        assert float(m[3]) == pytest.approx(losses(tmp_path / "run")[int(m[1])], rel=1e-3)
    assert lines[-1][5] == "0.0 s"
    assert re.search(r"^base seed 0: done, exact match 0\.\d{3}$", text, re.MULTILINE)
    assert re.search(r"^fedavg seed 0: done, exact match 0\.\d{3}$", text, re.MULTILINE)
    assert "\x1b" not in text
    assert "━" not in text
    again = told(tmp_path, small(tmp_path))
    assert "base seed 0: done before\nfedavg seed 0: done before\n" in again


def test_a_run_that_goes_on_prints_the_rounds_that_are_left(tmp_path):
    with plug_pulled(2):
        told(tmp_path, small(tmp_path))
    text = told(tmp_path, small(tmp_path))
    assert [m[1] for line in text.splitlines() if (m := LINE.fullmatch(line))] == ["2", "3"]


def test_on_a_terminal_there_is_a_bar(tmp_path):
    config = small(tmp_path, methods=("fedavg",))
    out = io.StringIO()
    run(config, Console(file=out, width=80, force_terminal=True, color_system=None, legacy_windows=False))
    text = out.getvalue()
    assert "━" in text
    assert re.search(r"6/6 +0:00:0\d done, exact match", text)
    assert "round 1/3" not in text


def test_the_bar_shows_the_mean_loss_of_what_it_hears_and_the_time_left():
    out = io.StringIO()
    with job_lines(Console(file=out, width=80, force_terminal=True, color_system=None)) as line:
        tell = line("flex seed 0")
        tell(total=8, completed=4, rounds=4)
        tell(events=[Trained(3, "a", loss=1.0), Trained(3, "b", loss=2.0)])
        tell(advance=1, what="a done")
    assert re.search(r"5/8 +[-:\d]+ loss 1\.5, a done", out.getvalue())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (4.21, "4.2 s"), (9.97, "10 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (7800, "2 h 10 min")],
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


def curves(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_jobs_in_processes_of_their_own_print_their_rounds_and_draw_their_curves_too(tmp_path):
    pytest.importorskip("tensorboard")
    config = small(tmp_path, methods=("fedavg", "local"), track="tensorboard")
    text = told(tmp_path, dataclasses.replace(config, workers=2))
    assert len([line for line in text.splitlines() if LINE.fullmatch(line)]) == 3
    assert text.count("local seed 0: round ") == 3
    for method in ("fedavg", "local"):
        found = curves(tmp_path / "run" / "tensorboard" / f"{method}-seed0")
        assert dict(found["train loss/mean"]) == pytest.approx(losses(tmp_path / "run", method), rel=1e-6)


def test_tensorboard_gets_what_the_log_says(tmp_path):
    pytest.importorskip("tensorboard")
    config = small(tmp_path, methods=("fedavg", "flex"), track="tensorboard")
    with plug_pulled(3):  # and resumed: one curve without a gap or a double
        told(tmp_path, config)
    told(tmp_path, config)
    for method in ("fedavg", "flex"):
        found = curves(tmp_path / "run" / "tensorboard" / f"{method}-seed0")
        wanted = losses(tmp_path / "run", method)
        assert [at for at, _ in found["train loss/mean"]] == [1, 2, 3]
        assert dict(found["train loss/mean"]) == pytest.approx(wanted, rel=1e-6)
        assert {"train loss/a", "train loss/b", "test loss/mean", "general exact_match/b"} <= found.keys()
        assert ("gate opening/mean" in found) == (method == "flex")


def test_nothing_is_tracked_unless_asked(tmp_path):
    told(tmp_path, small(tmp_path, rounds=1, methods=("fedavg",)))
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_tensorboard_that_is_not_installed_is_said_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(FlexError, match=r'train\.track is "tensorboard", which is not installed'):
        told(tmp_path, small(tmp_path, track="tensorboard"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(FlexError, match='expected one of "", tensorboard'):
        small(tmp_path, track="wandb")
