"""What stands beside the graft: a private LoRA of its size, and an expert trained in place."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny import read_log, tiny_config

from flex.config import METHODS, GraftSettings
from flex.model.adapters import graft_parameters, pretrained_only, unwrap, wrap
from flex.model.partition import partition
from flex.runs.run import run
from flex.runs.world import load_world

RIVALS = ("flex-private-lora", "flex-adapt")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return load_world(tiny_config(tmp_path_factory.mktemp("rivals")), 0)


def wrapped(world, method, **graft):
    config = tiny_config(Path(world.base.tokenizer.name_or_path).parent).with_values(lora={"dropout": 0.0})
    wrap(world.base, METHODS[method], config.lora, GraftSettings(**graft), seed=0)
    world.base.model.eval()
    return partition(world.base.model)


def logits(world):
    batch = world.encoder.batch(world.clients[0].train)
    return world.base.model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits


@pytest.mark.parametrize("graft", [{}, {"training": "lora", "rank": 3}, {"criterion": "neurons", "width": 60}])
def test_rivals_train_about_as_many_parameters_as_the_graft(world, graft):
    counts = {m: sum(p.numel() for p in wrapped(world, m, **graft).personal.values()) for m in ("flex", *RIVALS)}
    a_rank = 2 * 4 * (32 + 32)  # layers, projections, rows of A and columns of B
    assert abs(counts["flex-private-lora"] - counts["flex"]) <= a_rank / 2
    if not graft:
        assert counts["flex-adapt"] == pytest.approx(counts["flex"], rel=0.02)


def test_the_shared_lora_starts_as_that_of_fedavg(world):
    start = {n: p.detach().clone() for n, p in wrapped(world, "fedavg").shared.items()}
    for method in RIVALS:
        parts = wrapped(world, method)
        assert parts.shared.keys() == start.keys()
        assert all(torch.equal(p, start[n]) for n, p in parts.shared.items())


@pytest.mark.parametrize("method", RIVALS)
def test_rivals_start_at_the_pretrained_function_and_can_be_taken_off(world, method):
    unwrap(world.base)
    names = [n for n, _ in world.base.model.named_parameters()]
    with torch.no_grad():
        bare = logits(world)
        parts = wrapped(world, method)
        if method == "flex-adapt":
            for index, layer in enumerate(world.base.layers.values()):
                layer.adapted.adapt(layer, index + 1)
        torch.testing.assert_close(logits(world), bare, rtol=1e-5, atol=1e-5)
        for parameter in parts.personal.values():
            parameter.add_(torch.randn_like(parameter))
        assert (logits(world) - bare).abs().max() > 0.1
        with pretrained_only(world.base):
            assert torch.equal(logits(world), bare)
        assert (logits(world) - bare).abs().max() > 0.1
        unwrap(world.base)
        assert torch.equal(logits(world), bare)
    assert [n for n, _ in world.base.model.named_parameters()] == names


def test_both_loras_are_at_work_and_get_gradients(world):
    parts = wrapped(world, "flex-private-lora")
    with pretrained_only(world.base):
        pass  # switched off and on again, as a calibration does
    logits(world).square().mean().backward()
    for parameters in (parts.shared, parts.personal):
        trained = [p for n, p in parameters.items() if "lora_B" in n]
        assert trained
        assert all(p.grad is not None and p.grad.any() for p in trained)
    assert all(p.grad is None for p in parts.frozen.values())
    unwrap(world.base)


def test_an_adapted_expert_is_the_layer_with_that_expert_changed(world):
    """Against the layer's own code with the new weights in the old ones' place; gradients too."""
    wrapped(world, "flex-adapt")
    layer = next(iter(world.base.layers.values()))
    expert = 2
    layer.adapted.adapt(layer, expert)
    with torch.no_grad():
        for parameter in (layer.adapted.gate_up_proj, layer.adapted.down_proj):
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(40, 32)
    indices = torch.stack([torch.randperm(4)[:2] for _ in range(40)])
    weights = torch.rand(40, 2)
    ours = layer(x, indices, weights)
    ours.square().sum().backward()
    found = layer.adapted.gate_up_proj.grad.clone(), layer.adapted.down_proj.grad.clone()
    changed = {"gate_up_proj": layer.gate_up_proj.detach().clone(), "down_proj": layer.down_proj.detach().clone()}
    for name, weight in changed.items():
        weight[expert] = getattr(layer.adapted, name).detach()
        weight.requires_grad_()
    unwrap(world.base)
    wanted = torch.zeros(40, 32)
    for t in range(40):
        for k in range(2):
            e = int(indices[t, k])
            gate, up = (changed["gate_up_proj"][e] @ x[t]).chunk(2)
            wanted[t] += weights[t, k] * (changed["down_proj"][e] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    wanted.square().sum().backward()
    for gradient, name in zip(found, changed, strict=True):
        torch.testing.assert_close(gradient, changed[name].grad[expert], rtol=1e-3, atol=1e-3)


def test_runs_of_both_share_what_fedavg_shares_and_keep_the_rest(tmp_path):
    methods = ("fedavg", *RIVALS)
    config = tiny_config(tmp_path, train={"methods": methods, "rounds": 2, "steps": 2})
    config = config.with_values(evaluate={"rouge": False})
    run(config, Console(quiet=True))
    sent, first = {}, {}
    for method in methods:
        job = tmp_path / "run" / f"{method}-seed0"
        events = read_log(job / "metrics.jsonl")
        sent[method] = [t["name"] for e in events if e["event"] == "sent" for t in e["tensors"]]
        first[method] = next(e["loss"] for e in events if e["event"] == "train")
        kept = [name for path in job.glob("server/*.safetensors") for name in load_file(path)]
        assert not any("private" in name or "adapted" in name for name in [*sent[method], *kept])
        if method != "fedavg":
            files = [load_file(job / "clients" / client / "round-0002.safetensors") for client in "ab"]
            mark = ".private." if method == "flex-private-lora" else ".adapted."
            assert all(mark in name for name in files[0])
            trained = [name for name in files[0] if name.startswith("parameters:") and not name.endswith("expert")]
            assert all(not torch.equal(files[0][name], files[1][name]) for name in trained)
            if method == "flex-adapt":
                chosen = {e["layer"]: e["chosen"] for e in events if e["event"] == "graft" and e["client_id"] == "a"}
                kept = [int(t) for name, t in sorted(files[0].items()) if name.endswith(".expert")]
                assert kept == [chosen[layer] for layer in sorted(chosen)]
                assert {e["criterion"] for e in events if e["event"] == "graft"} == {"routed_mass"}
    assert sent["flex-private-lora"] == sent["flex-adapt"] == sent["fedavg"]


def test_the_rank_comes_nearest_to_the_graft():
    layer = torch.nn.Module()
    layer.down_proj = torch.zeros(4, 32, 24)
    assert graft_parameters(GraftSettings(), layer) == 3 * 24 * 32 + 33
    assert graft_parameters(GraftSettings(training="lora", rank=2), layer) == 2 * (2 * 32 + 3 * 24) + 33
