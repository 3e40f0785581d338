"""What leaves the house: folders that plain transformers and peft load, with the client's logits."""

from pathlib import Path

import peft
import pytest
import torch
from rich.console import Console
from tiny import tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

import flex_kernels
from flex.cli import main
from flex.commands.saved import load_saved
from flex.config import read_config
from flex.runs.run import run

METHODS = ("base", "local", "fedavg", "flex", "flex-private-lora", "flex-adapt")
IDS = torch.arange(30).view(2, 15)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    config = tiny_config(folder, train={"methods": METHODS, "rounds": 2, "steps": 3, "graft_learning_rate": 0.05})
    run(config.with_values(evaluate={"rouge": False}), Console(quiet=True))
    return folder / "run"


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def of_the_run(folder, method, client):
    saved = load_saved(folder, method, None, with_data=False)
    saved.attach(client)
    return logits(saved.world.base.model)


def base_of(folder):
    return AutoModelForCausalLM.from_pretrained(read_config(folder / "config.toml").model.path, dtype=torch.float32)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("method", "client"), [("fedavg", None), ("fedavg", "a"), ("local", "b"), ("flex", "a")])
@pytest.mark.parametrize("merge", [False, True])
def test_what_is_exported_is_the_clients_model(finished, tmp_path, method, client, merge):
    words = ["export", "--run", str(finished), "--method", method, "--to", str(tmp_path / "out")]
    assert main([*words, *(["--client", client] if client else []), *(["--merge"] if merge else [])]) == 0
    out = tmp_path / "out"
    if merge:
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    else:
        model = peft.PeftModel.from_pretrained(base_of(finished), out)
    if method == "flex":
        without = logits(model)
        flex_kernels.load_grafts(model, out)
        assert (logits(model) - without).abs().max() > 1e-3
    truth = of_the_run(finished, method, client or "a")
    torch.testing.assert_close(logits(model), truth, rtol=1e-4, atol=1e-4)
    assert (logits(base_of(finished)) - truth).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained(out)("which is larger")["input_ids"]
    card = (out / "README.md").read_text()
    assert ("load_grafts" in card) == (method == "flex")
    assert ("PeftModel" in card) == (not merge)
    assert card.count("| a |") == (client in (None, "a"))
    assert not (finished / ".out.part").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_private_lora_is_exported_beside_the_shared_one(finished, tmp_path):
    words = ["export", "--run", str(finished), "--method", "flex-private-lora", "--client", "a"]
    assert main([*words, "--to", str(tmp_path / "out")]) == 0
    model = peft.PeftModel.from_pretrained(base_of(finished), tmp_path / "out")
    model.load_adapter(tmp_path / "out" / "private", "private")
    model.base_model.set_adapter(["default", "private"])
    truth = of_the_run(finished, "flex-private-lora", "a")
    torch.testing.assert_close(logits(model), truth, rtol=1e-4, atol=1e-4)
    assert main([*words, "--to", str(tmp_path / "merged"), "--merge"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--method", "base"], "base trains nothing, so there is nothing to export"),
        (["--method", "local"], "local shares nothing: each client has a model of its own; expected --client NAME"),
        (["--method", "flex-adapt", "--client", "a"], "adapts an expert inside the base"),
        (["--method", "flex", "--client", "z"], "no client 'z' in this run; its clients are a, b"),
        (["--method", "nope"], "--method is 'nope'; expected one of"),
        (["--method", "flex-fresh"], "has no job flex-fresh-seed0"),
    ],
)
def test_what_cannot_be_exported_is_said_and_nothing_is_written(finished, tmp_path, capsys, words, sentence):
    assert main(["export", "--run", str(finished), "--to", str(tmp_path / "out"), *words]) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty_is_left_alone(finished, tmp_path, capsys):
    (tmp_path / "mine").write_text("x")
    assert main(["export", "--run", str(finished), "--method", "fedavg", "--to", str(tmp_path)]) == 2
    assert "is there and not empty; expected a folder that is not there yet" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
