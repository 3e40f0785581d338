"""`make full-size` from the making of its base to the last line, at small widths: at real ones it takes minutes."""

import json
from pathlib import Path

import pytest
import torch

from flex_kernels import FrozenWeight, load_prepared
from flex_kernels.weight_files import INDEX
from tools import full_size


def changed(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    real = full_size.base_config

    def base_config(*arguments: object) -> object:
        config = real(*arguments)
        config.update(sizes)
        return config

    monkeypatch.setattr(full_size, "base_config", base_config)


SMALL = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def test_one_layer_of_eight_experts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(monkeypatch, **SMALL)
    assert full_size.main(["--layers", "1", "--experts", "8", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for what in ("GB on disk, made in", "one round of two clients:", "peak memory of this process:"):
        assert what in printed
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {event.get("client_id") for event in events if "bytes_up" in event} == {"a", "b"}


def test_a_base_is_made_in_its_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed(monkeypatch, **SMALL)
    full_size.make_base(tmp_path, 2, 5, "nf4")
    about = json.loads((tmp_path / INDEX).read_text())["metadata"]["flex_experts"]
    assert (about["format"], about["source"]) == ("nf4", "random weights, seed 0")
    model = load_prepared(tmp_path)
    experts = model.model.layers[1].mlp.experts
    assert isinstance(experts.gate_up_proj, FrozenWeight)
    assert experts.gate_up_proj.shape == (5, 96, 64)
    assert float(experts.down_proj.dequantize().float().std()) == pytest.approx(0.02, rel=0.1)
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
