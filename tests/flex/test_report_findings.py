"""What the report says of a comparison: level, better, worse, and a control that is as good by its name."""

from __future__ import annotations

import pytest
from synthetic_run import scored, summarised

from flex.report.findings import difference
from flex.report.numbers import Measure
from flex.report.terminal import findings

TEST = Measure("test", "", "exact_match")

VERDICTS = {
    "level: within the spread of the seeds": ([0.50, 0.60], [0.52, 0.56], "level"),
    "better in every seed by far": ([0.50, 0.60], [0.30, 0.41], "better"),
    "worse in every seed by far": ([0.30, 0.41], [0.50, 0.60], "worse"),
    "ahead, by less than twice the spread": ([0.50, 0.60, 0.55], [0.48, 0.54, 0.54], "ahead"),
    "behind, by less than twice the spread": ([0.48, 0.54, 0.54], [0.50, 0.60, 0.55], "behind"),
    "one seed: the sampling error decides": ([0.505], [0.500], "level"),
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


def test_two_seeds_that_agree_by_chance_prove_nothing() -> None:
    """The seeds differ by exactly +.03 both times, but 100 answers cannot tell .53 from .50."""
    rows = summarised(scored("fedavg", [0.5, 0.5], num_examples=100) + scored("flex", [0.53, 0.53], num_examples=100))
    found = difference(rows[1], rows[0], TEST)
    assert found is not None
    assert found.spread == pytest.approx(0.0)
    assert found.verdict == "level"


def test_loss_counts_downwards() -> None:
    rows = summarised(scored("fedavg", [0.5, 0.5], loss=1.0) + scored("flex", [0.5, 0.5], loss=2.0))
    found = difference(rows[1], rows[0], Measure("test", "", "loss"))
    assert found is not None
    assert found.mean == pytest.approx(1.0)
    assert found.verdict == "worse"


def test_a_difference_below_the_printed_digits_is_no_verdict() -> None:
    """Both seeds agree on +.0003, and there is no sampling error: it is printed as +0.0 all the same."""
    better = scored("flex", [0.5003, 0.5003], num_examples=0)
    rows = summarised(scored("fedavg", [0.5, 0.5], num_examples=0) + better)
    found = difference(rows[1], rows[0], TEST)
    assert found is not None
    assert (str(found), found.verdict, found.ahead) == ("+0.0 ± 0.0", "level", 0)
    assert "level with FedAvg" in findings(rows)[0]


def test_a_lower_loss_is_told_of_methods_whose_score_prints_the_same() -> None:
    """FLEx is .0003 behind, which nobody sees: the loss is what tells the two apart."""
    rows = summarised(scored("fedavg", [0.5, 0.5], loss=1.0) + scored("flex", [0.4997, 0.4997], loss=2.0))
    assert any("FedAvg 1.000 ± 0.000 (lower in 2 of 2 seeds)" in sentence for sentence in findings(rows))


def test_only_common_seeds_are_compared() -> None:
    rows = summarised(scored("fedavg", [0.1, 0.2, 0.3]) + scored("flex", [0.5]))
    found = difference(rows[1], rows[0], TEST)
    assert found is not None
    assert (found.num_seeds, found.mean) == (1, pytest.approx(0.4))
    lonely = [{**event, "seed": 9} for event in scored("flex", [0.5])]
    rows = summarised(scored("fedavg", [0.1]) + lonely)
    assert difference(rows[1], rows[0], TEST) is None
    assert findings(rows)


def test_findings_name_a_control_that_is_as_good() -> None:
    events = scored("fedavg", [0.3, 0.3]) + scored("flex", [0.6, 0.6])
    said = " ".join(findings(summarised(events + scored("flex-random", [0.6, 0.6]) + scored("flex-fresh", [0.7, 0.7]))))
    assert "better than FedAvg (+30.0 ± 0.0)" in said
    assert "a random expert does as well" in said
    assert "a fresh module does better than FLEx (−10.0 ± 0.0)" in said
    assert "this run does not show" in said
    assert "the gain over FedAvg comes from having a private module" in said

    said = " ".join(findings(summarised(events + scored("flex-random", [0.4, 0.4]) + scored("flex-fresh", [0.6, 0.6]))))
    assert "a random expert does worse" in said
    assert "does not show that starting from pretrained weights matters" in said

    said = " ".join(findings(summarised(events + scored("flex-random", [0.4, 0.4]) + scored("flex-fresh", [0.4, 0.4]))))
    assert "earns its place" in said
    assert "does not show" not in said

    assert "cannot tell whether the choice" in " ".join(findings(summarised(events)))


def test_findings_compare_with_the_papers_rule_like_with_a_control() -> None:
    events = scored("fedavg", [0.3, 0.3]) + scored("flex", [0.6, 0.6])
    same, worse = (scored("flex-paper", [value, value]) for value in (0.6, 0.4))
    controls = scored("flex-random", [0.4, 0.4]) + scored("flex-fresh", [0.4, 0.4])

    said = findings(summarised(events + same + controls))
    assert "Paper" not in said[0]  # the headline compares with what shares differently
    assert "In place of FLEx's graft, the paper's rule does as well (+0.0 ± 0.0, within the noise of 0.7)" in said[1]
    assert "does not show that this graft is better than the paper's." in said[1]
    assert "gain over FedAvg" not in said[1]

    said = findings(summarised(events + worse + controls))
    assert "the paper's rule does worse (+20.0 ± 0.0), a random expert does worse" in said[1]
    assert said[1].endswith("So the graft earns its place here.")

    said = findings(summarised(events + worse))
    assert said[1].endswith("the numbers are FLEx minus the other.")
    assert "cannot tell whether the choice" in said[2]

    said = findings(summarised(events + same + controls + scored("flex-private-lora", [0.7, 0.7])))
    assert "and a private LoRA does better than FLEx (−10.0 ± 0.0)" in said[1]
    assert "better than the paper's or that a graft is better than a private LoRA; the gain over FedAvg" in said[1]


def test_findings_when_flex_loses() -> None:
    said = findings(summarised(scored("local", [0.7, 0.7]) + scored("fedavg", [0.6, 0.6]) + scored("flex", [0.6, 0.6])))
    assert "worse than local training" in said[0] or "worse than local training" in said[1]
    assert "level with FedAvg" in said[0]


def test_findings_tell_when_loss_disagrees() -> None:
    events = scored("flex", [0.6, 0.6], loss=2.0) + scored("fedavg", [0.5, 0.5], loss=1.0)
    assert any("FedAvg 1.000 ± 0.000 (lower in 2 of 2 seeds)" in said for said in findings(summarised(events)))
