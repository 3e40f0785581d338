"""`lora.targets = "auto"`: the linear layers of attention of every family, each trained, and nothing else."""

import families
import peft
import pytest
import torch
from torch import nn
from transformers import JambaConfig, JambaForCausalLM

from flex.config import LoraSettings
from flex.errors import FlexError
from flex.model.attention import attention_linears, targets_of

FAMILIES = families.experts_classes()
AUTO = LoraSettings(rank=1, targets=("auto",))
FOUR = ("q_proj", "k_proj", "v_proj", "o_proj")
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
# What a family has besides the four of most, or in their place.
OTHERS = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "mistral4"), LATENT),
    "minimax": (*FOUR, "qkv_proj", "out_proj", "output_gate"),
    "laguna": (*FOUR, "g_proj"),
}
NO_ATTENTION = {"jamba"}  # its tiny model has two Mamba layers
SHORT = {"deepseek_v4"}  # compresses blocks of tokens, of which the short inputs fill none


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")  # of transformers, on optional kernels of some families
def test_every_family_has_attention_to_train(family: str) -> None:
    model = families.build(family, FAMILIES[family])
    if family in NO_ATTENTION:
        with pytest.raises(FlexError, match="has no linear layers of attention"):
            targets_of(model, AUTO)
        return
    full = attention_linears(model)
    targets = targets_of(model, AUTO)
    if family in ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "gpt_oss", "phimoe", "qwen3_next"):
        assert targets == FOUR
    assert targets == OTHERS.get(family, targets)
    assert not [name for name in full if "expert" in name or "indexer" in name or "router" in name]
    if targets == FOUR:  # trained in whole runs; what follows is for those of other shapes
        return
    model.requires_grad_(False)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=list(targets)))
    trained = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    assert sorted(name.partition(".lora_B")[0] for name in trained) == sorted(full)
    out = model(**families.inputs_of(family), use_cache=False)
    out = out.logits if "logits" in out else out[0]
    out.square().sum().backward()
    idle = [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    assert not idle or family in SHORT


def test_an_attention_among_other_layers_is_found() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = JambaConfig(
        vocab_size=64, num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, num_experts=4, **sizes
    )
    with torch.device("meta"):
        model = JambaForCausalLM(config)
    assert targets_of(model, AUTO) == FOUR
    assert len(attention_linears(model)) == 8


def test_a_name_that_also_stands_elsewhere_is_written_out() -> None:
    class OwnAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

    model = nn.ModuleDict({"attention": OwnAttention(), "out": nn.Linear(4, 9)})
    assert targets_of(model, AUTO) == ("attention.qkv", "attention.out")
    del model["out"]
    assert targets_of(model, AUTO) == ("qkv", "out")
    assert targets_of(model, LoraSettings(rank=1, targets=("attention.qkv",))) == ("attention.qkv",)


def test_a_name_that_the_model_lacks_is_told_of_auto() -> None:
    model = families.build("deepseek_v3", FAMILIES["deepseek_v3"])
    with pytest.raises(FlexError) as caught:
        targets_of(model, LoraSettings(targets=("q_proj", "o_proj")))
    assert "lora.targets names ['q_proj'], which the model lacks; it has down_proj" in str(caught.value)
    assert str(caught.value).endswith('(expected some of them, or "auto": those of its attention)')


def test_a_layer_smaller_than_the_rank_is_left_out_by_auto_and_refused_by_name() -> None:
    model = families.build("deepseek_v3", FAMILIES["deepseek_v3"])
    assert "q_a_proj" in targets_of(model, LoraSettings(rank=16, targets=("auto",)))
    few = targets_of(model, LoraSettings(rank=24, targets=("auto",)))
    assert few
    assert not [name for name in few if name.endswith("q_a_proj")]
    with pytest.raises(
        FlexError, match=r"lora.rank is 24; expected at most 16, the smaller side of model.layers.0.self"
    ):
        targets_of(model, LoraSettings(rank=24, targets=("q_a_proj",)))
    with pytest.raises(FlexError, match=r"a LoRA of rank 1000 fits; expected the names of some, or a lower lora.rank"):
        targets_of(model, LoraSettings(rank=1000, targets=("auto",)))
