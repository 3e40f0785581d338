"""Whole runs on models of other families: what README names runs, and what cannot is said before anything trains."""

import families
import pytest
from rich.console import Console
from tiny import read_log, tiny_config

from flex.demo.language import build_tokenizer
from flex.errors import FlexError
from flex.runs.run import run

FAMILIES = families.experts_classes()
AUTO = {"rank": 4, "alpha": 8.0, "targets": ("auto",)}
# What a router's distribution is, where it is no softmax; Phi's two weights are those of two softmaxes.
SOURCES = {"deepseek_v3": "sigmoid", "phimoe": "kept"}
SHORT = {"rounds": 1, "steps": 1, "batch_size": 2}
QUIET = Console(quiet=True)


@pytest.fixture
def config_of(tmp_path, monkeypatch):
    """A run on a tiny model of a family, with the demo's tokenizer."""

    def make(family, methods, **sections):
        tokenizer = build_tokenizer()
        monkeypatch.setitem(families.SIZES, "vocab_size", len(tokenizer))
        for name in ("pad", "bos", "eos"):
            monkeypatch.setitem(families.SIZES, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
        tiny_config(tmp_path)  # the data
        folder = tmp_path / family
        families.build(family, FAMILIES[family]).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        sections = {"lora": AUTO, "train": {**SHORT, "methods": methods}, **sections}
        return tiny_config(tmp_path, **sections).with_values(model={"path": str(folder)}, evaluate={"rouge": False})

    return make


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "mixtral", "olmoe", "qwen3_moe", "phimoe"])
@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
def test_a_family_trains_from_data_to_scores(config_of, tmp_path, family):
    config = config_of(family, ("fedavg", "flex"))
    run(config, QUIET)
    events = read_log(tmp_path / "run" / "metrics.jsonl")
    scored = {(e["method"], e["client_id"]) for e in events if e["event"] == "evaluate" and e["split"] == "test"}
    assert scored == {(method, client) for method in ("fedavg", "flex") for client in "ab"}
    routed = [e for e in events if e["event"] == "routed"]
    assert {(e["method"], e["client_id"]) for e in routed} == scored
    assert {source for e in routed for source in e["source"]} == {SOURCES.get(family, "softmax")}
    assert all(0 < own <= most + 1e-9 for e in routed for own, most in zip(e["entropy"], e["most"], strict=True))
    assert {(e["method"], e["client_id"]) for e in events if e["event"] in ("added", "cost")} == {
        ("flex", client) for client in "ab"
    }
    sent = {t["name"] for e in events if e["event"] == "sent" for t in e["tensors"]}
    assert sent
    assert all("self_attn" in name for name in sent)
    if family.startswith("deepseek"):
        assert any("kv_b_proj" in name for name in sent)
    # The run's own file says what "auto" stood for, and the same command goes on with it.
    assert '"auto"' not in (tmp_path / "run" / "config.toml").read_text().partition("targets")[2].partition("\n")[0]
    run(config, QUIET)


def test_experts_that_cannot_be_grafted_are_told_before_any_method_trains(config_of, tmp_path):
    with pytest.raises(FlexError, match="nothing can be grafted at"):
        run(config_of("gpt_oss", ("base", "fedavg", "flex-fresh", "flex")), QUIET)
    assert not (tmp_path / "run").exists()
    with pytest.raises(FlexError, match="nothing can be grafted at"):
        run(config_of("gpt_oss", ("fedavg", "flex-adapt")), QUIET)


def test_a_fresh_graft_works_on_any_experts(config_of, tmp_path):
    run(config_of("gpt_oss", ("fedavg", "flex-fresh")), QUIET)
    events = read_log(tmp_path / "run" / "metrics.jsonl")
    assert {e["method"] for e in events if e["event"] == "evaluate"} == {"fedavg", "flex-fresh"}
