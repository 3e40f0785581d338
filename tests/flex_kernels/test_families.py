"""Every family in the installed transformers whose experts carry the experts interface: equal to eager, and graftable.

Nothing here names the families that work: they are found in the package, so a new one is tested the day it is there.
"""

from pathlib import Path

import pytest
import torch
from families import build, experts_classes, inputs_of, run
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

import flex_kernels

FAMILIES = experts_classes()
# Families that cannot be tested so, each with the reason; a test of one that works after all fails.
EXCEPTIONS: dict[str, str] = {}
# Families that take the general path, and why. A family that is not here takes the fused one.
GENERAL = {
    "aria": "the weights are stored transposed",
    "beam": "BeamExperts has a gate function of its own",
    "deepseek_v4": "DeepseekV4Experts has a gate function of its own",
    "glm5_next": "Glm5NextTextExperts has a gate function of its own",
    "gpt_oss": "the experts have biases",
    "hy_v4": "HYV4Experts has a gate function of its own",
    "inkling2": "Inkling2Experts has a gate function of its own",
    "minimax_m3_vl": "MiniMaxM3VLExperts has a gate function of its own",
    "muse_spark": "a norm follows each expert",
    "nemotron_h": "the experts have no gate",
    "openai_privacy_filter": "the experts have biases",
}
# The norm of a gradient's error: relative to that gradient, or (where terms cancel) to the model's largest.
TOLERANCE, TOLERANCE_OF_LARGEST = 1e-5, 1e-6


EVERY_FAMILY = [
    pytest.param(name, marks=[pytest.mark.xfail(reason=EXCEPTIONS[name], strict=True)] if name in EXCEPTIONS else [])
    for name in FAMILIES
]


@pytest.fixture(autouse=True)
def registered() -> None:
    flex_kernels.register()


def assert_same(ours: tuple, theirs: tuple) -> None:
    (out, grads), (want, want_grads) = ours, theirs
    assert float((out - want).norm()) <= TOLERANCE * float(want.norm())
    assert grads.keys() == want_grads.keys()
    largest = max(float(grad.norm()) for grad in want_grads.values())
    for name, grad in want_grads.items():
        error, size = float((grads[name] - grad).norm()), float(grad.norm())
        assert error <= TOLERANCE * size + TOLERANCE_OF_LARGEST * largest, f"{name}: {error} of {size}"


def expert_gradients(model: PreTrainedModel, grads: dict[str, torch.Tensor]) -> list[float]:
    return [float(grads[f"{name}.down_proj"].norm()) for name in flex_kernels.moe_layers(model)]


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_equals_eager_in_logits_and_every_gradient(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = build(family, FAMILIES[family])
    inputs = inputs_of(family)
    want = run(model, "eager", inputs)
    assert min(expert_gradients(model, want[1])) > 0.01, "the experts do not matter here, nothing would be compared"
    assert_same(run(model, "flex", inputs), want)
    paths = {(path.path, path.why) for path in flex_kernels.explain(model)}
    if family in GENERAL:
        assert paths == {("general", GENERAL[family])}
    else:
        assert {path for path, _ in paths} == {"fused"}
    assert capsys.readouterr().out.count("\n") == len(flex_kernels.moe_layers(model))


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_takes_a_graft_and_gives_it_back(family: str) -> None:
    model = build(family, FAMILIES[family])
    inputs = inputs_of(family)
    keys, want = list(model.state_dict()), run(model, "eager", inputs)
    grafts = flex_kernels.attach_graft(model, width=6)
    for graft in grafts.values():
        graft.reset_parameters()
    got = run(model, "flex", inputs)
    assert_same((got[0], {name: got[1][name] for name in want[1]}), want)
    for name, graft in grafts.items():  # it adds nothing yet, and trains
        assert float(got[1][f"{name}.graft.down_proj"].norm()) > 0
        nn.init.normal_(graft.down_proj)
    assert float((run(model, "flex", inputs)[0] - want[0]).norm()) > 1e-3 * float(want[0].norm())
    flex_kernels.detach_graft(model)
    assert list(model.state_dict()) == keys
    assert_same(run(model, "eager", inputs), want)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_graft_leaves_what_is_saved_of_the_base_as_it_is(family: str, tmp_path: Path) -> None:
    model = build(family, FAMILIES[family])
    model.save_pretrained(tmp_path / "bare")
    grafts = flex_kernels.attach_graft(model, width=6)
    for graft in grafts.values():
        nn.init.normal_(graft.down_proj)
    with pytest.warns(UserWarning, match="from_pretrained drops them"):
        model.save_pretrained(tmp_path / "grafted")
    bare, grafted = (load_file(tmp_path / name / "model.safetensors") for name in ("bare", "grafted"))
    assert all(torch.equal(grafted[key], tensor) for key, tensor in bare.items())
    added = grafted.keys() - bare.keys()
    assert len(added) == 4 * len(grafts)
    assert all(".graft." in key for key in added)
    assert (tmp_path / "bare/config.json").read_text() == (tmp_path / "grafted/config.json").read_text()
    want = {name: graft.down_proj.clone() for name, graft in grafts.items()}
    for graft in grafts.values():
        nn.init.zeros_(graft.down_proj)
    model.load_state_dict(grafted, strict=False)  # as the Trainer does when it resumes
    for name, graft in grafts.items():
        assert torch.equal(graft.down_proj, want[name])


def test_there_are_families_to_test() -> None:
    assert len(FAMILIES) >= 50
    assert {"gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"} <= FAMILIES.keys()


def test_a_wrong_result_would_be_seen() -> None:
    model = build("qwen2_moe", FAMILIES["qwen2_moe"])
    inputs = inputs_of("qwen2_moe")
    want = run(model, "eager", inputs)
    with torch.no_grad():
        next(iter(flex_kernels.moe_layers(model).values())).down_proj[3] *= 1.001
    with pytest.raises(AssertionError):
        assert_same(run(model, "flex", inputs), want)
