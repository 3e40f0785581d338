"""`[model] experts = "nf4"` in a run: a base that is kept in 8 or 4 bits, from dense files or its own."""

import dataclasses

import pytest
import quantised
import torch
from rich.console import Console
from tiny import read_log, save_model, tiny_config
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM, Qwen2MoeForCausalLM

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


@pytest.mark.parametrize("layout", ["nf4-double", "llm-int8"])
def test_a_base_that_another_program_has_quantised(layout, tmp_path):
    dense = save_model(tmp_path / "dense", hidden_size=64, moe_intermediate_size=64)
    source, path = Qwen2MoeForCausalLM.from_pretrained(dense), tmp_path / "quantised"
    quantised.write(path, layout, source)
    format = quantised.LAYOUTS[layout][0]
    AutoTokenizer.from_pretrained(dense).save_pretrained(path)
    bases = [load_base(ModelConfig(path=str(path), experts=experts)) for experts in ("auto", format)]
    bases += [load_base(ModelConfig(path=str(dense), experts=experts)) for experts in ("auto", format)]
    assert next(iter(bases[0].layers.values())).down_proj.format == format
    names = [base.fingerprint for base in bases]
    assert names[0] == names[1]
    assert len({*names}) == 3  # another attention than the dense files have, whatever the experts are kept in
    flex_kernels.save_prepared(bases[0].model, tmp_path / "kept")
    bases[0].tokenizer.save_pretrained(tmp_path / "kept")
    assert load_base(ModelConfig(path=str(tmp_path / "kept"))).fingerprint == names[0]
    other = "int8" if format == "nf4" else "nf4"
    with pytest.raises(FlexError, match=f"experts.down_proj is in {format}, expected {other}"):
        load_base(ModelConfig(path=str(path), experts=other))


def test_a_run_on_a_base_that_bitsandbytes_has_quantised(tmp_path):
    path = save_model(tmp_path / "quantised", hidden_size=64, moe_intermediate_size=64)
    quantised.write(path, "nf4", Qwen2MoeForCausalLM.from_pretrained(path))
    config = tiny_config(tmp_path, model={"path": str(path)}).with_values(train={"methods": ("flex",)})
    run(config, Console(quiet=True))
    losses = [event["loss"] for event in read_log(tmp_path / "run" / "metrics.jsonl") if "bytes_up" in event]
    assert losses
    assert all(torch.isfinite(torch.tensor(losses)))


def test_experts_that_a_quantised_base_has_dense_stay_so_or_are_kept_as_is_asked(tmp_path, monkeypatch):
    path = save_model(tmp_path / "quantised", hidden_size=64, moe_intermediate_size=64)
    quantised.write(path, "nf4", Qwen2MoeForCausalLM.from_pretrained(path), experts=False)
    base = load_base(ModelConfig(path=str(path), experts="int8"))
    assert next(iter(base.layers.values())).down_proj.format == "int8"
    asked = []

    def theirs(path, **options):  # what bitsandbytes does with its own files is not tested here
        asked.append(path)
        raise ImportError("pip install bitsandbytes")

    monkeypatch.setattr("flex.model.base.AutoModelForCausalLM.from_pretrained", theirs)
    with pytest.raises(FlexError, match="pip install bitsandbytes"):
        load_base(ModelConfig(path=str(path)))
    assert asked == [str(path)]


def test_another_format_is_no_setting():
    with pytest.raises(FlexError, match=r"model.experts is .int4."):
        ModelConfig(experts="int4")


def test_shared_experts_by_the_fused_operation_are_the_same_base(tmp_path):
    config = tiny_config(tmp_path, model={"shared_experts": "dense"}).with_values(train={"methods": ("flex",)})
    path = config.model.path
    bases = {
        format: load_base(ModelConfig(path=path, shared_experts=format)) for format in ("auto", "dense", "int8", "nf4")
    }
    assert bases["dense"].fingerprint == bases["auto"].fingerprint  # what was trained on one goes on the other
    assert len({base.fingerprint for base in bases.values()}) == 3
    run(config, Console(quiet=True))
    plain = config.with_values(model={"shared_experts": "auto"})
    plain = dataclasses.replace(plain, output=str(tmp_path / "plain"))
    run(plain, Console(quiet=True))
    scores = [
        [e["loss"] for e in read_log(folder / "metrics.jsonl") if e.get("event") == "evaluate"]
        for folder in (tmp_path / "run", tmp_path / "plain")
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)
    adapted = config.with_values(lora={"targets": ("up_proj",)})
    with pytest.raises(FlexError, match=r"lora.targets names \['up_proj'\], which the model lacks"):
        run(dataclasses.replace(adapted, output=str(tmp_path / "adapted")), Console(quiet=True))


def test_a_base_without_shared_experts_is_named(tmp_path):
    path = str(save_model(tmp_path / "model"))
    with pytest.raises(FlexError, match=r"model.shared_experts is .fused."):
        ModelConfig(path=path, shared_experts="fused")
    mixtral = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    mixtral.save_pretrained(tmp_path / "mixtral")
    AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / "mixtral")
    with pytest.raises(FlexError, match=r"model.shared_experts = 'nf4': MixtralForCausalLM has no shared experts"):
        load_base(ModelConfig(path=str(tmp_path / "mixtral"), shared_experts="nf4"))
