"""What each method makes of a run's graft settings."""

import pytest

from flex.config import METHODS, GraftSettings


def test_controls_keep_their_criterion_and_the_size_of_flex():
    settings = GraftSettings(width=60, gate="router", training="lora")
    assert settings.of(METHODS["flex"]) is settings
    assert settings.of(METHODS["fedavg"]) is settings
    fresh = settings.of(METHODS["flex-fresh"])
    assert (fresh.criterion, fresh.graft_width(24), fresh.training, fresh.refit) == ("fresh", 60, "lora", False)
    drawn = settings.of(METHODS["flex-random"])
    assert (drawn.criterion, drawn.graft_width(24), drawn.gate, drawn.target) == ("random", 24, "router", "output")
    merged = GraftSettings(criterion="scaled_subset", experts=2)
    widths = {m: merged.of(method).graft_width(24) for m, method in METHODS.items() if method.private == "graft"}
    assert widths.pop("flex-paper") == 24  # whole experts, one by the paper
    assert set(widths) >= {"flex", "flex-random", "flex-fresh", "fedrep", "shared-graft"}
    assert set(widths.values()) == {48}
    assert [GraftSettings().of(METHODS[m]).graft_width(24) for m in widths] == [24] * len(widths)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"width": 60, "candidates": 90, "gate": "router", "training": "lora", "combine": "convex", "logit_bias": 0.0},
        {"criterion": "scaled_subset", "experts": 2, "refit": False},
        {"criterion": "fresh", "width": 60, "refit": False},
    ],
    ids=lambda s: s.get("criterion", "neurons"),
)
def test_the_papers_rule_is_the_papers_whatever_flex_is(settings):
    configured = GraftSettings(**settings)
    paper = configured.of(METHODS["flex-paper"])
    chosen = ("criterion", "target", "refit", "gate", "experts", "width", "candidates")
    assert [getattr(paper, name) for name in chosen] == ["reconstruction", "output", False, "zeros", 1, 0, 0]
    for name in ("training", "rank", "alpha", "combine", "logit_bias", "after_rounds", "calibration_sequences"):
        assert getattr(paper, name) == getattr(configured, name)


def test_another_criterion_alone_is_refitted_to_the_correction_too():
    settings = GraftSettings(criterion="routed_mass")
    assert (settings.target, settings.refit, settings.ridge, settings.refit_scale) == ("correction", True, 1.0, 0.1)
    assert settings.fits
