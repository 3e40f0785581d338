"""The bench of a whole model runs, each way to the same loss."""

import pytest
import torch

from benchmarks import whole_model

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_experts": 4}
WIDTHS = {"intermediate_size": 32, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft 0.21 asks transformers 5.23
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")  # of grouped_mm
def test_every_way_is_measured() -> None:
    torch._dynamo.reset()
    sizes = {**whole_model.SIZES, **SMALL, **WIDTHS, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    rows = whole_model.measure(sizes, batch=2, length=8, backend="aot_eager", rounds=1)
    assert [row[0] for row in rows] == ["grouped_mm eager", "grouped_mm compiled", "flex eager", "flex compiled"]
    assert rows[2][2] == "1.00"
