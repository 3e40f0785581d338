"""A run that goes on otherwise than planned: more rounds, clients that join and leave; and the round that it keeps."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from same_run import assert_same_run, plug_pulled, tensors
from tiny import read_log, records, save_data, tiny_config, write_records

from flex.cli import main
from flex.commands.saved import load_saved
from flex.config import RunConfig, read_config
from flex.errors import FlexError
from flex.federation import client as client_module
from flex.federation.client import rate
from flex.report import findings, read_events, summarise
from flex.runs.history import best_of
from flex.runs.run import run
from flex.store.events import AFTER, VALIDATION, Evaluated, Extended, JobStarted
from flex.store.files import rounds_in

QUIET = Console(quiet=True)
METHODS = ("base", "local", "fedavg", "flex")


def small(folder: Path, **sections: dict) -> RunConfig:
    """Three clients in the files; a run of two of them unless it is told otherwise."""
    if not (folder / "data").exists():
        config = tiny_config(folder)
        save_data(folder / "data", clients="abc")
    config = tiny_config(folder, train={"steps": 1, "batch_size": 2, "rounds": 2, "methods": METHODS})
    config = config.with_values(data={"clients": ("a", "b")}, evaluate={"rouge": False}, lora={"dropout": 0.0})
    return config.with_values(**sections)


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig]:
    folder = tmp_path_factory.mktemp("growth")
    config = small(folder)
    run(config, QUIET)
    return folder / "run", config


@pytest.fixture
def copied(two_rounds: tuple[Path, RunConfig], tmp_path: Path) -> tuple[Path, RunConfig]:
    folder, config = two_rounds
    shutil.copytree(folder, tmp_path / "run")
    return tmp_path / "run", dataclasses.replace(config, output=str(tmp_path / "run"))


def events_of(folder: Path, method: str = "flex") -> list[dict]:
    return read_log(folder / f"{method}-seed0" / "metrics.jsonl")


def test_more_rounds_go_on_from_the_stored_state(copied, two_rounds, monkeypatch) -> None:
    folder, config = copied
    rates = {}
    original = client_module.Site.optimizer

    def watched(self, round_index):
        optimizer = original(self, round_index)
        rates[self.model.method_name, round_index] = optimizer.param_groups[0]["lr"]
        return optimizer

    monkeypatch.setattr(client_module.Site, "optimizer", watched)
    before = {method: events_of(folder, method) for method in METHODS}
    longer = config.with_values(train={"rounds": 4})
    run(longer, QUIET)
    for method in ("local", "fedavg", "flex"):
        events = events_of(folder, method)
        without_end = [event for event in before[method] if event["event"] != "done"]
        assert events[: len(without_end)] == without_end
        extended = next(event for event in events if event["event"] == "extended")
        assert (extended["round"], extended["num_rounds"], extended["joined"], extended["left"]) == (2, 4, [], [])
        assert extended["started"]
        assert [e["round"] for e in events if e["event"] == "train"] == [1, 1, 2, 2, 3, 3, 4, 4]
        assert [e["round"] for e in events if e["event"] == "done"] == [4]
        assert {at for name, at in rates if name == method} == {3, 4}
        assert rates[method, 3] == pytest.approx(rate(config.train.learning_rate, longer, 3))
    assert events_of(folder, "base") == before["base"]
    said = " ".join(findings(summarise(read_events(folder))))
    assert "Local, FedAvg and FLEx went on after round 2, to 4 rounds (20" in said
    assert "not finished" not in said
    assert read_config(folder / "config.toml").train.rounds == 4
    assert load_saved(folder, "flex", None).round_index == 4


def test_an_extended_run_that_is_stopped_goes_on_to_the_same_bits(copied, tmp_path) -> None:
    folder, config = copied
    config = config.with_values(train={"rounds": 4, "methods": ("flex",)}, data={"clients": ("a", "b", "c")})
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    run(dataclasses.replace(config, output=str(whole)), QUIET)
    for stop_at in (3, 4):
        with plug_pulled(stop_at):
            run(config, QUIET)
    run(config, QUIET)
    assert_same_run(folder / "flex-seed0", whole / "flex-seed0")


def test_a_client_joins_and_another_leaves(copied, capsys) -> None:
    folder, config = copied
    joined = config.with_values(train={"rounds": 3}, data={"clients": ("a", "b", "c")})
    run(joined, Console(width=200))
    assert "note: client 'c' joins: it takes part from the next round on" in capsys.readouterr().out
    for method in ("local", "fedavg", "flex"):
        events = events_of(folder, method)
        assert [e["client_id"] for e in events if e["event"] == "train"] == [*"abab", *"abc"]
        assert next(e for e in events if e["event"] == "extended")["joined"] == ["c"]
        scored = [e for e in events if e["event"] == "evaluate" and (e["round"], e["split"]) == (3, "test")]
        assert {e["client_id"] for e in scored} == set("abc")
    assert {e["client_id"] for e in events_of(folder, "base") if e["event"] == "evaluate"} == set("abc")
    assert [e["client_id"] for e in events_of(folder) if e["event"] == "graft"] == [*"aabbcc"]
    assert load_saved(folder, "flex", None, with_data=False).sites.keys() == set("abc")
    summary = summarise(read_events(folder))
    assert all(row.finished for row in summary)
    assert ": client c joined; earlier rounds" in " ".join(findings(summary))
    assert (folder / "flex-seed0" / "clients" / "c").is_dir()

    kept = tensors(folder / "flex-seed0" / "clients" / "b")
    left = joined.with_values(train={"rounds": 4}, data={"clients": ("a", "c")})
    run(left, Console(width=200))
    assert "note: client 'b' has left: its files and its rounds stay as they are" in capsys.readouterr().out
    after = tensors(folder / "flex-seed0" / "clients" / "b")
    assert after.keys() == kept.keys()
    assert all(torch.equal(after[key], kept[key]) for key in kept)
    assert [e["client_id"] for e in events_of(folder) if e["event"] == "train" and e["round"] == 4] == ["a", "c"]
    assert "client b left" in " ".join(findings(summarise(read_events(folder))))
    assert main(["generate", "--run", str(folder), "--client", "b", "--prompt", "x", "--max-new-tokens", "2"]) == 0
    assert main(["eval", "--run", str(folder), "--client", "b"]) == 2
    assert main(["report", "--run", str(folder)]) == 0
    run(left.with_values(train={"rounds": 5}, data={"clients": ("a", "b", "c")}), QUIET)  # and comes back
    assert [e["client_id"] for e in events_of(folder) if e["event"] == "train" and e["round"] == 5] == ["a", "b", "c"]


def test_clients_that_are_added_to_the_file_join_without_being_named(tmp_path) -> None:
    config = small(tmp_path, train={"methods": ("fedavg",)}, data={"clients": ()})
    save_data(tmp_path / "data", clients="bc")
    run(config, QUIET)
    save_data(tmp_path / "data", clients="abc")
    assert main(["eval", "--run", config.output, "--method", "fedavg"]) == 0
    run(config.with_values(train={"rounds": 3}), QUIET)
    trained = [e["client_id"] for e in events_of(tmp_path / "run", "fedavg") if e["event"] == "train"]
    assert trained == [*"bcbc", *"abc"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"data": {"clients": ("a", "b", "c")}},
            "client 'c' joins, but local-seed0 has done its 2 rounds; expected more",
        ),
        ({"data": {"clients": ("a",)}}, "client 'b' leaves, but local-seed0 has done its 2 rounds; expected more"),
        ({"data": {"clients": ("b", "a")}, "train": {"rounds": 3}}, "clients in another order (a, b)"),
        ({"data": {"clients": ("c",)}, "train": {"rounds": 3}}, "holds a run of other clients (a, b)"),
        ({"train": {"rounds": 1}}, "other settings (train.rounds = 2 there, 1 here)"),
        ({"train": {"rounds": 3, "steps": 2}}, "other settings (train.steps = 1 there, 2 here)"),
        ({"train": {"rounds": 3}, "lora": {"rank": 3}}, "other settings (lora.rank = 2 there, 3 here)"),
    ],
)
def test_other_changes_are_refused_by_name_and_write_nothing(two_rounds, changes, sentence) -> None:
    folder, config = two_rounds
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    with pytest.raises(FlexError) as caught:
        run(config.with_values(**changes), QUIET)
    assert sentence in str(caught.value)
    assert {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} == before


def test_a_client_whose_data_changed_is_named(copied, tmp_path) -> None:
    _, config = copied
    other = write_records(tmp_path / "t.jsonl", [r for c in "abc" for r in records(c, 10, start=c == "b")])
    with pytest.raises(FlexError, match=r"holds a run on other data \(client 'b': a file has changed\)"):
        run(config.with_values(data={"train": str(other), "clients": ("a", "b", "c")}, train={"rounds": 3}), QUIET)


KEEP = {"keep": "best", "rounds": 6, "patience": 2, "methods": ("local", "fedavg", "flex")}


@pytest.fixture(scope="module")
def kept_best(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig]:
    """Trained at a rate that soon makes things worse, so that the best round is none of the last."""
    folder = tmp_path_factory.mktemp("keep")
    rates = {"learning_rate": 0.3, "graft_learning_rate": 0.3, "schedule": "constant"}
    config = small(folder, train={**KEEP, **rates}, data={"validation_fraction": 0.3})
    run(config, QUIET)
    return folder / "run", config


def validation(folder: Path, method: str) -> dict[int, float]:
    found: dict[int, list[float]] = {}
    for e in events_of(folder, method):
        if e["event"] == "evaluate" and e["split"] == "validation":
            found.setdefault(e["round"], []).append(e["loss"])
    return {at: sum(losses) / len(losses) for at, losses in found.items()}


@pytest.mark.parametrize("method", ["local", "fedavg", "flex"])
def test_the_best_round_is_kept_and_everybody_takes_it(kept_best, tmp_path, method) -> None:
    folder, _ = kept_best
    losses, done = validation(folder, method), events_of(folder, method)[-1]
    best = min(losses, key=losses.get)
    assert done["event"] == "done"
    assert done["kept"] == best
    assert done["stopped"] == (done["round"] < 6)
    assert done["round"] == min(6, best + 2)
    assert max(losses) == done["round"]
    job = folder / f"{method}-seed0"
    assert rounds_in(job / "server") == sorted({best, done["round"] - 1, done["round"]})
    saved = load_saved(folder, method, None)
    assert saved.round_index == best
    # The scores that the report shows are those of the files.
    scores = [e for e in events_of(folder, method) if e["event"] == "evaluate" and e["split"] == "test"]
    told = {e["client_id"]: e for e in scores if (e["round"], e["when"]) == (best, "after_aggregation")}
    for name, site in saved.sites.items():
        scored = next(e for e in site.evaluate(best, saved.shared) if e.split == "test")
        assert scored.loss == pytest.approx(told[name]["loss"], rel=1e-6)
    row = next(row for row in summarise(read_events(folder)) if row.method == method)
    assert row.jobs[0].last_round == best
    assert main(["export", "--run", str(folder), "--method", method, "--client", "a", "--to", str(tmp_path / "x")]) == 0
    assert f"the state after round {best}" in (tmp_path / "x" / "README.md").read_text().replace("\n", " ")


def test_the_report_says_which_round_is_kept(kept_best) -> None:
    folder, _ = kept_best
    said = " ".join(findings(summarise(read_events(folder))))
    assert "Kept is the round with the lowest validation loss: Local round" in said
    assert "where it was stopped" in said
    assert not any(m.split == "validation" for row in summarise(read_events(folder)) for m in row.after)


def test_what_is_kept_survives_being_stopped_to_the_same_bits(kept_best, tmp_path, monkeypatch) -> None:
    folder, config = kept_best
    last = events_of(folder)[-1]["round"]
    config = dataclasses.replace(config, output=str(tmp_path / "run")).with_values(train={"methods": ("flex",)})
    for stop_at in range(2, last + 1):
        with plug_pulled(stop_at):
            run(config, QUIET)
    evaluate = client_module.Site.evaluate

    def fails(self, round_index, shared, *rest, **more):  # while the round that is kept is scored, after the last one
        if self.client_id == "b" and "test" in more.get("splits", ()):
            raise RuntimeError("pulled the plug")
        return evaluate(self, round_index, shared, *rest, **more)

    monkeypatch.setattr(client_module.Site, "evaluate", fails)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run(config, QUIET)
    monkeypatch.setattr(client_module.Site, "evaluate", evaluate)
    run(config, QUIET)
    assert_same_run(tmp_path / "run" / "flex-seed0", folder / "flex-seed0")


def test_a_client_that_joins_begins_the_choice_anew(kept_best, tmp_path) -> None:
    """Rounds of other clients cannot be compared by their mean loss."""
    folder, config = kept_best
    shutil.copytree(folder, tmp_path / "run")
    done = events_of(folder, "fedavg")[-1]["round"]
    config = dataclasses.replace(config, output=str(tmp_path / "run"))
    config = config.with_values(train={"methods": ("fedavg",), "rounds": 8})
    run(config.with_values(data={"clients": ("a", "b", "c")}), QUIET)
    end = events_of(tmp_path / "run", "fedavg")[-1]
    assert done < end["kept"] <= 8
    assert load_saved(tmp_path / "run", "fedavg", None).round_index == end["kept"]


def test_a_job_that_stopped_for_want_of_improvement_stays_so_with_more_rounds(kept_best, tmp_path) -> None:
    folder, config = kept_best
    stopped = [m for m in KEEP["methods"] if events_of(folder, m)[-1]["stopped"]]
    assert stopped
    shutil.copytree(folder, tmp_path / "run")
    config = dataclasses.replace(config, output=str(tmp_path / "run"))
    run(config.with_values(train={"rounds": 9, "methods": tuple(stopped)}), QUIET)
    for method in stopped:
        assert events_of(tmp_path / "run", method) == events_of(folder, method)


def test_a_round_in_which_a_client_was_not_scored_is_not_the_best() -> None:
    def scores(at: int, **losses: float) -> list[Evaluated]:
        return [Evaluated(at, name, AFTER, VALIDATION, loss=loss) for name, loss in losses.items()]

    events = [JobStarted(6, 2, clients=["a", "b"]), *scores(1, a=3.0, b=3.0), *scores(2, a=1.0)]
    assert best_of(events, 2).round == 1
    events += [*scores(3, a=2.0, b=2.0), *scores(4, a=2.0, b=2.0)]
    assert (best_of(events, 4).round, best_of(events, 4).rounds_without_improvement) == (3, 1)
    events += [Extended(4, 9, 3, ["c"]), *scores(5, a=4.0, b=4.0, c=4.0)]
    assert [best_of(events, at).round for at in (4, 5)] == [None, 5]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["train.keep='best'"], "expected data.validation_fraction above 0"),
        (["train.patience=3"], 'train.patience is 3, which train.keep = "last" has no use for'),
        (["train.keep='first'"], "train.keep is 'first'; expected one of last, best"),
        (["train.patience=-1"], "train.patience is -1; expected 0 (never stops early) or more"),
        (["data.validation_fraction=1"], "data.validation_fraction is 1.0; expected a number from 0 to below 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused_at_once(overrides, sentence) -> None:
    with pytest.raises(FlexError) as caught:
        read_config(None, overrides)
    assert sentence in str(caught.value)
