"""The numbers under the report: means and spreads over seeds, what counts twice or not at all, how sizes are said."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from synthetic_run import CLIENTS, DEMO, Event, scored, summarised, synthetic_events, write_run

from flex.errors import FlexError
from flex.report.numbers import Measure, best_methods, format_bytes, format_count, little_used
from flex.report.terminal import read_events
from flex.store.events import AFTER, BEFORE

TEST = Measure("test", "", "exact_match")
GROUP = Measure("test", "own conventions", "exact_match")


@pytest.fixture(scope="module")
def small() -> list[Event]:
    return synthetic_events()


def test_means_and_spreads() -> None:
    demo = synthetic_events(**DEMO)
    rows = {row.method: row for row in summarised(demo)}
    last = [e for e in demo if e["event"] == "evaluate" and e["method"] == "flex" and e["split"] == "test"]
    for when in (AFTER, BEFORE):
        by_seed = {}
        for seed in (0, 1):
            values = [e["exact_match"] for e in last if e["when"] == when and e["seed"] == seed]
            by_seed[seed] = sum(values) / len(CLIENTS)
        stat = rows["flex"].scores[when][TEST]
        assert stat.values == pytest.approx(by_seed)
        assert stat.mean == pytest.approx((by_seed[0] + by_seed[1]) / 2)
        assert stat.spread == pytest.approx(abs(by_seed[0] - by_seed[1]) / 2**0.5)
        assert stat.num_examples == 150 * len(CLIENTS)
    assert rows["flex"].after[GROUP].num_examples == 105 * len(CLIENTS)
    assert rows["flex"].bytes_per_round == {"up": 16 * 4096 * 5, "down": 16 * 4096 * 5}
    assert rows["flex"].trained_parameters == {"shared": 32768, "personal": 147972}
    assert rows["local"].bytes_per_round == {"up": 0, "down": 0}
    assert rows["base"].bytes_per_round is None
    assert rows["base"].grafts == []
    assert rows["flex"].grafts == []
    assert len(rows["flex-paper"].grafts) == 2 * 4 * len(CLIENTS)
    assert sum(map(little_used, rows["flex-paper"].grafts)) == 2 * 2 * len(CLIENTS)


def test_a_round_that_was_evaluated_by_halves_does_not_count(small: list[Event]) -> None:
    extra = next(e for e in small if e["event"] == "evaluate" and e["method"] == "flex" and e["when"] == AFTER)
    row = summarised([*small, {**extra, "round": 4, "exact_match": 0.0}])[3]
    assert (row.jobs[0].last_round, row.jobs[0].info.num_rounds) == (3, 3)


def test_the_last_of_two_equal_events_counts() -> None:
    assert summarised(scored("flex", [0.1]) + scored("flex", [0.4]))[0].after[TEST].mean == pytest.approx(0.4)


def test_a_flex_that_was_configured_otherwise_is_described_as_it_was(small: list[Event]) -> None:
    about = {row.method: row.about for row in summarised(small)}
    assert about["flex"].endswith("fitted to what the loss asks for")
    paper = [{**e, "method": "flex"} for e in small if e.get("method") == "flex-paper"]
    expected = "averaged LoRA + a private module, chosen by “reconstruction” for the output, not refitted"
    assert summarised(paper)[0].about == expected


def test_reading_a_run(tmp_path: Path) -> None:
    with pytest.raises(FlexError, match="expected the folder of a run"):
        read_events(tmp_path / "nowhere")
    write_run(tmp_path / "flex-seed0", scored("flex", [0.5]))
    write_run(tmp_path / "local-seed0", scored("local", [0.4]))
    assert {event.method for event in read_events(tmp_path)} == {"flex", "local"}
    whole = write_run(tmp_path, scored("base", [0.1]))
    with (whole / "metrics.jsonl").open("a") as file:
        file.write('{"event": "eval')  # killed while writing
    assert [event.method for event in read_events(tmp_path)] == ["base"]


def test_best_is_what_prints_best() -> None:
    """Of scores 30.01 and 29.99 % both print as 30.0; a loss is best where it is lowest; diverged is never best."""
    events = scored("base", [0.3001], loss=2.0) + scored("fedavg", [0.2999], loss=1.0) + scored("flex", [0.2], loss=3.0)
    rows = summarised(events)
    assert best_methods(rows, TEST) == {"base", "fedavg"}
    assert best_methods(rows, Measure("test", "", "loss")) == {"fedavg"}
    diverged = summarised(scored("base", [math.nan]) + scored("flex", [0.1]))
    assert best_methods(diverged, TEST) == {"flex"}
    assert best_methods(rows, GROUP) == set()


def test_methods_that_the_table_does_not_know_stand_after_the_averaged_one() -> None:
    rows = summarised(scored("flex", [0.5]) + scored("zeta", [0.5]) + scored("alpha", [0.5]) + scored("fedavg", [0.5]))
    assert [row.label for row in rows] == ["FedAvg", "alpha", "zeta", "FLEx"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (65536, "65.5 kB"), (999_999, "1.00 MB"), (3e8, "300 MB")],
)
def test_sizes_have_three_digits(count: float, text: str) -> None:
    assert format_bytes(count) == text
    assert format_bytes(None) == "–"
    assert format_count(147_972) == "148 k"
