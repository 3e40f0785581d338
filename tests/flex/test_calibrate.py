"""Calibration: what it looks at, that it takes the memory of one batch, goes on where it was killed, and says what is
wrong."""

import dataclasses
import gc
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import graft_settings, tiny_config

from flex.config import METHODS
from flex.errors import FlexError
from flex.graft import calibrate
from flex.graft import choose as grafting
from flex.graft.calibrate import Calibration, Sequences, Tokens
from flex.graft.choose import choose_grafts
from flex.graft.sums import LayerScores
from flex.model.adapters import PRIVATE, unwrap, wrap
from flex.model.base import router_of
from flex.runs.world import load_world

FAMILIES = [
    {"criterion": "reconstruction"},
    {"criterion": "renormalized", "experts": 2},
    {"criterion": "scaled_subset", "experts": 2, "refit": True},
    {"criterion": "neurons", "width": 12, "refit": True, "target": "correction"},
]


def name_of(settings):
    return settings["criterion"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("calibrate"))
    return load_world(config, 0)


@pytest.fixture(autouse=True)
def bare(world):
    unwrap(world.base)


def examples_of(world, count):
    """So many sequences, over and over those of both clients."""
    known = world.clients[0].train + world.clients[1].train
    return [known[i % len(known)] for i in range(count)]


def choose(world, examples, batch_size=4, folder=None, progress=None, **settings):
    told = {} if progress is None else {"progress": progress}
    calibration = Calibration(world.base, world.encoder, examples, batch_size, folder, **told)
    return choose_grafts(calibration, graft_settings(**settings), "")


def scores_of(world, examples, batch_size, target="output", **settings):
    settings = graft_settings(**settings, target=target)
    sums = {name: LayerScores(world.base, name, settings) for name in world.base.layers}
    sequences = Sequences.of(examples, batch_size, False)
    Calibration(world.base, world.encoder, examples, batch_size).run_pass(sequences, sums, target, {}, 0)
    return {name: layer.tensors() for name, layer in sums.items()}


def same(one, other):
    """Whether two lists of choices agree to the bit in all that goes into a graft."""
    for a, b in zip(one, other, strict=True):
        left, right = (dataclasses.replace(c.event("a", 1), seconds=0, peak_bytes=0) for c in (a, b))
        assert left == right
        assert torch.equal(a.parts.ids, b.parts.ids)
        assert torch.equal(a.parts.scales, b.parts.scales)
        assert (a.down_proj is None) == (b.down_proj is None)
        assert a.down_proj is None or torch.equal(a.down_proj, b.down_proj)


@pytest.mark.parametrize("target", ["output", "correction"])
def test_padding_batches_lora_and_grafts_change_nothing(world, target):
    examples = examples_of(world, 10)
    together = scores_of(world, examples, 10, target, criterion="neurons")
    alone = scores_of(world, examples, 1, target, criterion="neurons")
    for name, sums in together.items():
        for key in set(sums) - {"distance", "length"}:  # those are un-squared norms of batches
            torch.testing.assert_close(sums[key], alone[name][key], rtol=1e-3, atol=1e-5)
    config = tiny_config(setting_folder(world))
    wrap(world.base, METHODS["flex"], config.lora, config.graft, seed=0)
    world.base.model.train()
    with torch.no_grad():
        for name, parameter in world.base.model.named_parameters():
            if "lora_B" in name or ".graft." in name:
                parameter.normal_()
    moved = scores_of(world, examples, 10, target, criterion="neurons")
    assert world.base.model.training
    for name, sums in together.items():
        for key, value in sums.items():
            torch.testing.assert_close(moved[name][key], value, rtol=1e-6, atol=1e-9)


def setting_folder(world):
    return Path(world.base.tokenizer.name_or_path).parent


def test_a_correction_is_minus_the_gradient_at_the_tokens_that_predict_a_response(world):
    """By finite differences: what a small step along the target does to the summed response loss."""
    examples = examples_of(world, 3)
    batch = world.encoder.batch(examples)
    seen = {}
    calibrate._show(world.base.model, world.base.layers, batch, "correction", seen.__setitem__)
    assert list(seen) == list(world.base.layers)[::-1]  # as the backward pass comes by
    rows = torch.zeros_like(batch.labels, dtype=torch.bool)
    rows[:, :-1] = batch.labels[:, 1:] >= 0
    rows = rows.flatten()
    assert rows.sum() == sum(len(e.input_ids) - e.prompt_length for e in examples)

    @torch.no_grad()
    def loss(name, change):
        def add(module, inputs, output):
            return output.double().index_add(0, rows.nonzero().flatten(), change.double()).to(output.dtype)

        handle = world.base.layers[name].register_forward_hook(add)
        logits = world.base.model(batch.input_ids, attention_mask=batch.attention_mask).logits.double()
        handle.remove()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum").item()

    for name, tokens in seen.items():
        step = 1e-2 * tokens.target / tokens.target.norm()
        slope = (loss(name, step) - loss(name, -step)) / 2e-2
        assert slope == pytest.approx(-tokens.target.norm().item(), rel=2e-2)
    assert all(p.grad is None for p in world.base.model.parameters())


@pytest.mark.parametrize("settings", FAMILIES, ids=name_of)
def test_memory_is_that_of_one_batch(world, settings):
    """All live tensors after every batch: what the first three need is enough for the other thirteen."""
    live = []

    def weigh(what, done, total):
        gc.collect()
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors()}
        live.append((what, done, sum(storages.values())))

    def tensors():
        return [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]

    examples = [examples_of(world, 1)[0]] * 73  # 16 batches of four to fit, and three to check
    gc.freeze()  # what was there before is not looked at
    try:
        choose(world, examples, progress=weigh, **settings)
    finally:
        gc.unfreeze()
    passes = [n for n in range(1, len(live)) if live[n][1] == 1]
    for own in (live[: passes[0]], live[passes[0] :]) if passes else (live,):
        fitted = [size for _, done, size in own if done <= 16]
        assert len(fitted) == 16
        assert max(fitted[3:]) <= max(fitted[:3]) + 1024  # the loop's own scalars


@pytest.mark.parametrize("settings", FAMILIES, ids=name_of)
def test_a_killed_calibration_goes_on_to_the_same_bits(world, tmp_path, monkeypatch, settings):
    monkeypatch.setattr(calibrate, "SAVE_EVERY", 2)
    examples = examples_of(world, 24)
    done = []
    whole = choose(world, examples, folder=tmp_path / "whole", progress=lambda *what: done.append(what), **settings)
    assert not list((tmp_path / "whole").iterdir())
    for stop in range(1, len(done) + 1):
        folder, count = tmp_path / str(stop), []

        def kill(*what, stop=stop, count=count):
            count.append(what)
            if len(count) == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            choose(world, examples, folder=folder, progress=kill, **settings)
        again = []
        same(choose(world, examples, folder=folder, progress=lambda *w, a=again: a.append(w), **settings), whole)
        assert len(again) <= len(done) - stop + 1  # at most one batch twice
        assert not list(folder.iterdir())


@pytest.mark.parametrize("settings", FAMILIES[2:], ids=name_of)
def test_layers_one_at_a_time_give_the_same_bits(world, tmp_path, monkeypatch, settings):
    examples = examples_of(world, 16)
    together, seen = choose(world, examples, **settings), []
    monkeypatch.setattr(grafting, "FIT_BYTES", 1)
    apart = choose(world, examples, folder=tmp_path, progress=lambda *what: seen.append(what), **settings)
    same(apart, together)
    assert [done for _, done, total in seen if done == total] == [4, 5, 5]  # 14 fitted; then each layer with two more
    assert not list(tmp_path.iterdir())


def test_a_file_of_other_data_settings_or_base_is_not_gone_on_from(world, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "SAVE_EVERY", 1)

    def kill(what, done, total):
        if done == 3:
            raise KeyboardInterrupt

    def batches(examples, batch_size=4, **settings):
        with pytest.raises(KeyboardInterrupt):
            choose(world, examples_of(world, 16), folder=tmp_path, progress=kill, criterion="reconstruction")
        count = []
        choose(world, examples, batch_size, folder=tmp_path, progress=lambda *w: count.append(w), **settings)
        return len(count)

    examples = examples_of(world, 16)
    assert batches(examples) == 1
    assert batches(examples[::-1]) == 4
    assert batches(examples, 2) == 8
    assert batches(examples, target="correction") == 4
    assert batches(examples, criterion="routed_mass") == 4
    kept = world.base.fingerprint

    count = []
    with pytest.raises(KeyboardInterrupt):
        choose(world, examples, folder=tmp_path, progress=kill)
    world.base.fingerprint = "another"
    try:
        choose(world, examples, folder=tmp_path, progress=lambda *w: count.append(w))
    finally:
        world.base.fingerprint = kept
    assert len(count) == 4


def test_held_out_sequences_choose_and_fit_nothing(world):
    """The last eighth: other sequences there change what is reported of it, and nothing else."""
    examples = examples_of(world, 16)
    other = [*examples[:14], *examples[:2]]
    settings = {"criterion": "neurons", "width": 10, "refit": True}
    one, two = (choose(world, e, **settings) for e in (examples, other))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.parts.ids, b.parts.ids)
        assert torch.equal(a.down_proj, b.down_proj)
        assert (a.unexplained.before, a.unexplained.after) == (b.unexplained.before, b.unexplained.after)
        assert a.unexplained.held_out_after != b.unexplained.held_out_after
        # Two of those that were fitted look better than two that were not.
        assert a.unexplained.held_out_after > b.unexplained.held_out_after
    few = choose(world, examples[:7], **settings)
    assert few[0].unexplained.held_out_before is None
    assert few[0].unexplained.after is not None


@pytest.mark.parametrize("settings", FAMILIES, ids=name_of)
def test_a_model_in_bf16(world, tmp_path, settings):
    config = tiny_config(tmp_path).with_values(model={"dtype": "bfloat16"})
    half = load_world(config, 0)
    wrap(half.base, METHODS["flex"], config.lora, graft_settings(**settings), seed=0)
    choices = choose(half, examples_of(half, 16), **settings)
    PRIVATE["graft"].start(half.base, choices, graft_settings(**settings), 0)
    full = choose(world, examples_of(world, 16), **settings)
    for choice, wanted in zip(choices, full, strict=True):
        assert choice.unexplained.before == pytest.approx(wanted.unexplained.before, rel=0.15)
        graft = half.base.layers[choice.module].graft
        assert graft.down_proj.dtype == torch.float32
        assert graft.down_proj.isfinite().all()
        assert graft.down_proj.any()


def test_no_sequences_and_empty_ones_are_named(world):
    with pytest.raises(FlexError, match="there are no calibration sequences; expected at least one"):
        choose(world, [])
    empty = type(world.clients[0].train[0])((), 0, "")
    with pytest.raises(FlexError, match="calibration sequence 1 has no tokens; expected text of at least one token"):
        choose(world, [world.clients[0].train[0], empty])


@pytest.mark.parametrize("target", ["output", "correction"])
def test_activations_that_are_no_numbers_are_named(world, target):
    layer = next(iter(world.base.layers.values()))
    kept = layer.down_proj.data.clone()
    layer.down_proj.data.fill_(float("nan"))
    try:
        with pytest.raises(FlexError, match=r"layers\.\d\.mlp\.experts gives NaN or infinite activations"):
            choose(world, examples_of(world, 4), target=target)
    finally:
        layer.down_proj.data.copy_(kept)
    assert all(not layer._forward_hooks for layer in world.base.layers.values())


def test_an_expert_without_numbers_that_nobody_is_routed_to_is_named(world):
    layer = next(iter(world.base.layers.values()))
    kept = layer.down_proj.data[2].clone()

    def elsewhere(module, inputs):
        hidden_states, indices, weights = inputs
        return hidden_states, torch.where(indices == 2, 3, indices), weights

    handle = layer.register_forward_pre_hook(elsewhere)
    layer.down_proj.data[2] = float("nan")
    try:
        with pytest.raises(
            FlexError, match=r"layers\.0\.mlp\.experts gives NaN or infinite activations in its experts \[2\]"
        ):
            choose(world, examples_of(world, 4))
    finally:
        layer.down_proj.data[2] = kept
        handle.remove()


def test_a_layer_nobody_is_routed_to_is_named(world):
    layer = next(iter(world.base.layers.values()))
    handle = layer.register_forward_pre_hook(lambda module, inputs: (*inputs[:2], torch.zeros_like(inputs[2])))
    try:
        with pytest.raises(FlexError, match=r"layers\.0\.mlp\.experts was routed none of the calibration tokens"):
            choose(world, examples_of(world, 4))
    finally:
        handle.remove()


def test_routers_that_are_no_softmax_of_one_weight_are_refused(world, tmp_path):
    name = next(iter(world.base.layers))
    router = world.base.model.get_submodule(name.removesuffix("experts") + "gate")
    assert router_of(world.base, name) is router.weight
    settings = {"criterion": "renormalized", "experts": 2}
    layer = world.base.layers[name]
    handle = layer.register_forward_pre_hook(lambda module, a: (*a[:2], torch.sigmoid(4 * a[2])))
    with pytest.raises(
        FlexError, match=r"the router of model.layers.0.mlp.experts weighs its experts by something else"
    ):
        choose(world, examples_of(world, 4), **settings)
    handle.remove()
    router.register_buffer("e_score_correction_bias", torch.zeros(4))
    with pytest.raises(
        FlexError, match=r"Qwen2MoeForCausalLM: the router 'gate' beside .* has e_score_correction_bias"
    ):
        choose(world, examples_of(world, 4), **settings)
    del router.e_score_correction_bias
    kept, router.weight = router.weight, torch.nn.Parameter(torch.zeros(5, 32))
    with pytest.raises(FlexError, match=r"Qwen2MoeForCausalLM has no router with a weight of \[4, 32\] beside"):
        choose(world, examples_of(world, 4), gate="router")
    router.weight = kept


def test_sums_of_no_tokens_are_no_sums(world):
    """A batch without a response token adds nothing to a correction, and a client without any is told."""
    name = next(iter(world.base.layers))
    layer = LayerScores(world.base, name, graft_settings())
    before = {k: v.clone() for k, v in layer.tensors().items()}
    nothing = torch.zeros(0, 32)
    layer.add(Tokens(nothing, nothing, nothing, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)), False)
    assert all(torch.equal(v, before[k]) for k, v in layer.tensors().items())
    with pytest.raises(FlexError, match="was routed none of the calibration tokens"):
        layer.check()
