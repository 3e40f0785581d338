"""The study of the rivals: its configurations are runs, and its page says what the numbers say."""

from pathlib import Path

import pytest
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


def test_the_page_has_a_line_for_each_method(tmp_path: Path) -> None:
    events = scored("flex", [0.6 + 0.01 * i for i in range(6)]) + scored("ditto", [0.3] * 6)
    write_run(tmp_path / "out" / "demo" / "run", events)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{rivals.BEGIN}\nold\n{rivals.END}\nafter\n")
    rivals.write_page(page, tmp_path / "out")
    text = page.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| Ditto | 30.0 ± 0.0 | +32.5 | 0.031 | 6/6 |  |  |" in text
    assert "- FLEx reaches 62.5" in text
