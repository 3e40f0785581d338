"""What the report says of a comparison: level, better, worse, and a control that is as good by its name."""

from __future__ import annotations

import pytest
from synthetic_run import scored, summarised

from flex.report.findings import difference, differences
from flex.report.numbers import Measure
from flex.report.terminal import findings

TEST = Measure("test", "", "exact_match")

WAVE = [0.02, -0.01, 0.01, -0.02, 0.0, 0.01, -0.02, 0.01]


def near(level: float, seeds: int = 8, wave: float = 1.0) -> list[float]:
    """So many seeds around a level, in a way of their own."""
    return [level + wave * WAVE[(3 * i) % 8] for i in range(seeds)]


VERDICTS = {
    "better in every seed": (near(0.5), [0.3] * 8, "better"),
    "worse in every seed": ([0.3] * 8, near(0.5), "worse"),
    "signs by turns": ([0.5] * 8, near(0.5), "unsettled"),
    "two seeds, whatever they say": ([0.9, 0.9], [0.1, 0.1], "open"),
    "one seed": ([0.9], [0.1], "open"),
    "five pairs cannot get to 5 %": ([0.9] * 5, [0.1] * 5, "open"),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_verdict_of_a_paired_difference(case: str) -> None:
    first, second, verdict = VERDICTS[case]
    flex, other = summarised(scored("fedavg", second) + scored("flex", first))[::-1]
    found = difference(flex, other, TEST)
    assert found is not None
    assert found.verdict == verdict
    mean = sum(a - b for a, b in zip(first, second, strict=True)) / len(first)
    assert found.mean == pytest.approx(mean)


def several(method: str, by_client: dict[str, list[float]]) -> list[dict]:
    return [{**e, "client_id": client} for client, values in by_client.items() for e in scored(method, values)]


def test_pairs_are_of_seed_and_client() -> None:
    """Three seeds of two clients: six pairs, all of one sign, so p = 2 / 64."""
    flex = several("flex", {"a": [0.6, 0.61, 0.62], "b": [0.8, 0.83, 0.81]})
    other = several("fedavg", {"a": [0.5, 0.5, 0.5], "b": [0.7, 0.7, 0.7]})
    rows = summarised(flex + other)
    found = difference(rows[1], rows[0], TEST)
    assert found is not None
    assert (found.num_seeds, found.ahead, found.test.num_pairs) == (3, 3, 6)
    assert found.p == pytest.approx(2 / 64)
    assert found.verdict == "better"
    assert found.judged.endswith("p = 0.031, ahead in 3 of 3 seeds")
    assert "[+" in found.interval


def test_several_comparisons_are_corrected_together() -> None:
    flex = scored("flex", near(0.6))
    others = scored("fedavg", [0.3] * 8) + scored("local", [0.55] * 8) + scored("flex-random", near(0.6, wave=-1.0))
    rows = {row.method: row for row in summarised(flex + others)}
    found = differences(rows["flex"], [row for row in rows.values() if row.method != "flex"], TEST)
    alone = {method: difference(rows["flex"], rows[method], TEST) for method in found}
    order = sorted(found, key=lambda method: alone[method].p)
    assert found[order[0]].p == pytest.approx(3 * alone[order[0]].p)
    assert found[order[-1]].p == pytest.approx(max(alone[order[-1]].p, found[order[1]].p))
    assert {diff.family for diff in found.values()} == {3}
    assert found["fedavg"].verdict == "better"
    assert found["flex-random"].verdict == "unsettled"


def test_loss_counts_downwards() -> None:
    flex, other = scored("flex", [0.5] * 8), scored("fedavg", [0.5] * 8)
    for i, event in enumerate(flex):
        event["loss"] = 2.0 + 0.01 * i
    rows = summarised(other + flex)
    found = difference(rows[1], rows[0], Measure("test", "", "loss"))
    assert found is not None
    assert found.mean == pytest.approx(1.035)
    assert (found.verdict, found.ahead) == ("worse", 0)


def test_a_difference_below_the_printed_digits_is_no_verdict() -> None:
    """Every seed agrees on +.0003, so p is small: it is printed as +0.0 all the same."""
    rows = summarised(scored("fedavg", [0.5] * 8) + scored("flex", [0.5003] * 8))
    found = difference(rows[1], rows[0], TEST)
    assert found is not None
    assert (str(found), found.verdict, found.ahead) == ("+0.0 ± 0.0", "unsettled", 0)
    assert "not told apart from FedAvg" in findings(rows)[0]


def test_a_lower_loss_is_told_of_methods_whose_score_prints_the_same() -> None:
    """FLEx is .0003 behind, which nobody sees: the loss is what tells the two apart."""
    rows = summarised(scored("fedavg", [0.5, 0.5], loss=1.0) + scored("flex", [0.4997, 0.4997], loss=2.0))
    assert any("FedAvg 1.000 ± 0.000 (lower in 2 of 2 seeds)" in sentence for sentence in findings(rows))


def test_too_few_seeds_say_so() -> None:
    for seeds, said in ((1, "There is one seed only"), (2, "There are 2 seeds only")):
        found = findings(summarised(scored("fedavg", [0.1] * seeds) + scored("flex", [0.9] * seeds)))
        assert "beside FedAvg" in found[0]
        assert "which so few seeds cannot judge" in found[0]
        assert "better" not in found[0]
        assert any(said in sentence and "--num-seeds 5" in sentence for sentence in found)
    enough = findings(summarised(scored("fedavg", [0.1] * 8) + scored("flex", near(0.9))))
    assert not any("seeds only" in sentence for sentence in enough)


def test_only_common_seeds_are_compared() -> None:
    rows = summarised(scored("fedavg", [0.1, 0.2, 0.3]) + scored("flex", [0.5]))
    found = difference(rows[1], rows[0], TEST)
    assert found is not None
    assert (found.num_seeds, found.mean) == (1, pytest.approx(0.4))
    lonely = [{**event, "seed": 9} for event in scored("flex", [0.5])]
    rows = summarised(scored("fedavg", [0.1]) + lonely)
    assert difference(rows[1], rows[0], TEST) is None
    assert findings(rows)


def said_of(**levels: float) -> list[str]:
    """Findings of eight seeds around each level."""
    waves = {name: (-1.0) ** i for i, name in enumerate(levels)}
    events = [e for name, level in levels.items() for e in scored(name.replace("_", "-"), near(level, 8, waves[name]))]
    return findings(summarised(events))


def test_findings_name_a_control_that_is_as_good() -> None:
    said = " ".join(said_of(flex=0.6, fedavg=0.3, flex_random=0.6, flex_fresh=0.7))
    assert "better than FedAvg (+30.0 ± " in said
    assert "a random expert is not told apart from FLEx (" in said
    assert "a fresh module does better than FLEx (−10.0 ± " in said
    assert "this run does not show" in said
    assert "the gain over FedAvg comes from having a private module" in said

    said = " ".join(said_of(flex=0.6, fedavg=0.3, flex_random=0.4, flex_fresh=0.6))
    assert "a random expert does worse" in said
    assert "does not show that starting from pretrained weights matters" in said

    said = " ".join(said_of(flex=0.6, fedavg=0.3, flex_random=0.4, flex_fresh=0.4))
    assert "earns its place" in said
    assert "does not show" not in said

    assert "cannot tell whether the choice" in " ".join(said_of(flex=0.6, fedavg=0.3))


def test_findings_compare_with_the_papers_rule_like_with_a_control() -> None:
    controls = {"flex_random": 0.4, "flex_fresh": 0.4}
    said = said_of(flex=0.6, fedavg=0.3, flex_paper=0.6, **controls)
    assert "Paper" not in said[0]  # the headline compares with what shares differently
    assert "In place of FLEx's graft, the paper's rule is not told apart from FLEx (" in said[1]
    assert "does not show that this graft is better than the paper's." in said[1]
    assert "gain over FedAvg" not in said[1]

    said = said_of(flex=0.6, fedavg=0.3, flex_paper=0.4, **controls)
    assert "the paper's rule does worse (+20.0 ± " in said[1]
    assert said[1].endswith("So the graft earns its place here.")

    said = said_of(flex=0.6, fedavg=0.3, flex_paper=0.4)
    assert said[1].endswith("the numbers are FLEx minus the other.")
    assert "cannot tell whether the choice" in said[2]

    said = said_of(flex=0.6, fedavg=0.3, flex_paper=0.6, **controls, flex_private_lora=0.7)
    assert "and a private LoRA does better than FLEx (−10.0 ± " in said[1]
    assert "better than the paper's or that a graft is better than a private LoRA; the gain over FedAvg" in said[1]


def test_findings_when_flex_loses() -> None:
    said = said_of(local=0.7, fedavg=0.6, flex=0.6)
    assert "worse than local training" in said[0]
    assert "not told apart from FedAvg" in said[0]


def test_findings_tell_when_loss_disagrees() -> None:
    events = scored("flex", [0.6, 0.6], loss=2.0) + scored("fedavg", [0.5, 0.5], loss=1.0)
    assert any("FedAvg 1.000 ± 0.000 (lower in 2 of 2 seeds)" in said for said in findings(summarised(events)))
