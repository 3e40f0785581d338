"""The study of anchors: every cell is a run that can be configured, and the page says what the jobs measured."""

import json
from pathlib import Path

import pytest

from benchmarks.knowledge import cells, page
from benchmarks.knowledge.cells import (
    ANCHOR,
    CELLS,
    CHOOSING,
    DEFAULT,
    DOLLY,
    TEST,
    RealText,
    configure,
    configure_dolly,
)
from benchmarks.knowledge.jobs import is_left, log_of
from flex.demo.data import demo_config


def test_every_cell_is_a_run_and_says_all_that_decides_its_anchor(tmp_path: Path) -> None:
    for name, cell in CELLS.items():
        config = configure(name, 31, tmp_path)
        assert config.train.methods == (cell.method,)
        anchor = config.anchors
        assert (anchor.what if anchor else "none") == cell.kind
        if anchor:
            assert anchor.weight == cell.weight
            assert ANCHOR.items() <= vars(config.anchor).items()
            assert Path(anchor.text).exists()


def test_the_default_of_the_study_is_the_demos(tmp_path: Path) -> None:
    demo, study = demo_config(tmp_path / "demo").anchors, configure(DEFAULT, 31, tmp_path).anchors
    assert vars(demo) | {"text": ""} == vars(study) | {"text": ""}


def test_seeds_that_choose_are_not_those_that_judge() -> None:
    assert not {*CHOOSING} & {*TEST}


def write_job(out: Path, name: str, seed: int, own: float, untouched: float) -> None:
    path = log_of(name, seed, out) / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    events = []
    for client in ("a", "b"):
        common = {"event": "evaluate", "when": "after_aggregation", "round": 2, "client_id": client, "num_examples": 4}
        common |= {"loss": 1.0, "exact_match": 0.5}
        parts = {
            "test": {"own conventions": own, "shared skill": 0.5},
            "general": {"taught otherwise": 0.5, "untouched skills": untouched},
        }
        for split, groups in parts.items():
            scored = {group: {"exact_match": value, "loss": 1.0, "num_examples": 2} for group, value in groups.items()}
            events.append(common | {"split": split, "groups": scored})
    path.write_text("".join(f"{json.dumps(e)}\n" for e in [*events, {"event": "done", "round": 2}]))


def test_the_page_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "runs"
    for seed in TEST[:5]:
        write_job(out, "base", seed, 0.0, 1.0)
        write_job(out, "flex", seed, 0.5, 0.75)
        write_job(out, DEFAULT, seed, 0.495, 0.96)
        write_job(out, DEFAULT.replace("flex", "fedavg", 1), seed, 0.125, 0.5)
    write_job(out, "flex", CHOOSING[0], 0.25, 0.5)
    assert not is_left("flex", TEST[0], out)
    assert is_left("flex", TEST[5], out)
    write_dolly(out)
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    page.PAGE.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    page.write_page(out)
    text = page.PAGE.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "keeps 96.0 % of the base's untouched skills (without an anchor 75.0 %; goal: 95 %): reached" in text
    said = "own conventions over no anchor -0.5 (p = 0.002, 5 seeds; goal: at most 1 point lost: reached)"
    assert said in text
    assert "| FedAvg | 5 | +37.0, p = 0.002, 5 of 5 | +46.0, p = 0.002, 5 of 5 | yes |" in text
    assert "| FLEx over | seeds |" in text
    assert "| FLEx, no anchor | 5 | 50.0 ± 0.0 | 50.0 ± 0.0 | 50.0 ± 0.0 | 50.0 ± 0.0 | 75.0 ± 0.0 | 75.0 |  |" in text
    assert "| FLEx, no anchor | 1 | 25.0 | 50.0 | 50.0 | 50.0 | 50.0 |  |  |" in text
    assert (tmp_path / "pictures" / "knowledge-demo.svg").exists()
    assert len(json.loads((tmp_path / "knowledge.json").read_text())) == 2 * 21
    # On Dolly a loss is better when it is lower, and knowledge counts from chance on.
    assert "keeps 80.0 % of the base's cloze over chance (without an anchor 40.0 %; goal: 90 %): not reached" in text
    assert "gain in own loss over no anchor -0.250 (p = 0.002, 5 seeds)" in text
    assert "| Base model | 5 | 3.000 ± 0.000 | 50.0 ± 0.0 | 4.000 ± 0.000 | 100.0 |  |" in text
    assert "| FedAvg | 5 | +0.500, p = 0.002, 5 of 5 | +10.0, p = 0.002, 5 of 5 | yes |" in text


def write_dolly(out: Path) -> None:
    rival = DEFAULT.replace("flex", "fedavg", 1)
    for seed in DOLLY[:5]:
        for name, own, cloze in (("base", 3.0, 0.5), ("flex", 2.0, 0.35), (DEFAULT, 2.25, 0.45), (rival, 2.75, 0.35)):
            path = log_of(name, seed, out / "dolly") / "metrics.jsonl"
            path.parent.mkdir(parents=True)
            events = []
            for client in ("a", "b"):
                common = {"event": "evaluate", "when": "after_aggregation", "round": 8, "client_id": client}
                common |= {"num_examples": 4}
                events.append(common | {"split": "test", "loss": own, "exact_match": 0.0})
                events.append(common | {"split": "cloze", "accuracy": cloze})
                events.append(common | {"split": "perplexity", "loss": 4.0, "perplexity": 54.6})
            path.write_text("".join(f"{json.dumps(e)}\n" for e in [*events, {"event": "done", "round": 8}]))


def test_every_cell_is_a_run_on_dolly_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "dolly_clients", lambda folder, *_: folder)
    given = RealText(*(tmp_path / name for name in ("base", "dolly", "anchors.txt", "held.txt")))
    for name, cell in CELLS.items():
        config = configure_dolly(name, 50, tmp_path, given)
        assert config.train.methods == (cell.method,)
        assert config.evaluate.tasks == ("test", "perplexity", "cloze")
        assert (config.anchors.text if config.anchors else "") == (str(given.anchors) if cell.weight else "")


def test_two_seeds_are_no_verdict() -> None:
    scores: page.Scores = {}
    for name, own in ((DEFAULT, 60.0), (DEFAULT.replace("flex", "fedavg", 1), 10.0)):
        columns = page.DEMO_SCENE.columns
        scores[name] = {column: {(seed, c): own for seed in (3, 4) for c in "ab"} for column in columns}
    said = "| FedAvg | 2 | +50.0, p = 0.125, 2 of 2 | +50.0, p = 0.125, 2 of 2 | too few seeds |"
    assert page.rivals(scores, page.DEMO_SCENE)[2] == said


def test_a_job_that_is_not_finished_is_not_counted(tmp_path: Path) -> None:
    write_job(tmp_path, "flex", 41, 0.5, 0.5)
    path = log_of("flex", 41, tmp_path) / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert page.collect(tmp_path) == []
