"""`[model] experts = "nf4"` in a run: a base that is kept in 8 or 4 bits, from dense files or its own."""

import dataclasses

import pytest
import torch
from rich.console import Console
from tiny import read_log, save_model, tiny_config

import flex_kernels
from flex.config import ModelConfig, read_config
from flex.errors import FlexError
from flex.model.base import load_base
from flex.runs.run import run
from flex_kernels import FrozenWeight


def test_fingerprints_tell_a_base_from_its_source_and_from_other_formats(tmp_path):
    path = str(save_model(tmp_path / "model"))
    bases = {experts: load_base(ModelConfig(path=path, experts=experts)) for experts in ("auto", "int8", "nf4")}
    assert len({base.fingerprint for base in bases.values()}) == 3
    layer = next(iter(bases["nf4"].layers.values()))
    assert isinstance(layer.gate_up_proj, FrozenWeight)
    flex_kernels.save_prepared(bases["nf4"].model, tmp_path / "kept")
    bases["nf4"].tokenizer.save_pretrained(tmp_path / "kept")
    for experts in ("auto", "nf4"):
        again = load_base(ModelConfig(path=str(tmp_path / "kept"), experts=experts))
        assert again.fingerprint == bases["nf4"].fingerprint
    with pytest.raises(FlexError, match="has its experts in nf4, expected int8"):
        load_base(ModelConfig(path=str(tmp_path / "kept"), experts="int8"))


@pytest.mark.parametrize("criterion", ["reconstruction", "neurons"])
def test_a_run_on_a_base_in_four_bits(tmp_path, criterion):
    config = tiny_config(tmp_path, model={"experts": "nf4"}, graft={"criterion": criterion})
    config = config.with_values(train={"methods": ("flex",)})
    run(config, Console(quiet=True))
    events = read_log(tmp_path / "run" / "metrics.jsonl")
    losses = [event["loss"] for event in events if event.get("event") == "trained" or "bytes_up" in event]
    assert losses
    assert all(torch.isfinite(torch.tensor(losses)))
    assert read_config(tmp_path / "run" / "config.toml").model.experts == "nf4"
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, experts="auto"))
    with pytest.raises(FlexError, match=r"other settings \(model.experts = 'nf4' there, 'auto' here\)"):
        run(other, Console(quiet=True))


def test_another_format_is_no_setting():
    with pytest.raises(FlexError, match=r"model.experts is .int4."):
        ModelConfig(experts="int4")
