"""Choose and build: every criterion against its own definition, and grafts that are what was chosen."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from tiny import graft_settings, save_model, tiny_config

from flex.config import METHODS, GraftSettings, LoraSettings
from flex.errors import FlexError
from flex.graft.calibrate import Calibration
from flex.graft.choose import choose_grafts
from flex.model.adapters import PRIVATE, unwrap, wrap
from flex.runs.world import load_world

BATCH = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("graft"))
    world = load_world(config, 0)
    wrap(world.base, METHODS["flex"], config.lora, config.graft, seed=0)
    return world


def grafted(world, examples, seed="seed", **settings):
    """The choices with these settings, written into grafts on the model."""
    settings = graft_settings(**settings)
    wrap(world.base, METHODS["flex"], tiny_lora(), settings, seed=0)
    choices = choose_grafts(Calibration(world.base, world.encoder, examples, BATCH), settings, seed)
    PRIVATE["graft"].start(world.base, choices, settings, 0)
    return choices


def tiny_lora():
    return LoraSettings(rank=2, alpha=4.0)


def seen(world, examples, target):
    """{layer: (X, F, T)} on the tokens that count, in one batch; the gradient is that of a zero added to F."""
    base, kept, zeros, handles = world.base, {}, {}, []
    grafts = {name: layer.graft for name, layer in base.layers.items()}
    batch = world.encoder.batch(examples)

    def hook(name, inputs, output):
        zeros[name] = torch.zeros_like(output, requires_grad=True)
        kept[name] = (inputs[0].detach(), output.detach())
        return output + zeros[name]

    for name, layer in base.layers.items():
        layer.graft = None
        handles.append(layer.register_forward_hook(lambda m, a, out, name=name: hook(name, a, out)))
    base.model.eval()
    off = base.adapter.disable_adapter()
    with off:
        logits = base.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
        gradients = torch.autograd.grad(loss, list(zeros.values()))
    for handle, (name, graft) in zip(handles, grafts.items(), strict=True):
        handle.remove()
        base.layers[name].graft = graft
    rows = batch.attention_mask.bool()
    if target == "correction":
        rows = torch.zeros_like(rows)
        rows[:, :-1] = batch.labels[:, 1:] >= 0
    rows = rows.flatten()
    return {
        name: (kept[name][0][rows], kept[name][1][rows], (kept[name][1] if target == "output" else -gradient)[rows])
        for name, gradient in zip(zeros, gradients, strict=True)
    }


def experts_of(layer, x):
    """[E, T, H]"""
    outputs = []
    for gate_up, down in zip(layer.gate_up_proj, layer.down_proj, strict=True):
        gate, up = F.linear(x, gate_up).chunk(2, -1)
        outputs.append(F.linear(F.silu(gate) * up, down))
    return torch.stack(outputs).detach()


def enumerate_rule(world, examples, batch_size):
    """The paper's enumeration, written anew: keep one expert of a layer at a time, compare the layer's outputs."""
    base, encoder = world.base, world.encoder
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


def test_choice_is_that_of_the_papers_enumeration(world):
    examples = world.clients[0].train
    expected = enumerate_rule(world, examples, BATCH)
    choices = grafted(world, examples)
    assert [c.module for c in choices] == list(world.base.layers)
    for choice in choices:
        wanted = expected[choice.module]
        torch.testing.assert_close(torch.tensor(choice.residuals), wanted.detach(), rtol=1e-4, atol=1e-5)
        assert choice.chosen == int(wanted.argmin())
        assert choice.residual == min(choice.residuals)
    # A hook that stays would slow every later step: none does.
    assert all(not layer._forward_hooks for layer in world.base.layers.values())
    assert not world.base.model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("target", ["output", "correction"])
@pytest.mark.parametrize(
    "settings",
    [
        {"criterion": "reconstruction"},
        {"criterion": "scaled"},
        {"criterion": "scaled", "refit": True},
        {"criterion": "renormalized", "experts": 2},
        {"criterion": "scaled_subset", "experts": 3, "refit": True, "ridge": 0.1},
        {"criterion": "neurons"},
        {"criterion": "neurons", "width": 30, "candidates": 60, "refit": True},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_what_the_built_graft_leaves_is_what_the_choice_says(world, settings, target):
    """The graft on the model, applied to the layer's inputs, on the sequences it was fitted to and on the others."""
    examples = world.clients[0].train + world.clients[1].train  # 20: two are held out
    choices = grafted(world, examples, target=target, **settings)
    cut = 18 if graft_settings(**settings).fits else 20
    fitted, held_out = (seen(world, part, target) for part in (examples[:cut], examples[18:]))
    for choice in choices:
        graft, left = world.base.layers[choice.module].graft, choice.unexplained
        x, f, t = fitted[choice.module]
        unit = f.norm() / t.norm()
        share = ((unit * t - graft(x)) ** 2).sum() / (unit * t).square().sum()
        assert share.item() == pytest.approx(left.before if left.after is None else left.after, rel=2e-3)
        if cut < 20:
            x, _, t = held_out[choice.module]
            share = ((unit * t - graft(x)) ** 2).sum() / (unit * t).square().sum()
            wanted = left.held_out_before if left.after is None else left.held_out_after
            assert share.item() == pytest.approx(wanted, rel=2e-3)
        else:
            assert left.held_out_before is None
        if left.after is not None:
            assert left.after < left.before
        width = settings.get("width") or settings.get("experts", 1) * 24
        assert graft.down_proj.shape[1] == choice.width == sum(choice.neurons) == width
        assert choice.curve[0] == [0, 1.0]
        assert choice.curve[-1] == [width, pytest.approx(left.before, abs=1e-5)]
        assert len(choice.curve) <= 50
        if settings["criterion"] == "neurons":
            shares = [s for _, s in choice.curve]
            assert len(shares) > 20
            assert all(later <= earlier + 1e-6 for earlier, later in itertools.pairwise(shares))


@pytest.mark.parametrize("target", ["output", "correction"])
def test_scaled_and_subsets_are_those_of_enumeration(world, target):
    examples = world.clients[0].train[:7]  # fewer than eight: all of them are fitted
    tokens = seen(world, examples, target)
    choices = {
        size: grafted(world, examples, criterion="scaled_subset", experts=size, target=target) for size in (1, 2, 3)
    }
    scaled = grafted(world, examples, criterion="scaled", target=target)
    for index, (name, layer) in enumerate(world.base.layers.items()):
        x, _, t = tokens[name]
        experts = experts_of(layer, x).flatten(1).double()
        for size in (1, 2, 3):
            losses = {}
            for subset in itertools.combinations(range(4), size):
                columns = experts[list(subset)].T
                fit = columns @ torch.linalg.lstsq(columns, t.flatten().double()).solution
                losses[subset] = float(((t.flatten() - fit) ** 2).sum() / t.double().square().sum())
            choice = choices[size][index]
            assert choice.parts.experts == min(losses, key=losses.get)
            assert choice.unexplained.before == pytest.approx(min(losses.values()), rel=1e-4)
            assert (choice.chosen is None) == (size > 1)
        assert scaled[index].parts.experts == choices[1][index].parts.experts
        assert scaled[index].unexplained.held_out_before is None


@pytest.mark.parametrize("target", ["output", "correction"])
@pytest.mark.parametrize("size", [1, 2])
def test_the_renormalized_rule_is_that_of_enumeration(world, target, size):
    examples = world.clients[0].train[:7]
    tokens = seen(world, examples, target)
    choices = grafted(world, examples, criterion="renormalized", experts=size, target=target)
    for choice, (name, layer) in zip(choices, world.base.layers.items(), strict=True):
        x, _, t = tokens[name]
        router = world.base.model.get_submodule(name.removesuffix("experts") + "gate").weight
        experts, losses = experts_of(layer, x), {}
        for subset in itertools.combinations(range(4), size):
            weights = torch.softmax((x @ router.T)[:, list(subset)], -1)  # [T, r]
            losses[subset] = float(((t - torch.einsum("tr,rth->th", weights, experts[list(subset)])) ** 2).sum())
        assert choice.parts.experts == min(losses, key=losses.get)
        assert choice.parts.scales.unique().tolist() == [1 / size]


def test_the_expert_with_most_routing_weight(world):
    examples = world.clients[0].train
    unwrap(world.base)
    mass = {name: torch.zeros(4) for name in world.base.layers}

    def count(name, inputs):
        mass[name].index_add_(0, inputs[1].flatten(), inputs[2].flatten())

    handles = [
        layer.register_forward_hook(lambda m, a, out, name=name: count(name, a))
        for name, layer in world.base.layers.items()
    ]
    with torch.no_grad():
        for example in examples:  # one at a time: no padding
            world.base.model(input_ids=torch.tensor([example.input_ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    for choice in grafted(world, examples, criterion="routed_mass"):
        wanted = mass[choice.module] / mass[choice.module].sum()
        assert choice.chosen == int(wanted.argmax())
        assert choice.routed_mass == pytest.approx(float(wanted.max()), rel=1e-4)


def test_the_graft_starts_as_the_chosen_expert_and_the_controls_do_not(world):
    examples = world.clients[0].train
    for criterion in ("reconstruction", "random"):
        for choice in grafted(world, examples, criterion=criterion, logit_bias=-3.0):
            layer = world.base.layers[choice.module]
            torch.testing.assert_close(layer.graft.gate_up_proj.data, layer.gate_up_proj.data[choice.chosen])
            torch.testing.assert_close(layer.graft.down_proj.data, layer.down_proj.data[choice.chosen])
            assert layer.graft.logit_bias.item() == -3.0
            assert not layer.graft.logit_weight.any()
    for criterion, width in (("fresh", 0), ("zero", 10)):
        choices = grafted(world, examples, criterion=criterion, width=width)
        assert {c.chosen for c in choices} == {None}
        for layer in world.base.layers.values():
            assert layer.graft.down_proj.shape == (32, width or 24)
            assert layer.graft.gate_up_proj.std().item() == pytest.approx(layer.gate_up_proj.std().item(), rel=0.1)
            spread = 0 if criterion == "zero" else layer.down_proj.std().item()
            assert layer.graft.down_proj.std().item() == pytest.approx(spread, rel=0.1)
    drawn = [[c.chosen for c in grafted(world, examples, str(s), criterion="random")] for s in range(8)]
    assert len({tuple(d) for d in drawn}) > 1


def test_merged_experts_are_their_mean_where_nothing_is_fitted(world):
    choices = grafted(world, world.clients[0].train, criterion="random", experts=3)
    for choice in choices:
        layer = world.base.layers[choice.module]
        x = torch.randn(5, 32)
        wanted = experts_of(layer, x)[list(choice.parts.experts)].mean(0)
        torch.testing.assert_close(layer.graft(x), wanted, rtol=1e-4, atol=1e-5)
        assert len(set(choice.parts.experts)) == 3


def test_a_refitted_projection_is_quieter_by_its_factor(world):
    examples = world.clients[0].train
    settings = {"criterion": "neurons", "width": 9, "target": "correction", "refit": True}
    loud = grafted(world, examples, **settings)
    downs = [layer.graft.down_proj.detach().clone() for layer in world.base.layers.values()]
    soft = grafted(world, examples, refit_scale=0.1, **settings)
    for down, layer, one, other in zip(downs, world.base.layers.values(), loud, soft, strict=True):
        torch.testing.assert_close(layer.graft.down_proj.data, 0.1 * down)
        assert one.unexplained == other.unexplained


def test_the_gate_starts_at_the_routers_rows(world):
    for settings in ({"criterion": "scaled_subset", "experts": 2}, {"criterion": "neurons", "width": 10}):
        for choice in grafted(world, world.clients[0].train, gate="router", **settings):
            router = world.base.model.get_submodule(choice.module.removesuffix("experts") + "gate").weight
            share = torch.tensor(choice.neurons) / sum(choice.neurons)
            graft = world.base.layers[choice.module].graft
            torch.testing.assert_close(graft.logit_weight.data, share @ router.data)
            assert graft.logit_weight.any()


@torch.no_grad()
def test_a_closed_graft_leaves_the_logits_as_they_are(world):
    wrap(world.base, METHODS["flex"], tiny_lora(), GraftSettings(), seed=0)
    batch = world.encoder.batch(world.clients[0].train)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    grafts = {name: layer.graft for name, layer in world.base.layers.items()}
    world.base.model.eval()
    for graft in grafts.values():
        graft.gate_up_proj.normal_()
        graft.down_proj.normal_()
        graft.logit_bias.fill_(-1e4)
    closed = world.base.model(**inputs).logits
    for graft in grafts.values():
        graft.logit_bias.fill_(2.0)
    opened = world.base.model(**inputs).logits
    for layer in world.base.layers.values():
        layer.graft = None
    without = world.base.model(**inputs).logits
    for name, graft in grafts.items():
        world.base.layers[name].graft = graft
    assert torch.equal(closed, without)
    assert not torch.allclose(opened, without, atol=1e-2)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"criterion": "neurons", "width": 97},
            "graft.width is 97; expected at most 96, all neurons of model.layers.0",
        ),
        ({"criterion": "neurons", "candidates": 97}, "graft.candidates is 97; expected at most 96"),
        ({"criterion": "neurons", "candidates": 20}, "graft.candidates is 20; expected at least the graft's width"),
    ],
)
def test_sizes_that_no_layer_has(world, settings, sentence):
    with pytest.raises(FlexError) as caught:
        grafted(world, world.clients[0].train, **settings)
    assert sentence in str(caught.value)


def test_more_experts_than_there_are(world, tmp_path):
    config = tiny_config(tmp_path)
    save_model(tmp_path / "model", num_experts=2)
    few = load_world(config, 0)
    settings = GraftSettings(criterion="scaled_subset", experts=3)
    with pytest.raises(FlexError, match=r"graft.experts is 3; expected at most 2, all that model.layers.0.mlp.experts"):
        choose_grafts(Calibration(few.base, few.encoder, few.clients[0].train, BATCH), settings, "")
