"""Calibrate, choose, build: the rule against its own definition, and a graft that is closed."""

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_config

from flex import graft as grafting
from flex.config import METHODS
from flex.errors import FlexError
from flex.model import wrap
from flex.workers import prepare


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("graft"))
    setting = prepare(config, 0)
    wrap(setting.base, METHODS["flex"], config.lora, config.graft, seed=0)
    return setting


def enumerate_rule(setting, examples, batch_size):
    """The paper's enumeration, written anew: keep one expert of a layer at a time, compare the layer's outputs."""
    base, encoder = setting.base, setting.encoder
    losses = {name: torch.zeros(layer.num_experts) for name, layer in base.layers.items()}
    norms = dict.fromkeys(losses, 0.0)
    for layer in base.layers.values():
        layer.graft = None
    for start in range(0, len(examples), batch_size):
        batch = encoder.batch(examples[start : start + batch_size])
        seen = {}
        handles = [
            layer.register_forward_hook(lambda m, a, out, name=name, seen=seen: seen.update({name: (a[0], out)}))
            for name, layer in base.layers.items()
        ]
        with torch.no_grad():
            base.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        for handle in handles:
            handle.remove()
        keep = batch.attention_mask.flatten().bool()
        for name, (x, out) in seen.items():
            x, out = x[keep], out[keep]
            norms[name] += out.norm()
            for i in range(len(losses[name])):
                gate, up = F.linear(x, base.layers[name].gate_up_proj[i]).chunk(2, -1)
                losses[name][i] += (out - F.linear(F.silu(gate) * up, base.layers[name].down_proj[i])).norm()
    return {name: losses[name] / norms[name] for name in losses}


def test_choice_is_that_of_the_papers_enumeration(setting):
    examples = setting.clients[0].train
    grafts = {name: layer.graft for name, layer in setting.base.layers.items()}
    expected = enumerate_rule(setting, examples, 4)
    for name, graft in grafts.items():
        setting.base.layers[name].graft = graft
    sums = grafting.calibrate(setting.base, setting.encoder, examples, 4)
    choices = grafting.choose(setting.base, sums, "reconstruction", "")
    assert [c.module for c in choices] == list(setting.base.layers)
    for choice in choices:
        wanted = expected[choice.module]
        torch.testing.assert_close(torch.tensor(choice.candidates), wanted.detach(), rtol=1e-4, atol=1e-5)
        assert choice.chosen == int(wanted.argmin())
        assert choice.residual == min(choice.candidates)
    # A hook that stays would slow every later step: none does.
    assert all(not layer._forward_hooks for layer in setting.base.layers.values())


def test_calibration_ignores_padding_lora_and_grafts(setting):
    examples = setting.clients[0].train
    sums = grafting.calibrate(setting.base, setting.encoder, examples, 10)
    alone = grafting.calibrate(setting.base, setting.encoder, examples, 1)
    for name in sums:
        total, apart = (torch.cat(s[name].scores).sum(0) for s in (sums, alone))
        torch.testing.assert_close(total, apart, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        for name, parameter in setting.base.model.named_parameters():
            if "lora_B" in name or "graft.down_proj" in name:
                parameter.normal_()
    moved = grafting.calibrate(setting.base, setting.encoder, examples, 10)
    for name in sums:
        torch.testing.assert_close(torch.cat(moved[name].scores), torch.cat(sums[name].scores))
    with torch.no_grad():
        for name, parameter in setting.base.model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()


def test_the_graft_starts_as_the_chosen_expert_and_the_controls_do_not(setting):
    sums = grafting.calibrate(setting.base, setting.encoder, setting.clients[0].train, 10)
    for criterion in ("reconstruction", "random"):
        choices = grafting.choose(setting.base, sums, criterion, "seed")
        grafting.build(setting.base, choices, -4.0, 0)
        for choice in choices:
            layer = setting.base.layers[choice.module]
            torch.testing.assert_close(layer.graft.gate_up_proj.data, layer.gate_up_proj.data[choice.chosen])
            torch.testing.assert_close(layer.graft.down_proj.data, layer.down_proj.data[choice.chosen])
            assert layer.graft.logit_bias.item() == -4.0
    choices = grafting.choose(setting.base, sums, "fresh", "seed")
    grafting.build(setting.base, choices, -4.0, 0)
    assert {c.chosen for c in choices} == {None}
    for layer in setting.base.layers.values():
        assert layer.graft.down_proj.std().item() == pytest.approx(layer.down_proj.std().item(), rel=0.1)
    drawn = [[c.chosen for c in grafting.choose(setting.base, sums, "random", str(s))] for s in range(8)]
    assert len({tuple(d) for d in drawn}) > 1


@torch.no_grad()
def test_a_closed_graft_leaves_the_logits_as_they_are(setting):
    batch = setting.encoder.batch(setting.clients[0].train)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    grafts = {name: layer.graft for name, layer in setting.base.layers.items()}
    setting.base.model.eval()
    for graft in grafts.values():
        graft.down_proj.normal_()
        graft.logit_bias.fill_(-1e4)
    closed = setting.base.model(**inputs).logits
    for graft in grafts.values():
        graft.logit_bias.fill_(2.0)
    opened = setting.base.model(**inputs).logits
    for layer in setting.base.layers.values():
        layer.graft = None
    without = setting.base.model(**inputs).logits
    for name, graft in grafts.items():
        setting.base.layers[name].graft = graft
    assert torch.equal(closed, without)
    assert not torch.allclose(opened, without, atol=1e-2)


def test_activations_that_are_no_numbers_are_named(setting):
    layer = next(iter(setting.base.layers.values()))
    kept = layer.down_proj.data.clone()
    layer.down_proj.data[0] = float("nan")
    try:
        with pytest.raises(FlexError, match=r"layers\.0\.mlp\.experts gives NaN or infinite activations"):
            grafting.calibrate(setting.base, setting.encoder, setting.clients[0].train, 10)
    finally:
        layer.down_proj.data.copy_(kept)
