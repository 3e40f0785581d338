"""Pretraining: runs both ways, the same twice, saved whole or not at all, bad input refused in one sentence."""

import gzip
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from flex.data.examples import IGNORED
from flex.demo.language import build_tokenizer
from flex.errors import FlexError
from tools.pretrain import pretrain
from tools.pretrain.corpus import packed_corpus
from tools.pretrain.pretrain import PretrainConfig

TINY = {
    "hidden": 16, "layers": 1, "heads": 2, "experts": 4, "expert_width": 8, "shared_width": 8,
    "steps": 3, "batch_size": 4, "log_every": 2,
}  # fmt: skip
QUIET = Console(quiet=True)


@pytest.fixture
def real(tmp_path) -> dict[str, object]:
    """A text file, instruction records and a tokenizer, as a user would bring them."""
    text, data, tokenizer = tmp_path / "a.txt", tmp_path / "b.jsonl.gz", tmp_path / "tokenizer"
    text.write_text("the first of this list is red and the list is larger.\n" * 40)
    records = [
        {
            "instruction": f"what is {i} plus 1?",
            "context": "",
            "response": str(i + 1),
            "kind": "odd" if i % 2 else "even",
        }
        for i in range(30)
    ]
    with gzip.open(data, "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    build_tokenizer().save_pretrained(tokenizer)
    return {"text": (text,), "data": (data,), "tokenizer": str(tokenizer)}


def test_the_demo_trains_and_loads_again(tmp_path):
    out = tmp_path / "runs" / "base"
    record = pretrain.run(PretrainConfig(out=out, dtype="bfloat16", **TINY), QUIET)
    assert json.loads((out / "pretrain.json").read_text()) == record
    assert record["settings"]["steps"] == 3
    assert set(record["held_out"]) == {"trained", "saved"}
    assert "rotate" not in record["held_out"]["saved"]["by_skill"]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(out).chat_template == build_tokenizer().chat_template
    assert [path.name for path in out.parent.iterdir()] == ["base"]


def test_the_same_command_gives_the_same_bits_and_leaves_the_random_state_alone(tmp_path):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pretrain.run(PretrainConfig(out=tmp_path / name, seed=seed, **TINY), QUIET)
    assert torch.equal(before, torch.random.get_rng_state())
    first, again, other = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_real_text_and_instructions_train(tmp_path, real):
    config = PretrainConfig(out=tmp_path / "base", length=32, loss="full", **TINY, **real)
    record = pretrain.run(config, QUIET)
    assert record["held_out"]["saved"]["loss"] > 0
    assert record["settings"]["text"] == ["a.txt"]
    assert str(tmp_path) not in (tmp_path / "base" / "pretrain.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "base").config.max_position_embeddings == 32


def corpus(real: dict[str, object], **changes):
    options = {"skip": "", "full_loss": False, "batch_size": 2, "length": 64, "seed": 0, **changes}
    return packed_corpus(real["text"], real["data"], real["tokenizer"], **options)


def test_packing_keeps_every_token_and_trains_on_responses_alone(real):
    masked = next(corpus({**real, "text": ()}).batches)
    full = next(corpus({**real, "text": ()}, full_loss=True).batches)
    text = next(corpus({**real, "data": ()}).batches)
    assert masked.input_ids.shape == (2, 64)
    assert torch.equal(masked.input_ids, full.input_ids)
    assert torch.equal(full.labels, full.input_ids)
    assert torch.equal(text.labels, text.input_ids)
    eos = build_tokenizer().eos_token_id
    trained = masked.labels != IGNORED
    assert trained[masked.input_ids == eos].all()
    assert trained.sum() == 2 * (masked.input_ids == eos).sum()  # every response here is one word


def test_skipped_records_are_not_seen(real):
    for skip, expected in (("", True), ("kind=odd,none", False)):
        batches = corpus({**real, "text": ()}, skip=skip).batches
        shown = build_tokenizer().decode(torch.cat([next(batches).input_ids.flatten() for _ in range(40)]))
        assert "what is 14 plus" in shown
        assert ("what is 13 plus" in shown) == expected


def test_a_broken_save_leaves_what_was_there(tmp_path, monkeypatch):
    out = tmp_path / "base"
    pretrain.run(PretrainConfig(out=out, **TINY), QUIET)
    kept = (out / "pretrain.json").read_text()

    def full_disk(source: Path, target: Path) -> None:
        if ".new-" in str(source):
            raise OSError(28, "No space left on device")
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(pretrain.os, "replace", full_disk)
    with pytest.raises(FlexError, match="No space left"):
        pretrain.run(PretrainConfig(out=out, overwrite=True, seed=3, **TINY), QUIET)
    assert (out / "pretrain.json").read_text() == kept
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_the_rate_rises_stays_and_falls():
    config = PretrainConfig(out=Path("unused"), steps=1000, warmup=10, learning_rate=1.0)
    rates = [pretrain.learning_rate(config, step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:550] == pytest.approx([1.0] * 540)
    assert all(earlier > later for earlier, later in itertools.pairwise(rates[551:]))
    assert rates[-1] == pytest.approx(0.02, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 0}, "--steps is 0; expected 1 or more"),
        ({"hidden": 30, "heads": 4}, "--hidden is 30; expected a multiple of twice --heads (8)"),
        ({"top_k": 9, "experts": 8}, "--top-k is 9; expected at most --experts (8)"),
        ({"dtype": "int8"}, "--dtype is 'int8'; expected float32 or bfloat16"),
        ({"loss": "half"}, "--loss is 'half'; expected response or full"),
        ({"skip": "category"}, "--skip is 'category'; expected COLUMN=VALUE,VALUE"),
        ({"tokenizer": "x"}, "--tokenizer is 'x'; expected none without --text or --data"),
        ({"text": (Path("a.txt"),)}, "--tokenizer is ''; expected a tokenizer's folder"),
    ],
)
def test_bad_settings_are_named(changes, sentence):
    with pytest.raises(FlexError) as error:
        PretrainConfig(out=Path("unused"), **changes)
    assert sentence in str(error.value)


def test_bad_files_end_with_one_sentence_and_nothing_written(tmp_path, real, capsys):
    out = tmp_path / "base"
    empty = tmp_path / "empty.txt"
    empty.touch()
    common = ["--out", str(out), "--tokenizer", real["tokenizer"], "--steps", "1"]
    for arguments, sentence in (
        (["--text", str(tmp_path / "none.txt")], "none.txt cannot be read"),
        (["--text", str(empty)], "empty.txt is empty"),
        (["--data", str(tmp_path / "none.jsonl")], "no data file at"),
        (["--text", str(real["text"][0]), "--tokenizer", str(tmp_path)], "no tokenizer can be loaded"),
    ):
        assert pretrain.main([*common, *arguments]) == 2
        message = capsys.readouterr().err
        assert sentence in message
        assert "Traceback" not in message
    assert not out.exists()
    assert pretrain.main(["--out", str(tmp_path)]) == 2
    assert "expected a new or empty folder, or --overwrite" in capsys.readouterr().err
