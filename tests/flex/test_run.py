"""The main job on a tiny model: who shares what, what is kept, and that a killed run ends as an unbroken one."""

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from same_run import assert_same_run, plug_pulled, tensors, without_times
from tiny import read_log, tiny_config, write_records

from flex.cli import main
from flex.config import METHODS, write_config
from flex.demo.data import demo_config, write_demo_data
from flex.errors import FlexError
from flex.federation.client import Site
from flex.model.base import load_base
from flex.runs.run import run
from flex.runs.world import load_world
from flex.store import files

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of all methods on two clients, and the configuration it was made with."""
    folder = tmp_path_factory.mktemp("finished")
    config = tiny_config(folder)
    before = {k: v.clone() for k, v in load_base(config.model).model.state_dict().items()}
    run(config, QUIET)
    after = load_base(config.model).model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    return folder, config


def test_every_method_is_scored_on_every_client(finished):
    folder, config = finished
    events = read_log(folder / "run" / "metrics.jsonl")
    scored = {
        (e["method"], e["client_id"], e["split"])
        for e in events
        if e["event"] == "evaluate" and e["when"] == "after_aggregation"
    }
    assert scored == {(m, c, s) for m in config.train.methods for c in "ab" for s in ("test", "general")}
    for event in events:
        if event["event"] == "evaluate":
            assert 0 <= event["exact_match"] <= 1
            decoded = event["split"] == "test" and event["when"] in ("before_aggregation", "after_aggregation")
            assert (event["rouge_l"] is not None) == decoded
            assert event["loss"] > 0
            if event["split"] == "test":
                assert set(event["groups"]) == {"even", "odd"}
                assert sum(g["num_examples"] for g in event["groups"].values()) == event["num_examples"] == 6
    trained = [e for e in events if e["event"] == "train"]
    assert len(trained) == (len(config.train.methods) - 1) * config.train.rounds * 2


def test_no_personal_tensor_is_in_any_message_or_server_file(finished):
    folder, config = finished
    for method in config.train.methods:
        job = folder / "run" / f"{method}-seed0"
        sent = [t["name"] for e in read_log(job / "metrics.jsonl") if e["event"] == "sent" for t in e["tensors"]]
        kept = [name for path in job.glob("server/*.safetensors") for name in load_file(path)]
        shares = METHODS[method].lora == "shared"
        assert bool(sent) == shares
        assert all("lora_" in name and "self_attn" in name for name in sent)
        assert not any("graft" in name for name in [*sent, *kept])
        personal = {name for path in job.glob("clients/*/*.safetensors") for name in load_file(path)}
        assert any("graft" in name for name in personal) == (METHODS[method].private == "graft")


def test_bytes_are_those_of_the_shared_tensors(finished):
    folder, _ = finished
    events = read_log(folder / "run" / "flex-seed0" / "metrics.jsonl")
    job = next(e for e in events if e["event"] == "job")
    for event in (e for e in events if e["event"] == "train"):
        # fp32 values, and at most 256 bytes of header a tensor.
        values = job["trained_parameters"]["shared"] * 4
        count = len(next(e for e in events if e["event"] == "sent")["tensors"])
        assert values < event["bytes_up"] <= values + 256 * count
        assert event["bytes_up"] == event["bytes_down"]


def test_same_seed_same_bits_and_another_seed_others(finished, tmp_path):
    folder, config = finished
    for seed in (0, 1):
        again = config.with_values(train={"methods": ("flex",), "seeds": (seed,)})
        run(dataclasses.replace(again, output=str(tmp_path / str(seed))), QUIET)
    job, again, other = (
        tensors(f)
        for f in (folder / "run" / "flex-seed0", tmp_path / "0" / "flex-seed0", tmp_path / "1" / "flex-seed1")
    )
    assert job.keys() == again.keys() == other.keys()
    assert all(torch.equal(job[k], again[k]) for k in job)
    assert not all(torch.equal(job[k], other[k]) for k in job)


def test_finished_run_is_left_alone_and_another_configuration_refused(finished):
    folder, config = finished
    before = tensors(folder / "run")
    run(config, QUIET)
    after = tensors(folder / "run")
    assert all(torch.equal(before[k], after[k]) for k in before)
    with pytest.raises(FlexError, match=r"other settings \(train.rounds = 2 there, 1 here\)"):
        run(config.with_values(train={"rounds": 1}), QUIET)


@pytest.mark.parametrize("strategy", ["scaffold", "fedprox", "fedadam"])
def test_other_strategies_train_and_keep_their_own(tmp_path, strategy):
    config = tiny_config(tmp_path, train={"rounds": 2, "steps": 1, "batch_size": 2, "methods": ("flex",)})
    config = config.with_values(strategy={"name": strategy}, evaluate={"rouge": False})
    run(config, QUIET)
    kept = set(tensors(tmp_path / "run"))
    assert any("strategy:" in name for name in kept) == (strategy != "fedprox")
    assert any(":control:" in name for name in kept) == (strategy == "scaffold")


@pytest.mark.parametrize("pause", [0.15, 0.6, 1.2])
def test_a_killed_run_resumes_to_the_same_bits(finished, tmp_path, pause):
    """Killed without warning, `pause` seconds after its first event; then called again."""
    folder, config = finished
    output = tmp_path / "killed"
    config = config.with_values(train={"methods": ("flex",)})
    config = dataclasses.replace(config, output=str(output))
    write_config(config, tmp_path / "c.toml")
    command = [sys.executable, "-m", "flex.cli", "train", str(tmp_path / "c.toml")]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    events = output / "flex-seed0" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not events.exists() and time.monotonic() < deadline and started.poll() is None:
        time.sleep(0.01)
    time.sleep(pause)
    started.send_signal(signal.SIGKILL)
    started.wait(30)
    run(config, QUIET)
    unbroken = tmp_path / "unbroken"
    shutil.copytree(folder / "run" / "flex-seed0", unbroken / "flex-seed0")
    for path in (output, unbroken):
        (path / "metrics.jsonl").write_text((path / "flex-seed0" / "metrics.jsonl").read_text())
    assert_same_run(output, unbroken)


def test_killed_before_the_first_round_was_kept_it_says_again_what_was_sent(finished, tmp_path):
    """The server's folder is there, its file is not yet: what had been written is forgotten, and written anew."""
    folder, config = finished
    config = config.with_values(train={"methods": ("flex",)})
    config = dataclasses.replace(config, output=str(tmp_path / "killed"))
    (tmp_path / "killed" / "flex-seed0" / "server").mkdir(parents=True)
    run(config, QUIET)
    events = [
        without_times(read_log(f / "flex-seed0" / "metrics.jsonl")) for f in (tmp_path / "killed", folder / "run")
    ]
    assert events[0] == events[1]


def test_resumes_from_every_round_to_the_same_bits(tmp_path):
    """Stopped after each single round, by an error in the next: what a crash leaves."""
    config = tiny_config(tmp_path, train={"rounds": 3, "steps": 2, "batch_size": 3, "methods": ("flex", "local")})
    run(config, QUIET)
    whole = tmp_path / "whole"
    (tmp_path / "run").rename(whole)

    for stop_at in (1, 2, 3):
        with plug_pulled(stop_at):
            run(config, QUIET)
    run(config, QUIET)
    assert_same_run(tmp_path / "run", whole)


def test_seeds_share_one_base_in_memory(tmp_path):
    """Two seeds in one run equal two runs of one seed: nothing of the first is left on the base."""
    config = tiny_config(tmp_path, train={"rounds": 1, "steps": 1, "batch_size": 2, "methods": ("fedavg", "flex")})
    run(config.with_values(train={"seeds": (0, 1)}), QUIET)
    both = tensors(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "both")
    run(config.with_values(train={"seeds": (1,)}), QUIET)
    alone = tensors(tmp_path / "run")
    assert alone
    assert all(torch.equal(alone[k], both[k]) for k in alone)


def test_jobs_in_processes_of_their_own_give_the_same_bits(finished, tmp_path):
    folder, config = finished
    methods = ("base", "local", "flex")
    apart = config.with_values(train={"methods": methods})
    run(dataclasses.replace(apart, workers=2, output=str(tmp_path / "apart")), QUIET)
    both = tensors(tmp_path / "apart")
    whole = {k: v for k, v in tensors(folder / "run").items() if k.split("-seed")[0] in methods}
    assert both.keys() == whole.keys()
    assert all(torch.equal(both[k], whole[k]) for k in both)


def test_two_processes_never_write_one_run(finished):
    folder, config = finished
    with (folder / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FlexError, match="another process is at work in"):
            run(config, QUIET)
    run(config, QUIET)


def test_what_a_process_of_its_own_raises_is_told_here(tmp_path):
    config = tiny_config(tmp_path, train={"methods": ("fedavg", "flex"), "rounds": 2, "steps": 3, "batch_size": 2})
    config = config.with_values(train={"learning_rate": 1e30, "schedule": "constant"})
    with pytest.raises(FlexError, match=r"client '[ab]'"):
        run(dataclasses.replace(config, workers=2), QUIET)


def test_command_line_from_data_to_answer(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    config = tiny_config(tmp_path, train={"rounds": 1, "steps": 1, "batch_size": 2, "methods": ("base", "flex")})
    write_config(config, tmp_path / "c.toml")
    assert main(["train", str(tmp_path / "c.toml")]) == 0
    printed = capsys.readouterr().out
    assert "report.html" in printed
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    assert main(["graft", str(tmp_path / "c.toml"), "--client", "a"]) == 0
    assert "client a" in capsys.readouterr().out
    assert main(["eval", "--run", str(tmp_path / "run")]) == 0
    scored = capsys.readouterr().out
    events = read_log(tmp_path / "run" / "flex-seed0" / "metrics.jsonl")
    exact = [
        e for e in events if e["event"] == "evaluate" and e["when"] == "after_aggregation" and e["split"] == "test"
    ]
    assert all(f"{e['loss']:.3f}" in scored for e in exact)
    prompt = ["--prompt", "which is larger , 3 or 4 ?", "--max-new-tokens", "3"]
    assert main(["generate", "--run", str(tmp_path / "run"), "--client", "b", *prompt]) == 0
    assert main(["report", "--run", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "nowhere.toml"], "no configuration at nowhere.toml"),
        (["train", "--set", "model.path=/nowhere/at/all", "--data", "DATA"], "no folder at model.path = '/nowhere"),
        (["train", "--set", "model.path=DATA", "--data", "DATA"], "no folder at model.path"),
        (["train", "--data", "DATA"], "model.path is empty"),
        (["train", "--set", "model.path=MODEL", "--data", "missing.jsonl"], "no data file at missing.jsonl"),
        (["train", "--set", "model.path=MODEL", "--data", "DATA", "--clients-by", "ward"], "no column 'ward'"),
        (["train", "--set", "model.path=MODEL", "--data", "DATA", "--clients", "a", "z"], "no record has client = 'z'"),
        (["train", "--set", "model.path=DENSE", "--data", "DATA"], "has no MoE layers"),
        (["train", "--set", "rounds"], "expected section.key=value"),
        (["train", "--set", "model.path=MODEL", "--data", "DATA", "--set", "lora.targets=['x']"], "the model lacks"),
        (["eval", "--run", "nowhere"], "no run at nowhere"),
        (["generate", "--run", "nowhere", "--client", "a", "--prompt", "x"], "no run at nowhere"),
        (["report", "--run", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_code_2(tmp_path, capsys, monkeypatch, arguments, sentence):
    from transformers import LlamaConfig, LlamaForCausalLM

    from flex.demo.language import build_tokenizer

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny_config(tmp_path)
    dense = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(dense).save_pretrained(tmp_path / "dense")
    build_tokenizer().save_pretrained(tmp_path / "dense")
    places = {"MODEL": tmp_path / "model", "DENSE": tmp_path / "dense", "DATA": tmp_path / "data" / "train.jsonl"}
    for word, path in places.items():
        arguments = [a.replace(word, str(path)) for a in arguments]
    if arguments[0] == "train":
        arguments = [*arguments, "--output", str(tmp_path / "out"), "--set", "data.template=chat"]
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("flex: ")
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_not_a_number_in_training_stops_with_the_clients_name(tmp_path):
    config = tiny_config(tmp_path, train={"methods": ("fedavg",), "rounds": 2, "steps": 3, "batch_size": 2})
    config = config.with_values(train={"learning_rate": 1e30, "schedule": "constant"})
    with pytest.raises(FlexError, match=r"client '[ab]'"):
        run(config, QUIET)


def test_truncated_examples_are_counted(tmp_path):
    config = tiny_config(tmp_path, data={"max_length": 16}, train={"methods": ("base",)})
    long = {"instruction": "cat dog hen " * 9, "context": "", "response": "cat", "client": "a", "group": "even"}
    path = tmp_path / "data" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_records(path, [*rows, long])
    run(config, QUIET)
    counts = [e for e in read_log(tmp_path / "run" / "metrics.jsonl") if e["event"] == "truncated"]
    assert ("a", "train", 16) in {(e["client_id"], e["part"], e["max_length"]) for e in counts}


def test_rows_that_name_a_strategy_are_compared_in_one_run(tmp_path):
    rows = ("fedavg", "fedprox", "scaffold", "fedavgm", "fedadagrad", "fedyogi", "fedadam")
    config = tiny_config(tmp_path, train={"methods": rows}, strategy={"eta": 0.01}, evaluate={"rouge": False})
    run(config, QUIET)
    first = tensors(tmp_path / "run" / "fedavg-seed0" / "server")
    for method in rows[1:]:
        kept = tensors(tmp_path / "run" / f"{method}-seed0" / "server")
        shared = {name for name in kept if "shared:" in name}
        assert {name for name in first if "shared:" in name} == shared
        assert any(not torch.equal(kept[name], first[name]) for name in shared)
        header = files.load_tensors(tmp_path / "run" / f"{method}-seed0" / "server" / "round-0002.safetensors")[1]
        assert header["header"]["strategy"] == method
    alone = config.with_values(train={"methods": ("fedavg",)}, strategy={"name": "fedadam"})
    run(dataclasses.replace(alone, output=str(tmp_path / "alone")), QUIET)
    one, other = (tmp_path / "run" / "fedadam-seed0", tmp_path / "alone" / "fedavg-seed0")
    a, b = tensors(one / "server"), tensors(other / "server")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", ["flex", "flex-private-lora"])
def test_gradient_checkpointing_keeps_less_and_gives_the_same_bits(tmp_path, method):
    config = tiny_config(tmp_path, train={"methods": (method,), "rounds": 2, "steps": 1}, evaluate={"rouge": False})
    run(config, QUIET)
    # The first round with it, the second without: what is kept for the backward decides no bit.
    with_it = config.with_values(train={"gradient_checkpointing": True})
    with_it = dataclasses.replace(with_it, output=str(tmp_path / "with"))
    run(with_it, QUIET)
    a, b = tensors(tmp_path / "run"), tensors(tmp_path / "with")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    for path in (tmp_path / "with").rglob("round-0002.safetensors"):
        path.unlink()
    log = tmp_path / "with" / f"{method}-seed0" / "metrics.jsonl"
    log.write_text(
        "".join(f"{json.dumps(e)}\n" for e in read_log(log) if e.get("round", 0) < 2 and e["event"] != "done")
    )
    run(dataclasses.replace(with_it.with_values(train={"gradient_checkpointing": False})), QUIET)
    again = tensors(tmp_path / "with")
    assert all(torch.equal(a[k], again[k]) for k in a)


def test_gradient_checkpointing_keeps_a_tenth_of_the_numbers(tmp_path, monkeypatch):
    """Of those that a step keeps for its backward, on the demo's base."""
    config = demo_config(tmp_path / "demo", [])
    write_demo_data(Path(config.data.for_seed(0).train).parent, 0)
    world = load_world(config, 0)
    kept, steps = {False: 0, True: 0}, Site.steps

    def counted(self, *arguments):
        def count(tensor):
            kept[self.config.train.gradient_checkpointing] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            steps(self, *arguments)

    monkeypatch.setattr(Site, "steps", counted)
    for wanted in kept:
        own = config.with_values(train={"gradient_checkpointing": wanted, "steps": 1})
        site = world.sites(own, "flex", 0, tmp_path / str(wanted))["farm"]
        site.train(1, site.model.shared_arrays())
    assert 0 < kept[True] < 0.1 * kept[False], kept
