"""The study's own arithmetic, and that every variant in it is a run that can be configured."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.dolly import dolly_clients
from benchmarks.study import page, variants
from benchmarks.study.variants import SETTINGS, VARIANTS, configure
from flex.config import METHODS, GraftSettings


def test_differences_pair_the_same_client_and_seed() -> None:
    differences, by_seed = page.paired({(1, "a"): 3.0, (1, "b"): 5.0, (2, "a"): 9.0}, {(1, "a"): 1.0, (2, "a"): 1.0})
    assert differences.tolist() == [2.0, 8.0]
    assert by_seed == {1: 2.0, 2: 8.0}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_a_run(variant: str, tmp_path: Path) -> None:
    config = configure("demo-20", variant, 5, tmp_path, None, None)
    assert config.train.methods == (VARIANTS[variant].method,)
    assert config.data.max_train == 20


def test_the_papers_rule_of_the_study_is_the_papers_whatever_the_defaults_are(tmp_path: Path) -> None:
    config = configure("demo-20", "rule", 5, tmp_path, None, None)
    rule = config.graft.of(METHODS["flex"])
    paper = {"criterion": "reconstruction", "target": "output", "refit": False, "ridge": 1e-2, "refit_scale": 1.0}
    assert rule == GraftSettings(**paper, logit_bias=-2.0)  # the demo's bias
    fitted = configure("demo-20", "rule-refit", 5, tmp_path, None, None).graft
    assert fitted == dataclasses.replace(rule, refit=True)


@pytest.mark.parametrize("variant", [name for name, variant in VARIANTS.items() if variant.graft])
def test_a_variant_says_all_that_decides_its_graft(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the package's defaults are: the settings in the run are those of this file."""
    given = []
    monkeypatch.setattr(variants, "demo_config", lambda folder, overrides: given.extend(overrides))
    configure("demo-20", variant, 5, tmp_path, None, None)
    named = {line.partition("=")[0] for line in given}
    assert {f"graft.{name}" for name in ("criterion", "target", "refit", "ridge", "refit_scale")} <= named


def test_settings_name_variants_that_exist() -> None:
    assert all(name in VARIANTS for setting in SETTINGS.values() for name in setting.variants)


def test_the_page_says_what_the_jobs_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variant, exact in (("rule", 0.5), ("random", 0.25), ("neurons-corr-refit", 0.75)):
        folder = tmp_path / "study" / "demo" / variant / "seed5"
        folder.mkdir(parents=True)
        event = {"event": "evaluate", "split": "test", "when": "after_aggregation", "round": 12, "loss": 1.0}
        lines = [json.dumps(event | {"client_id": client, "exact_match": exact}) for client in ("a", "b")]
        (folder / "metrics.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(page, "RESULTS", tmp_path / "choosing.json")
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    page.PAGE.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    page.write_page(tmp_path / "study")
    text = page.PAGE.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| one expert wide, round 12 | seeds | mean | over the paper's rule | over random expert (control) |" in text
    assert "| the paper's rule | 1 | 50.0 |  | +25.0, p = 0.500, 1 of 1 |" in text
    assert "| the demo's clients, all their examples | 12 | 1 | +25.0, p = 0.500, 1 of 1 | +50.0" in text
    assert (tmp_path / "pictures" / "choosing-demo.svg").exists()


def test_dirichlet_clients_share_no_record(tmp_path: Path) -> None:
    import gzip

    for part, count in (("train", 200), ("test", 80)):
        with gzip.open(tmp_path / f"{part}.jsonl.gz", "wt") as file:
            for number in range(count):
                category = ("closed_qa", "information_extraction", "classification", "summarization")[number % 4]
                record = {"category": category, "instruction": f"{part} {number}", "context": "", "response": "x"}
                file.write(json.dumps(record) + "\n")
    folder = dolly_clients(tmp_path / "out", tmp_path, 10, 0, train=15, test=6)
    for part, count in (("train", 150), ("test", 60)):
        records = [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]
        assert len({record["instruction"] for record in records}) == len(records) == count
        assert len({record["client"] for record in records}) == 10
