"""What loading takes on trust: a base with tensors missing or broken, or tokens without a row, is refused early."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import records, save_model, tiny_config, write_records

from flex.config import ModelConfig
from flex.data.examples import Encoder
from flex.demo.language import build_tokenizer
from flex.errors import FlexError
from flex.model.base import load_base
from flex.runs.world import load_world


def spoiled(folder, change):
    """A tiny base whose checkpoint went through `change`, a function of its tensors."""
    file = save_model(folder / "model") / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return ModelConfig(path=str(folder / "model"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda state: {k: v for k, v in state.items() if "layers.1.mlp.experts" not in k},
            "lacks the tensor .*layers.1",
        ),
        (
            lambda state: {k: v for k, v in state.items() if "layers.0.mlp.gate." not in k},
            "lacks the tensor .*mlp.gate.weight",
        ),
        (lambda state: {f"module.{k}": v for k, v in state.items()}, "lacks the tensor .* and [0-9]+ more"),
        (lambda state: {**state, "model.norm.weight": torch.ones(7)}, "model.norm.weight"),
    ],
    ids=["a shard is lost", "a router is lost", "a prefix", "another shape"],
)
def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path, change, sentence):
    with pytest.raises(FlexError, match=sentence):
        load_base(spoiled(tmp_path, change))


def test_tensors_that_nobody_reads_are_no_fault(tmp_path):
    load_base(spoiled(tmp_path, lambda state: {**state, "model.mtp.weight": torch.ones(3)}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    def spoil(state):
        state["model.layers.1.self_attn.q_proj.weight"][3, 4] = value
        return state

    with pytest.raises(FlexError, match=r"has 1 NaN or infinite values in model\.layers\.1\.self_attn\.q_proj"):
        load_base(spoiled(tmp_path, spoil))


def test_large_weights_are_no_fault(tmp_path):
    load_base(spoiled(tmp_path, lambda state: {**state, "model.norm.weight": torch.full((32,), 3e38)}))


@pytest.mark.parametrize("method", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "awq", "bits": 4}])
def test_a_base_that_needs_a_package_which_is_not_here_gets_one_sentence(tmp_path, method):
    file = save_model(tmp_path / "model") / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": method}))
    with pytest.raises(FlexError, match="no model can be loaded from"):
        load_base(ModelConfig(path=str(tmp_path / "model")))


def test_the_folder_of_an_adapter_is_no_base(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(FlexError, match="is a peft adapter; expected the base that it was trained on"):
        load_base(ModelConfig(path=str(tmp_path / "adapter")))


def test_a_token_without_a_row_in_the_embedding_is_named(tmp_path):
    config = tiny_config(tmp_path)
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<domain>"])
    tokenizer.save_pretrained(tmp_path / "model")
    rows = records("a", 8) + records("b", 8)
    load_world(config, 0)  # as long as no text holds it
    rows[5]["instruction"] = "<domain> which is larger , 3 or 4 ?"
    write_records(tmp_path / "data" / "train.jsonl", rows)
    with pytest.raises(FlexError, match=r"the token '<domain>' has id \d+, but the model's embedding has \d+ rows"):
        load_world(config, 0)
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(FlexError, match=r"the token '\[PAD\]' has id"):
        Encoder(tokenizer, "alpaca", 64, len(tokenizer) - 1)
