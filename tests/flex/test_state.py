"""Partition and files: whose a parameter is, and what a damaged or foreign file is told."""

import dataclasses
import os
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_model, tiny_config

from flex.config import METHODS, ModelConfig
from flex.errors import FlexError
from flex.model.adapters import wrap
from flex.model.base import load_base
from flex.model.partition import load_into, load_moments, optimizer_moments, partition, snapshot
from flex.store.files import load_tensors, rounds_in, save_tensors
from flex.store.personal import KEPT_ROUNDS, PersonalState, PersonalStore


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    return load_base(tiny_config(folder).model), tiny_config(folder)


@pytest.mark.parametrize("method", METHODS)
def test_partition_is_disjoint_and_complete_for_every_method(base, method):
    loaded, config = base
    wrap(loaded, METHODS[method], config.lora, config.graft, seed=0)
    parts = partition(loaded.model)
    names = [*parts.shared, *parts.personal, *parts.frozen]
    assert len(names) == len(set(names))
    assert set(names) == {name for name, _ in loaded.model.named_parameters()}
    assert all(p.requires_grad for p in parts.trained().values())
    assert not any(p.requires_grad for p in parts.frozen.values())
    # What is whose, by the layers' own word: LoRA and module as the method's row says, the rest frozen.
    row = METHODS[method]
    lora = {n for n in names if ".lora_A." in n or ".lora_B." in n}
    second = {n for n in lora if ".private." in n}
    marks = {"graft": ".graft.", "expert": ".adapted.", "expert_loras": ".expert_loras."}
    modules = {m: {n for n in names if mark in n and not n.endswith(".expert")} for m, mark in marks.items()}
    kept = {"": "nothing", "B": ".lora_B.", "upper": "layers.1."}[row.keeps]
    first_kept = {n for n in lora - second if row.lora == "personal" or kept in n}
    added = set().union(*modules.values())
    shared_module = added if row.module_role == "shared" else set()
    assert set(parts.shared) == (lora - second - first_kept) | shared_module
    assert set(parts.personal) == second | first_kept | (added - shared_module)
    assert {m for m, found in modules.items() if found} == {row.private} & marks.keys()
    assert bool(second) == (row.private in ("lora", "copy"))
    # `gate_proj` and the router's `gate` hold the word that other code goes by: here they are frozen like their layer.
    assert any("mlp.gate.weight" in n for n in parts.frozen)
    assert any("shared_expert.gate_proj" in n for n in parts.frozen)


def test_unknown_role_is_refused():
    module = torch.nn.Linear(2, 2)
    module.parameter_roles = {"weight": "mine"}
    with pytest.raises(FlexError, match=r"weight is declared 'mine'; expected one of shared, personal, frozen"):
        partition(torch.nn.Sequential(module))


def test_load_into_refuses_what_does_not_fit():
    parameters = {"a": torch.nn.Parameter(torch.zeros(2))}
    with pytest.raises(FlexError, match="the file does not fit this model: a and 1 more"):
        load_into(parameters, {"b": torch.ones(2)}, "the file")
    with pytest.raises(FlexError, match=r"a is \(3,\); expected \(2,\)"):
        load_into(parameters, {"a": torch.ones(3)}, "the file")
    load_into(parameters, {"a": torch.ones(2)}, "the file")
    torch.testing.assert_close(snapshot(parameters)["a"], torch.ones(2))


def test_personal_file_keeps_every_bit_and_the_last_rounds(tmp_path):
    parameter = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    for _ in range(3):
        parameter.grad = torch.randn(3)
        optimizer.step()
    store = PersonalStore(tmp_path, {"base": "x", "client": "ward"})
    moments = optimizer_moments(optimizer, {"p": parameter})
    for round_index in range(1, 5):
        store.save(round_index, PersonalState(snapshot({"p": parameter}), moments, {"c": torch.ones(1)}))
    assert rounds_in(tmp_path) == [4 - KEPT_ROUNDS + 1, 4]

    state = store.load(at_most=9)
    twin = torch.nn.Parameter(state.parameters["p"].clone())
    other = torch.optim.AdamW([twin], lr=0.1)
    load_moments(other, {"p": twin}, state.moments)
    gradient = torch.randn(3)
    for p, o in ((parameter, optimizer), (twin, other)):
        p.grad = gradient.clone()
        o.step()
    assert torch.equal(parameter, twin)
    assert torch.equal(state.control["c"], torch.ones(1))
    assert store.load(at_most=2) is None
    store.forget(after=3)
    assert rounds_in(tmp_path) == [3]


def test_personal_file_of_another_base_is_refused(tmp_path):
    PersonalStore(tmp_path, {"base": "one", "client": "ward"}).save(1, PersonalState({"p": torch.zeros(1)}))
    with pytest.raises(FlexError, match="belongs to base 'one'; this run has base 'two'"):
        PersonalStore(tmp_path, {"base": "two", "client": "ward"}).load(1)


def test_fingerprint_tells_bases_apart(tmp_path):
    config = tiny_config(tmp_path)
    one = load_base(config.model).fingerprint
    assert load_base(config.model).fingerprint == one
    other = save_model(tmp_path / "other", seed=1)
    assert load_base(config.with_values(model={"path": str(other)}).model).fingerprint != one


def test_a_folder_that_holds_no_whole_model_is_named(tmp_path):
    config = tiny_config(tmp_path).model
    path = tmp_path / "model" / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-1000], whole[:100], b"", b"x" * 5000):
        path.write_bytes(damaged)
        with pytest.raises(FlexError, match="no model can be loaded from"):
            load_base(config)
    path.write_bytes(whole)
    for file in path.parent.glob("*token*"):
        file.unlink()
    with pytest.raises(FlexError, match="no tokenizer in"):
        load_base(config)


def test_a_home_folder_is_spelled_out(tmp_path, monkeypatch):
    config = tiny_config(tmp_path).model
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_base(dataclasses.replace(config, path="~/model")).fingerprint == load_base(config).fingerprint


@pytest.mark.parametrize("path", ["/no", "./no", "no/", "a/b/c", "~/no", "~nobody", "here/no", "file.bin", "a b"])
def test_a_folder_that_is_not_there_is_never_asked_of_the_hub(tmp_path, monkeypatch, path):
    (tmp_path / "work" / "here").mkdir(parents=True)
    (tmp_path / "work" / "file.bin").touch()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("flex.model.base.AutoTokenizer", None)
    with pytest.raises(FlexError, match="no folder at"):
        load_base(ModelConfig(path))


@pytest.mark.parametrize("device", ["foo", "", "cuda:99", "hpu"])
def test_a_device_that_is_not_there_is_named(tmp_path, device):
    config = dataclasses.replace(tiny_config(tmp_path).model, device=device)
    with pytest.raises(FlexError, match=f"model.device is '{device}'; expected"):
        load_base(config)


def test_damaged_missing_and_foreign_files_are_named(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(FlexError, match="no state file at"):
        load_tensors(path)
    save_tensors(path, {"x": torch.arange(100.0)}, {"round": 1})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(FlexError, match="is damaged or no safetensors file"):
        load_tensors(path)
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(FlexError, match="is damaged or no safetensors file"):
        load_tensors(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(FlexError, match="has no FLEx header"):
        load_tensors(path)


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from flex.errors import FlexError
from flex.store.files import save_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_tensors(Path(sys.argv[1]), {"x": torch.zeros(10_000)}, {})
except FlexError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on file sizes to play a full disk")
def test_a_full_disk_leaves_the_old_file_and_no_half_of_a_new_one(tmp_path):
    path = tmp_path / "round-0001.safetensors"
    save_tensors(path, {"x": torch.ones(2)}, {"round": 1})
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith(f"cannot write {path}: ")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    torch.testing.assert_close(load_tensors(path)[0]["x"], torch.ones(2))


def test_files_are_what_the_library_itself_writes_and_reads(tmp_path):
    tensors = {
        "b": torch.randn(3, 5).to(torch.bfloat16),
        "a": torch.randn(7),
        "odd": torch.arange(3, dtype=torch.uint8),
        "turned": torch.randn(4, 6).T,
        "none": torch.empty(0, 4),
        "one": torch.tensor(3.0, dtype=torch.float64),
        "yes": torch.tensor([True, False]),
    }
    save_tensors(tmp_path / "a.safetensors", tensors, {"round": 1})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor)
