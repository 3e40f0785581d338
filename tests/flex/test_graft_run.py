"""Grafts in whole runs: they stay at home, resume to the same bits, may come late, and a person can look at them."""

import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny import PAPER, read_log, tiny_config

from flex.commands import graft as commands
from flex.config import METHODS, write_config
from flex.graft.calibrate import Calibration
from flex.graft.choose import choose_grafts
from flex.model.adapters import wrap
from flex.runs.run import run
from flex.runs.world import load_world


@pytest.mark.parametrize(
    "settings",
    [
        {"training": "lora", "rank": 2, "alpha": 4.0},
        {"width": 7},
        {"criterion": "reconstruction"},
        {"criterion": "scaled_subset", "experts": 2, "training": "lora", "combine": "convex"},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_a_run_with_any_graft_keeps_it_at_home_and_resumes(tmp_path, settings):
    config = tiny_config(tmp_path, train={"methods": ("flex",), "rounds": 2, "steps": 1}, graft=settings)
    config = config.with_values(evaluate={"rouge": False})
    run(config, Console(quiet=True))
    job = tmp_path / "run" / "flex-seed0"
    events = read_log(job / "metrics.jsonl")
    sent = [tensor["name"] for e in events if e["event"] == "sent" for tensor in e["tensors"]]
    assert sent
    assert not any("graft" in name for name in sent)
    files = {client: load_file(job / "clients" / client / "round-0002.safetensors") for client in "ab"}
    for own in files.values():
        kinds = {name.rpartition(".")[2] for name in own if name.startswith("parameters:")}
        low_rank = {f"{part}_lora_{ab}" for part in ("gate_up", "down") for ab in "ab"}
        trained = low_rank if "training" in settings else set()
        assert kinds == {"gate_up_proj", "down_proj", "logit_weight", "logit_bias"} | trained
        assert bool([name for name in own if "moments" in name and "proj" in name]) == ("training" not in settings)
    before = {client: load_file(job / "clients" / client / "round-0001.safetensors") for client in "ab"}
    copies = [name for name in files["a"] if name.startswith("parameters:") and "_proj" in name]
    for client, own in files.items():  # a frozen copy stays as it was, a graft that trains does not
        same = all(torch.equal(own[name], before[client][name]) for name in copies)
        assert same == ("training" in settings)
    assert not list(job.rglob("calibration*"))
    grafts = [e for e in events if e["event"] == "graft"]
    assert len(grafts) == 4
    for event in grafts:
        assert event["criterion"] == settings.get("criterion", "neurons")
        assert event["target"] == "correction"
        assert event["unexplained"]["held_out_after"] is not None
        assert sum(event["neurons"]) == event["width"]
        assert event["seconds"] > 0
        assert event["peak_bytes"] > 2**20
    # Round 2 once more, from the files of round 1: the same bits.
    for client in "ab":
        (job / "clients" / client / "round-0002.safetensors").unlink()
    (job / "server" / "round-0002.safetensors").unlink()
    kept = [e for e in events if e.get("round", 0) < 2 and e["event"] != "done"]
    (job / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in kept))
    run(config, Console(quiet=True))
    for client, own in files.items():
        again = load_file(job / "clients" / client / "round-0002.safetensors")
        assert again.keys() == own.keys()
        assert all(torch.equal(again[name], own[name]) for name in own)


@pytest.mark.parametrize("settings", [{}, PAPER], ids=["neurons", "paper"])
def test_a_graft_after_shared_rounds_starts_from_what_they_gave(tmp_path, settings):
    """Until then the client is one of FedAvg, to the bit; then its graft is chosen with the shared LoRA at work."""
    train = {"rounds": 3, "steps": 2, "methods": ("fedavg", "flex")}
    config = tiny_config(tmp_path, train=train, graft={"after_rounds": 2, **settings})
    config = config.with_values(evaluate={"rouge": False, "every": 1})
    run(config, Console(quiet=True))
    events = {m: read_log(tmp_path / "run" / f"{m}-seed0" / "metrics.jsonl") for m in ("fedavg", "flex")}
    losses = {m: [(e["round"], e["loss"]) for e in own if e["event"] == "train"] for m, own in events.items()}
    assert losses["fedavg"][:4] == losses["flex"][:4]
    assert losses["fedavg"][4:] != losses["flex"][4:]
    grafts = [e for e in events["flex"] if e["event"] == "graft"]
    assert len(grafts) == 4
    assert {e["round"] for e in grafts} == {3}
    folder = tmp_path / "run" / "flex-seed0"
    before, after = (load_file(folder / "clients" / "a" / f"round-000{r}.safetensors") for r in (2, 3))
    grown = [name for name in before if name.startswith("parameters:") and name.endswith("_proj")]
    assert not any(before[name].any() for name in grown)
    assert all(after[name].any() for name in grown)
    steps = {float(value) for name, value in after.items() if name.startswith("moments:step/")}
    assert steps == {2.0}  # moments of the rounds before would be those of a graft that was not there

    # The same choice, from the shared state of round 2 put into the model by hand.
    shared = load_file(folder / "server" / "round-0002.safetensors")
    again = load_world(config, 0)
    wrap(again.base, METHODS["flex"], config.lora, config.graft, seed=0)
    with torch.no_grad():
        found = 0
        for name, parameter in again.base.model.named_parameters():
            key = next((k for k in shared if k.endswith(name)), None)
            if key is not None:
                parameter.copy_(shared[key])
                found += 1
    assert found == len([n for n, _ in again.base.model.named_parameters() if "lora_" in n])
    examples = again.clients[0].train
    with_lora, without = (
        choose_grafts(Calibration(again.base, again.encoder, examples, 8, lora=lora), config.graft, "")
        for lora in ("round 2", "")
    )
    wanted = [e["candidates"] for e in grafts if e["client_id"] == "a"]
    assert [c.residuals for c in with_lora] == wanted
    assert [c.residuals for c in without] != wanted
    assert all(p.grad is None for p in again.base.model.parameters())


def test_the_command_shows_what_was_taken(tmp_path, monkeypatch):
    config = tiny_config(tmp_path)
    write_config(dataclasses.replace(config, output=str(tmp_path / "out")), tmp_path / "c.toml")
    shown = Console(record=True, width=150, file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(commands, "console", shown)
    for overrides, words in (
        (
            [],
            ["client a", "neurons, target correction", "neurons of ", "neurons taken from each expert", "calibrating"],
        ),
        (["graft.width=30"], ["held out", "share over the width", "█"]),
        (["graft.criterion=reconstruction", "graft.refit=false"], ["residual of each expert", "expert "]),
        (["graft.criterion=scaled_subset", "graft.experts=2"], ["experts 0, "]),
    ):
        picture = tmp_path / "out" / "graft" / "a" / "choice.png"
        picture.unlink(missing_ok=True)
        assert commands.graft(tmp_path / "c.toml", overrides, "a") == 0
        text = shown.export_text()
        assert all(word in text for word in words), text
        assert "client b" not in text
        assert picture.read_bytes().startswith(b"\x89PNG")
