"""A tiny random model of every family in the installed transformers whose experts carry the experts interface.

The families are found by walking the package. A model comes from its own config class: the fields of `SIZES` are
shrunk wherever a config has them, a list with one entry per layer keeps one layer of each kind, and `OWN` holds what
a few configs want besides. A family that can only be had otherwise goes to the list of exceptions in
`test_families.py`.
"""

import importlib
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers.models
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from flex_kernels.transformers_plug import moe_layers

EXPERTS, TOP_K, VOCABULARY = 6, 2, 64
LARGEST = 300_000  # parameters; a field that nobody shrank shows here, before any memory is taken
MOST_LAYERS = 4
SIZES = {
    **dict.fromkeys(("hidden_size", "moe_hidden_size", "ple_embed_dim"), 32),
    **dict.fromkeys(("intermediate_size", "dense_intermediate_size", "prefix_dense_intermediate_size"), 40),
    **dict.fromkeys(("moe_intermediate_size", "shared_experts_intermediate_size"), 24),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "router_hidden_size"), 24),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), TOP_K),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "swa_num_attention_heads", "linear_num_heads", "index_n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("mamba_num_heads", "linear_num_value_heads", "mamba_dt_rank", "mamba_d_state"), 4),
    **dict.fromkeys(("head_dim", "swa_head_dim", "v_head_dim", "qk_nope_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "ssm_state_size", "n_groups", "o_groups", "hc_lowrank"), 4),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "chunk_size", "mamba_chunk_size"), 16),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "index_topk", "hidden_size_per_layer_input"), 8),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 128,
}
OWN: dict[str, dict[str, Any]] = {
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse"]},
    "dots3_note": {"per_layer_config": None, "head_dim": 12},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [24, 16],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma4": {"enable_moe_block": True, "per_layer_config": None},
    "glm4v_moe": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [1, 1, 2],
            "partial_rotary_factor": 1.0,
        },
    },
    "glm5_next": {"index_kpool": 4, "qk_rope_head_dim": 0},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "mamba_n_heads": 8, "mamba_d_head": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "qwen4_exp": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "qwen3_omni_moe.Qwen3OmniMoeTalkerTextExperts": {"shared_expert_intermediate_size": 24},
    "zaya": {"num_experts_per_tok": 1},
}


def experts_classes() -> dict[str, type[nn.Module]]:
    """Every class that carries the interface, by family (`family.Class` for the further ones of a family)."""
    found: dict[str, type[nn.Module]] = {}
    for file in sorted(Path(transformers.models.__path__[0]).glob("*/*.py")):
        if "use_experts_implementation" not in file.read_text(encoding="utf-8") or file.stem.startswith("modular_"):
            continue
        module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
        for name, kind in _own_classes(module, nn.Module).items():
            if hasattr(kind, "_apply_gate") and hasattr(kind.forward, "__wrapped__"):
                found[file.parent.name if file.parent.name not in found else f"{file.parent.name}.{name}"] = kind
    return found


def build(family: str, experts_class: type[nn.Module]) -> PreTrainedModel:
    """A tiny random model with such experts, in eval mode.

    Raises:
        LookupError: none of the family's model classes holds such experts, or it cannot be made small.
    """
    module = importlib.import_module(experts_class.__module__)
    for model_class in _model_classes(module):
        config = shrunk(model_class.config_class, OWN.get(family, {}))
        with torch.device("meta"):
            probe = model_class(config)
        if not any(type(experts) is experts_class for experts in moe_layers(probe).values()):
            continue
        size, largest = max((p.numel(), name) for name, p in probe.named_parameters())
        if sum(p.numel() for p in probe.parameters()) > LARGEST:
            raise LookupError(f"{model_class.__name__} is too large: {largest} has {size} entries; shrink a field more")
        model = model_class(config).eval()
        _randomise(model)
        return model
    raise LookupError(f"no model class of {module.__name__} has {experts_class.__name__} in it")


def shrunk(config_class: type[PreTrainedConfig], own: dict[str, Any]) -> PreTrainedConfig:
    """The config class with small sizes and few layers."""
    default = config_class().to_dict()
    changes = {name: size for name, size in SIZES.items() if name in default}
    if "kv_lora_rank" in default:  # multi-head latent attention: as many keys as queries, head_dim follows
        changes["num_key_value_heads"] = changes["num_attention_heads"]
        changes.pop("head_dim", None)
    return config_class(**changes | _few_layers(default) | own)


def inputs_of(family: str) -> dict[str, Tensor]:
    """What its forward takes: token ids, and for two families something else."""
    generator = torch.Generator().manual_seed(1)
    if family == "qwen3_omni_moe.Qwen3OmniMoeTalkerTextExperts":  # its embeddings are another module's
        return {"inputs_embeds": torch.randn(2, 19, SIZES["hidden_size"], generator=generator)}
    token_ids = torch.randint(3, VOCABULARY, (2, 19), generator=generator)
    if family == "ernie4_5_vl_moe":  # tokens of images have experts of their own
        return {"input_ids": token_ids, "moe_mm_token_type_ids": token_ids % 2}
    return {"input_ids": token_ids}


def run(model: PreTrainedModel, implementation: str, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (hidden states of a model without a head), and every gradient of their product with noise."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    out = model(**inputs, use_cache=False)
    out = out.logits if "logits" in out else out[0]
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)))
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _few_layers(default: dict[str, Any]) -> dict[str, Any]:
    count = default.get("num_hidden_layers")
    if count is None:
        return {}
    lists = {name: x for name, x in default.items() if isinstance(x, list) and len(x) == count}
    kinds: dict[str, int] = {}  # one layer of each kind that occurs
    for index in range(count):
        kinds.setdefault(repr([x[index] for x in lists.values()]), index)
    kept = sorted(kinds.values())[:MOST_LAYERS]
    kept = kept if len(kept) > 1 else kept * 2
    return {"num_hidden_layers": len(kept), **{name: [x[index] for index in kept] for name, x in lists.items()}}


def _own_classes(module: ModuleType, base: type) -> dict[str, type]:
    classes = {name: kind for name, kind in vars(module).items() if inspect.isclass(kind) and issubclass(kind, base)}
    return {name: kind for name, kind in classes.items() if kind.__module__ == module.__name__ == kind.__module__}


def _model_classes(module: ModuleType) -> list[type[PreTrainedModel]]:
    """The smallest that makes logits first, then text models, then the rest."""
    order = ("ForCausalLM", "TextModel", "TalkerModel", "Model", "")
    names = [name for name in _own_classes(module, PreTrainedModel) if "PreTrainedModel" not in name]
    names.sort(key=lambda name: next(rank for rank, end in enumerate(order) if name.endswith(end)))
    return [getattr(module, name) for name in names]


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Weights large enough that every expert matters; tables of token ids to experts are filled as well."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1 or float(parameter.abs().sum()) == 0:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):  # deepseek_v4's hashed routing
            ids = torch.rand(len(buffer), EXPERTS, generator=generator).argsort(1)
            buffer.copy_(ids[:, : buffer.shape[1]])
