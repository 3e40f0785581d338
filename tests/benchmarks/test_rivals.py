"""The study of the rivals: its configurations are runs, and its page says what the numbers say."""

import json
from pathlib import Path

import pytest
from rich.console import Console
from synthetic_run import scored, write_run

from benchmarks import rivals
from flex.methods import METHODS


def test_the_demo_is_configured_with_every_method_or_some(tmp_path: Path) -> None:
    config = rivals.configure("demo", tmp_path, None, None, (31,))
    assert config.train.methods == tuple(METHODS)
    assert Path(config.data.for_seed(31).train).exists()
    assert Path(config.data.for_seed(rivals.TUNED_ON["demo"]).train).exists()
    assert Path(config.anchor.text.replace("{seed}", "31")).exists()
    some = rivals.configure("demo", tmp_path, None, None, (31,), ("base", "flex"))
    assert some.train.methods == ("base", "flex")
    with pytest.raises(SystemExit, match="dolly needs --base"):
        rivals.configure("dolly", tmp_path, None, None, (0,))


def test_seeds_that_tuned_are_no_ones(tmp_path: Path) -> None:
    for setting, seeds in rivals.SEEDS.items():
        assert rivals.TUNED_ON[setting] not in seeds


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(rivals, "RESULTS", tmp_path / "results")
    path = tmp_path / "page.md"
    parts = [f"<!-- made by benchmarks.rivals, {name}: begin -->\nold {name}\n{rivals.END}\n" for name in rivals.SEEDS]
    path.write_text("before\n" + "between\n".join(parts) + "after\n")
    return path


def test_the_page_has_a_line_for_each_method_the_best_first(tmp_path: Path, page: Path) -> None:
    events = scored("ditto", [0.3] * 6) + scored("flex", [0.6 + 0.01 * i for i in range(6)])
    write_run(tmp_path / "out" / "demo" / "run", events)
    rivals.write_page(page, tmp_path / "out")
    text = page.read_text()
    assert text.startswith("before")
    assert text.endswith("old dolly\n<!-- end -->\nafter\n")
    assert "old demo" not in text
    assert "| Ditto | 30.0 ± 0.0 | +32.5 ± 1.9 [+30.0, +35.0] | 0.031 | 6 of 6 |  |  |" in text
    assert text.index("| FLEx |") < text.index("| Ditto |")
    assert "- **test EM %**: FLEx 62.5 ± 1.9; ahead of Ditto (+32.5 ± 1.9)." in text
    assert (tmp_path / "pictures" / "rivals-demo.svg").read_text().count("Ditto") == 1


def test_the_page_names_who_is_level_and_who_is_ahead(tmp_path: Path, page: Path) -> None:
    events = scored("flex", [0.5 + 0.01 * i for i in range(8)]) + scored("ditto", [0.9] * 8)
    events += scored("fedavg", [0.5 + 0.01 * i + 0.02 * (-1) ** i for i in range(8)])
    write_run(tmp_path / "out" / "demo" / "run", events)
    rivals.write_page(page, tmp_path / "out")
    assert "; behind Ditto (−36.5 ± 2.4); not told apart from FedAvg (+0.0 ± 2.1)." in page.read_text()


def test_the_page_on_privacy_sets_the_update_beside_the_client(tmp_path: Path) -> None:
    def at(when: str, method: str, values: dict[str, float]) -> list[dict]:
        events = scored(method, [0.5, 0.5])
        return [
            {**event, "when": when, "groups": {g: {"exact_match": v, "num_examples": 9} for g, v in values.items()}}
            for event in events
        ]

    own, skill = rivals.OWN_CONVENTIONS, rivals.SHARED_SKILL
    events = at("base_alone", "flex", {own: 0.05, skill: 0.0}) + at("update_alone", "flex", {own: 0.06, skill: 0.4})
    events += at("before_aggregation", "flex", {own: 0.5, skill: 0.9}) + scored("local", [0.5, 0.5])
    write_run(tmp_path / "out" / "demo" / "run", events)
    lines = rivals.given_away(tmp_path / "out" / "demo" / "run")
    assert (
        lines[0]
        == "|  | "
        + " | ".join(f"{group}: {who}" for group in (own, skill) for who in ("update alone", "the client itself"))
        + " | seeds |"
    )
    assert lines[2] == "| the base as it came | 5.0 ± 0.0 | – | 0.0 ± 0.0 | – | 2 |"
    assert lines[3] == "| FLEx | 6.0 ± 0.0 | 50.0 ± 0.0 | 40.0 ± 0.0 | 90.0 ± 0.0 | 2 |"
    assert len(lines) == 5  # who sends nothing has no line


def test_every_clients_scores_are_kept(tmp_path: Path, page: Path) -> None:
    write_run(tmp_path / "out" / "demo" / "run", scored("flex", [0.5, 0.25]))
    rivals.write_page(page, tmp_path / "out")
    kept = json.loads((tmp_path / "results" / "rivals-demo.json").read_text())
    assert {(row["method"], row["seed"]) for row in kept} == {("flex", 0), ("flex", 1)}
    assert [row["test/exact_match"] for row in kept] == [0.5, 0.25]


def test_the_repositorys_page_has_a_place_for_each_setting() -> None:
    text = (Path(rivals.__file__).parents[1] / "docs" / "rivals.md").read_text()
    for name in rivals.SEEDS:
        assert text.count(f"<!-- made by benchmarks.rivals, {name}: begin -->") == 1


def test_rates_that_are_kept_are_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "RESULTS", tmp_path / "results")
    kept = tmp_path / "results" / "rivals-demo-tuned.json"
    kept.parent.mkdir()
    better, worse = {"loss": 3.0, "exact_match": 0.5}, {"loss": 2.0, "exact_match": 0.4}
    kept.write_text(json.dumps({method: {"0.3": better, "1": worse} for method in METHODS}))
    ran: list[dict[str, float]] = []

    def stop(config, _console):
        ran.append(dict(config.train.rates))
        raise KeyboardInterrupt

    monkeypatch.setattr(rivals, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        rivals.measure("demo", rivals.configure("demo", tmp_path / "out", None, None, (31,)), Console(quiet=True))
    assert ran == [{method: 0.3 for method, row in METHODS.items() if row.trains}]
