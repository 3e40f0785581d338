"""Surroundings and models that are not as hoped: no locks, an ASCII log, too little memory, other data, other experts.

Each is told early, in one sentence, and nothing that was trained is lost.
"""

import errno
import fcntl
import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import read_log, tiny_config, write_records
from transformers import GptOssConfig, GptOssForCausalLM

from flex.cli import main
from flex.config import write_config
from flex.demo.language import build_tokenizer
from flex.errors import FlexError
from flex.federation.client import Site
from flex.runs.run import run

QUIET = Console(quiet=True)
SMALL = {"rounds": 1, "steps": 1, "batch_size": 2}


def trained(folder: Path, *methods: str, **sections: dict):
    """A finished run of these methods on two clients, and its configuration."""
    config = tiny_config(folder, train={**SMALL, "methods": methods}).with_values(evaluate={"rouge": False})
    config = config.with_values(**sections)
    run(config, QUIET)
    return config


def test_a_copy_of_a_jobs_folder_is_no_result(tmp_path):
    config = trained(tmp_path, "fedavg")
    before = read_log(tmp_path / "run" / "metrics.jsonl")
    copy = tmp_path / "run" / "fedavg-seed0.bak"
    shutil.copytree(tmp_path / "run" / "fedavg-seed0", copy)
    shutil.copytree(copy, tmp_path / "run" / "fedavg-seed7")
    run(config, QUIET)
    after = read_log(tmp_path / "run" / "metrics.jsonl")
    assert [e for e in after if e["event"] != "run"] == [e for e in before if e["event"] != "run"]


def test_scores_want_the_data_and_the_base_of_the_run(tmp_path, capsys):
    config = trained(tmp_path, "fedavg", "base")
    for method in ("fedavg", "base"):
        assert main(["eval", "--run", config.output, "--method", method]) == 0
    rows = [json.loads(line) for line in Path(config.data.train).read_text().splitlines()]
    random.Random(1).shuffle(rows)
    write_records(Path(config.data.train), rows)
    capsys.readouterr()
    for method in ("fedavg", "base"):
        assert main(["eval", "--run", config.output, "--method", method]) == 2
        assert "holds a run on other data (client 'a': a file has changed)" in capsys.readouterr().err


def test_an_answer_needs_the_run_and_the_base_alone(tmp_path, capsys):
    config = trained(tmp_path, "flex", "base", train={"clients_per_round": 1, "rounds": 1})
    ask = ["generate", "--run", config.output, "--client", "a", "--prompt", "which is larger , 3 or 14 ?"]
    ask += ["--max-new-tokens", "4"]
    assert main(ask) == 0
    said = capsys.readouterr().out
    shutil.rmtree(tmp_path / "data")
    for method in ("flex", "base"):
        assert main([*ask, "--method", method]) == 0
    assert capsys.readouterr().out.startswith(said)
    assert main([*ask[:4], "nobody", *ask[5:]]) == 2
    assert "no client 'nobody' in this run; its clients are a, b" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "flex-seed0" / "clients" / "a")
    assert main(ask) == 2
    assert "client 'a' has not taken part in a round of flex yet" in capsys.readouterr().err


def test_without_file_locks_the_run_goes_on_and_says_so(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    config = tiny_config(tmp_path, train={**SMALL, "methods": ("base",)}, evaluate={"rouge": False})
    said = io.StringIO()
    run(config, Console(file=said, width=200))
    assert "cannot be locked" in said.getvalue()
    assert "do not run it twice at once" in said.getvalue()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["gpu", "python", "cpu"],
)
def test_too_little_memory_gets_a_sentence(tmp_path, monkeypatch, error):
    def steps(*_):
        raise error

    monkeypatch.setattr(Site, "steps", steps)
    config = tiny_config(tmp_path, train={**SMALL, "methods": ("fedavg",)})
    with pytest.raises(FlexError, match=r"client 'a' is out of memory .*expected a smaller train\.batch_size"):
        run(config, QUIET)


def test_another_error_of_a_client_keeps_its_traceback(tmp_path, monkeypatch):
    def steps(*_):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(Site, "steps", steps)
    with pytest.raises(RuntimeError, match="a fault of ours") as caught:
        run(tiny_config(tmp_path, train={**SMALL, "methods": ("fedavg",)}), QUIET)
    assert not isinstance(caught.value, FlexError)


def test_an_ascii_log_gets_the_table_and_the_run_its_report(tmp_path):
    config = tiny_config(tmp_path, train={**SMALL, "methods": ("base", "fedavg")}, evaluate={"rouge": False})
    write_config(config, tmp_path / "c.toml")
    done = subprocess.run(
        [sys.executable, "-m", "flex.cli", "train", str(tmp_path / "c.toml")],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.isascii()
    assert b"FedAvg" in done.stdout
    assert (tmp_path / "run" / "report.html").exists()


@pytest.fixture
def gpt_oss(tmp_path):
    """A configuration on a tiny GPT-OSS, whose experts have biases and interleaved rows."""
    config = tiny_config(tmp_path, train=SMALL, evaluate={"rouge": False})
    tokenizer = build_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 64,
        "layer_types": ["full_attention"] * 2,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    shutil.rmtree(tmp_path / "model")
    GptOssForCausalLM(GptOssConfig(**settings)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return config


def test_experts_that_cannot_be_grafted_are_refused_before_anything_trains(gpt_oss, tmp_path):
    config = gpt_oss.with_values(train={"methods": ("fedavg", "flex")})
    with pytest.raises(FlexError, match=r"nothing can be grafted at model.layers.0.mlp.experts"):
        run(config, QUIET)
    assert not (tmp_path / "run").exists()


def test_a_fresh_module_grafts_on_any_experts(gpt_oss, tmp_path):
    run(gpt_oss.with_values(train={"methods": ("fedavg", "flex-fresh")}), QUIET)
    log = read_log(tmp_path / "run" / "flex-fresh-seed0" / "metrics.jsonl")
    grafts = [event for event in log if event["event"] == "graft"]
    assert {(e["client_id"], e["layer"], e["width"]) for e in grafts} == {(c, n, 24) for c in "ab" for n in (0, 1)}
    assert all(len(event["opening"]) == 2 for event in log if event["event"] == "train")


def test_a_configuration_may_begin_with_a_byte_order_mark(tmp_path):
    from flex.config import read_config

    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbf" + b"[train]\nrounds = 3\n")
    assert read_config(tmp_path / "c.toml").train.rounds == 3
