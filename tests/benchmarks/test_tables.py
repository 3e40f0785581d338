"""What is written of the CPU bench: tables that are read back, a verdict of them, a column for who is added."""

import re
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.results import Ceiling, Row
from benchmarks.shapes import SHAPES, Shape, parse
from benchmarks.tables import rows_of, sections_of, table, write_sections
from benchmarks.verdict import BEST, FORWARD, TRAINING, verdict

CEILING = Ceiling(100.0, 200.0)
DEMO = SHAPES[0]


def measured(shape: Shape = DEMO, dtype: str = "float32", **milliseconds: float) -> list[Row]:
    """Both passes of each provider; the backward takes twice as long and keeps a byte more the slower it is."""
    return [
        Row(shape, dtype, what, provider, factor * ms / 1e3, int(1e6 * ms) if what == "training" else None, CEILING)
        for provider, ms in milliseconds.items()
        for what, factor in (("forward", 1), ("training", 3))
    ]


def test_a_table_is_read_back_as_it_was_written() -> None:
    text = "\n".join(["before", *table(["a", "b %"], [[1, "2 x"], ["–", ""]], "One"), *table(["a"], [[3]], "Two")])
    assert rows_of(text, "One") == [{"a": "1", "b %": "2 x"}, {"a": "–", "b %": ""}]
    assert rows_of(text, "Two") == [{"a": "3"}]
    assert rows_of(text, "Three") == []
    assert table(["a"], [], "empty") == []
    assert rows_of("### Four\n\nnothing here\n\n### Five\n\n| a |\n|---|\n| 1 |\n", "Four") == []


def test_sections_are_replaced_by_title_and_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    write_sections(path, {"b": "one", "a": "two"}, lambda sections: f"top of {sorted(sections)}\n")
    assert path.read_text() == "top of ['a', 'b']\n\n## a\n\ntwo\n\n## b\n\none\n"
    write_sections(path, {"b": "three\n\n### not a section"}, lambda sections: f"top of {sorted(sections)}\n")
    assert sections_of(path.read_text()) == {"a": "two", "b": "three\n\n### not a section"}
    before = path.read_bytes()
    write_sections(path, {}, lambda sections: f"top of {sorted(sections)}\n")
    assert path.read_bytes() == before


def test_an_added_provider_has_a_column_and_counts_among_the_best() -> None:
    usual = rows_of(results.section(measured(flex=2, grouped_mm=4, eager=6), "make bench"), FORWARD)
    assert usual[0]["grouped_mm ms"] == "4.00"
    assert usual[0][BEST] == "2.00x"
    text = results.section(measured(flex=2, eager=6, mine=3, grouped_mm=4), "make bench")
    assert list(rows_of(text, FORWARD)[0])[5:] == ["grouped_mm ms", "eager ms", "mine ms", BEST]
    row = rows_of(text, TRAINING)[0]
    assert (row["mine ms"], row[BEST], row["saved MB"], row["of grouped_mm"]) == ("9.00", "1.50x", "2.0", "50 %")
    alone = rows_of(results.section(measured(flex=2), "make bench"), TRAINING)[0]
    assert (alone[BEST], alone["of grouped_mm"]) == ("–", "–")
    assert "eager ms" not in alone  # nobody measured it


def test_a_provider_that_was_not_measured_everywhere_has_a_dash_there() -> None:
    rows = [*measured(flex=2, eager=4, mine=3), *measured(SHAPES[1], flex=2, eager=1)]
    first, second = rows_of(results.section(rows, "make bench"), FORWARD)
    assert (first["mine ms"], second["mine ms"], second[BEST]) == ("3.00", "–", "0.50x")


def test_the_verdict_is_of_what_stands_in_the_tables() -> None:
    fast = results.section(measured(flex=2, grouped_mm=4, eager=6), "make bench")
    assert "in 2 of 2 places" in verdict({"amx": fast})[0]
    assert "Slower" not in verdict({"amx": fast})[0]
    rows = [*measured(flex=2, eager=3), *measured(SHAPES[1], "bfloat16", flex=2, eager=1)]
    said = "\n".join(verdict({"amx": fast, "avx2": results.section(rows, "make bench"), "routing plan": "no table"}))
    assert "in 4 of 6 places" in said
    assert "Slower: " in said
    assert f"{SHAPES[1].name} on avx2, bfloat16, forward, no gradients: 0.50x" in said
    assert "| avx2 | float32 | 1.50x to 1.50x | 1.50x to 1.50x |" in said
    assert "| amx | bfloat16 | – | – |" in said
    assert "nothing is measured" in verdict({"routing plan": "no table"})[0]


def test_the_top_of_the_recorded_results_is_that_of_their_tables() -> None:
    text = results.RESULTS.read_text()
    assert text.startswith(results.top(sections_of(text))), "python -m benchmarks.results writes it anew"
    assert re.search(r"\*\*Verdict:\*\* in \d+ of \d+ places", text)


def test_a_shape_is_a_name_or_five_sizes() -> None:
    assert parse("demo") is DEMO
    shape = parse("512,2048,60,4,1408")
    sizes = (shape.num_tokens, shape.hidden_size, shape.num_experts, shape.top_k, shape.intermediate_size)
    assert sizes == (512, 2048, 60, 4, 1408)
    for wrong in ("", "mini", "1,2,3", "1,2,3,4,5", "0,8,4,2,8", "8,8,4,2,-8", "8,8,4,2,8.5", "8,8,4,2,8,1"):
        with pytest.raises(ValueError, match=r"expected T,H,E,K,I .* or one of demo, mid-256"):
            parse(wrong)
