"""The study of the rivals: its configurations are runs, and its page says what the numbers say."""

import json
from pathlib import Path

import pytest
from rich.console import Console
from synthetic_run import scored, write_run

from benchmarks import rivals
from flex.methods import METHODS


def test_the_demo_is_configured_with_every_method(tmp_path: Path) -> None:
    config = rivals.configure("demo", tmp_path, None, None, (31,))
    assert config.train.methods == tuple(METHODS)
    assert Path(config.data.for_seed(31).train).exists()
    assert Path(config.data.for_seed(rivals.TUNED_ON["demo"]).train).exists()
    assert Path(config.anchor.text.replace("{seed}", "31")).exists()
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
    assert "- FLEx reaches 62.5" in text
    assert (tmp_path / "pictures" / "rivals-demo.svg").read_text().count("Ditto") == 1


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
