"""One exchange a round: the scores of a round come with the turns of the next one, and are those of an exchange of
their own."""

import dataclasses
import random
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from same_run import assert_same_run, plug_pulled, without_times
from tiny import read_log, save_data, tiny_config
from toy import CLIENTS, START, RelayGrid, assert_same_bits, make_toy_app, strategy_of

from flex.errors import FlexError
from flex.federation import client as client_module
from flex.federation import local
from flex.federation.flower import FlowerFedAvg
from flex.federation.messages import SPLITS
from flex.federation.rounds import run_rounds
from flex.federation.scoring import Scoring
from flex.runs.run import run
from flex.store.events import AFTER, EventLog

QUIET = Console(quiet=True)


class Counting(RelayGrid):
    """Keeps what is sent, exchange by exchange: (kind, round, how many messages, how many of them ask for scores)."""

    def __init__(self, folder: Path, **toy):
        folder.mkdir(exist_ok=True)
        super().__init__(local.InProcessGrid(make_toy_app(folder, scores=True, **toy), CLIENTS), seed=1)
        self.exchanges: list[tuple[str, int, int, int]] = []

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        config = messages[0].content.config_records.get("config", {})
        asking = sum(SPLITS in message.content.config_records.get("config", {}) for message in messages)
        kind = messages[0].metadata.message_type
        self.exchanges.append((kind, config.get("server-round", 0), len(messages), asking))
        return super().send_and_receive(messages, timeout=timeout)


def play(folder: Path, strategy, rounds: int = 4, toy: dict | None = None, **options):
    """(shared state, scores by round and client, exchanges but for the first, who is who)"""
    grid, scores = Counting(folder, **(toy or {})), {}

    def take(report) -> None:
        for event in (event for turn in report.evaluate for event in turn.events):
            assert (event.round, event.when) == (report.round_index, AFTER)
            assert (event.round, event.client_id) not in scores
            scores[event.round, event.client_id] = event.loss

    options = {"on_round": lambda _, __, report: take(report), "on_scores": take, **options}
    return run_rounds(strategy, grid, START, rounds, **options), scores, grid.exchanges[1:]


def apart(monkeypatch) -> None:
    """From here on nobody is asked for scores in its turn: every evaluated round has an exchange of its own."""
    monkeypatch.setattr(Scoring, "asked_with", lambda self, messages: list(messages))


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "fedadam"])
def test_a_round_is_one_exchange(name, tmp_path, monkeypatch):
    came, scores, exchanges = play(tmp_path / "a", strategy_of(name))
    asked = [("train", 1, 4, 0), ("train", 2, 4, 4), ("train", 3, 4, 4), ("train", 4, 4, 4), ("evaluate", 4, 4, 0)]
    assert exchanges == asked
    assert scores.keys() == {(at, name) for at in (1, 2, 3, 4) for name in CLIENTS}
    apart(monkeypatch)
    other, known, exchanges = play(tmp_path / "b", strategy_of(name))
    assert [kind for kind, *_ in exchanges] == ["train", *["train", "evaluate"] * 3, "evaluate"]
    assert_same_bits(came, other)
    assert scores == known


def test_every_second_round_is_scored_in_the_turn_after_it(tmp_path):
    _, scores, exchanges = play(tmp_path, strategy_of("fedavg"), rounds=5, evaluate_every=2)
    assert [asking for *_, asking in exchanges] == [0, 0, 4, 0, 4, 0]
    assert {at for at, _ in scores} == {2, 4, 5}


def test_who_does_not_train_next_is_asked_apart(tmp_path, monkeypatch):
    came, scores, exchanges = play(tmp_path / "a", strategy_of("fedavg", clients_per_round=3))
    after_first = [("train", 2, 3, 3), ("evaluate", 1, 1, 0)]
    assert exchanges[1:3] == after_first
    assert len(scores) == 16
    apart(monkeypatch)
    other, known, _ = play(tmp_path / "b", strategy_of("fedavg", clients_per_round=3))
    assert_same_bits(came, other)
    assert scores == known


def test_a_strategy_that_draws_its_clients_says_in_its_messages_who_it_is(tmp_path):
    random.seed(4)
    strategy = FlowerFedAvg(fraction_train=0.5, fraction_evaluate=0.75)
    _, scores, exchanges = play(tmp_path, strategy, rounds=6)
    assert [sum(at == e[1] for e in exchanges if e[0] == "train") for at in range(1, 7)] == [1] * 6
    of_round = [[name for at, name in scores if at == index] for index in range(1, 7)]
    assert [len(names) for names in of_round] == [3] * 6
    asked_in_turns = sum(asking for *_, asking in exchanges)
    assert 0 < asked_in_turns < 10  # of 5 rounds with two that train: some of them are evaluated, drawn anew each time


def test_a_client_whose_turn_fails_is_scored_all_the_same(tmp_path):
    toy = {"fail": "ben", "error": FlexError("no"), "fail_from": 2}
    left_out = []
    _, _, exchanges = play(
        tmp_path,
        strategy_of("fedavg"),
        rounds=3,
        toy=toy,
        skip_failed=True,
        on_scores=lambda report: left_out.append((len(report.evaluate), report.left_out)),
    )
    assert exchanges[1:3] == [("train", 2, 4, 4), ("evaluate", 1, 1, 0)]
    assert left_out == [(4, []), (4, [])]


def test_one_that_cannot_be_scored_does_not_end_a_run_that_goes_on_without_it(tmp_path):
    reports, grid = [], Counting(tmp_path)
    nodes = dict(zip(CLIENTS, grid.get_node_ids(), strict=True))

    def then_one_dies(round_index, shared, report):
        grid.dead = nodes["cleo"]

    run_rounds(
        strategy_of("fedavg"), grid, START, 2, skip_failed=True, on_round=then_one_dies, on_scores=reports.append
    )
    assert [turn.client_id for turn in reports[0].evaluate] == ["anna", "ben", "dora"]
    assert [(e.client_id, e.round, e.doing) for e in reports[0].left_out] == [("cleo", 1, "evaluate")]


def test_a_run_that_ends_early_still_asks_for_its_scores(tmp_path):
    scored = []
    _, _, exchanges = play(
        tmp_path,
        strategy_of("fedavg"),
        on_round=lambda at, *_: at == 2,
        on_scores=lambda report: scored.append((report.round_index, len(report.evaluate))),
    )
    assert scored == [(1, 4), (2, 4)]
    assert exchanges[-1] == ("evaluate", 2, 4, 0)


def test_what_decides_something_is_asked_for_in_the_round_itself(tmp_path):
    _, _, exchanges = play(tmp_path, strategy_of("fedavg"), rounds=2, validate=True)
    assert [(kind, at) for kind, at, *_ in exchanges] == [("train", 1), ("evaluate", 1), ("train", 2), ("evaluate", 2)]


METHODS = ("local", "flex", "scaffold", "flexlora")


def small(folder: Path, **sections):
    if not (folder / "data").exists():
        tiny_config(folder)
        save_data(folder / "data", "abc")
    sections = {"evaluate": {"every": 1, "rouge": False}, **sections}
    sections["train"] = {"rounds": 3, "steps": 1, "methods": ("flex",), **sections.get("train", {})}
    return tiny_config(folder, **sections)


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"methods": METHODS}, "strategy": {"ranks": (1, 2)}},
        {"train": {"clients_per_round": 1}, "evaluate": {"every": 1, "rouge": False, "clients": 2}},
        {"train": {"rounds": 4}, "evaluate": {"every": 2, "rouge": False}, "graft": {"after_rounds": 2}},
    ],
)
def test_the_log_is_that_of_separate_exchanges(sections, tmp_path, monkeypatch):
    config = small(tmp_path, **sections)
    run(config, QUIET)
    with monkeypatch.context() as patch:
        apart(patch)
        run(dataclasses.replace(config, output=str(tmp_path / "apart")), QUIET)
    assert_same_run(tmp_path / "run", tmp_path / "apart")
    for method in config.train.methods:
        events = read_log(tmp_path / "run" / f"{method}-seed0" / "metrics.jsonl")
        rounds = [e["round"] for e in events if e["event"] in ("train", "evaluate")]
        assert rounds == sorted(rounds)


def test_a_run_under_masks_is_scored_in_its_turns(tmp_path, monkeypatch):
    config = small(tmp_path, train={"methods": ("fedavg",)}, strategy={"secure": True})
    run(config, QUIET)
    apart(monkeypatch)
    run(dataclasses.replace(config, output=str(tmp_path / "apart")), QUIET)
    one, other = (read_log(tmp_path / folder / "fedavg-seed0" / "metrics.jsonl") for folder in ("run", "apart"))
    assert len(one) == len(other)
    for event, same in zip(without_times(one), without_times(other), strict=True):
        assert event.pop("sha256", "") != same.pop("sha256", "") or event["event"] != "train"  # keys are drawn anew
        assert event == same


@pytest.mark.parametrize("clients_per_round", [0, 1])
def test_a_run_that_is_stopped_anywhere_goes_on_to_the_same_log(clients_per_round, tmp_path, monkeypatch):
    """The server dies after its n-th event, for many n: between turns, scores and checkpoints."""
    config = small(tmp_path, train={"methods": ("fedavg",), "clients_per_round": clients_per_round})
    whole = run(config, QUIET) / "fedavg-seed0"
    lines = len(read_log(whole / "metrics.jsonl"))
    assert lines > 30
    broken = dataclasses.replace(config, output=str(tmp_path / "broken"))
    original = EventLog.write
    for number in range(4, lines, 6):
        left = [number]

        def write(log, event, left=left):
            if not left[0]:
                raise RuntimeError("killed")
            left[0] -= 1
            original(log, event)

        with monkeypatch.context() as patch:
            patch.setattr(EventLog, "write", write)
            with pytest.raises(RuntimeError, match="killed"):
                run(broken, QUIET)
        run(broken, QUIET)
        assert_same_run(tmp_path / "broken" / "fedavg-seed0", whole)
        shutil.rmtree(tmp_path / "broken")


def test_stopped_between_two_turns_that_score(tmp_path):
    config = small(tmp_path, train={"methods": ("flex", "scaffold")})
    whole = run(config, QUIET)
    broken = dataclasses.replace(config, output=str(tmp_path / "broken"))
    for round_index in (2, 3):
        with plug_pulled(round_index):
            run(broken, QUIET)
    run(broken, QUIET)
    for job in ("flex-seed0", "scaffold-seed0"):
        assert_same_run(tmp_path / "broken" / job, whole / job)


def after(folder: Path, method: str = "fedavg") -> list[tuple[int, str]]:
    events = read_log(folder / f"{method}-seed0" / "metrics.jsonl")
    return [(e["round"], e["client_id"]) for e in events if e.get("when") == AFTER and e["split"] == "test"]


def test_who_joins_a_stopped_run_is_not_scored_of_the_round_before(tmp_path):
    config = small(tmp_path, train={"methods": ("fedavg",)}, data={"clients": ("a", "b")})
    with plug_pulled(2):
        run(config, QUIET)
    assert after(tmp_path / "run") == []  # those of round 1 come with round 2
    run(config.with_values(data={"clients": ("a", "b", "c")}), QUIET)
    assert after(tmp_path / "run") == [(1, "a"), (1, "b"), *[(at, name) for at in (2, 3) for name in "abc"]]


def test_a_last_round_that_gets_a_successor_keeps_its_scores(tmp_path):
    config = small(tmp_path, train={"methods": ("fedavg",)})
    run(config, QUIET)
    longer = config.with_values(train={"rounds": 5}, data={"clients": ("a", "c")})
    before = without_times(read_log(tmp_path / "run" / "fedavg-seed0" / "metrics.jsonl"))[:-1]
    with plug_pulled(4, "c"):
        run(longer, QUIET)
    run(longer, QUIET)
    events = without_times(read_log(tmp_path / "run" / "fedavg-seed0" / "metrics.jsonl"))
    assert events[: len(before)] == before
    assert after(tmp_path / "run")[9:] == [(at, name) for at in (4, 5) for name in "ac"]


def test_scores_are_taken_before_the_turn(tmp_path, monkeypatch):
    seen = []
    evaluate, train = client_module.Site.evaluate, client_module.Site.train

    def scored(site, at, shared, when=AFTER, **more):
        if when == AFTER:
            seen.append(("score", site.client_id, at))
        return evaluate(site, at, shared, when, **more)

    def trained(site, at, *rest, **more):
        seen.append(("train", site.client_id, at))
        return train(site, at, *rest, **more)

    monkeypatch.setattr(client_module.Site, "evaluate", scored)
    monkeypatch.setattr(client_module.Site, "train", trained)
    run(small(tmp_path, train={"rounds": 2}, data={"clients": ("a", "b")}), QUIET)
    turns = [("train", "a", 1), ("train", "b", 1), ("score", "a", 1), ("train", "a", 2)]
    assert seen == [*turns, ("score", "b", 1), ("train", "b", 2), ("score", "a", 2), ("score", "b", 2)]
