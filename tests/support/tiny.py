"""Small random models and data for the tests of `flex`: real model classes, real files, a second to train."""

import json
from pathlib import Path

import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from flex.config import GraftSettings, RunConfig
from flex.demo.language import build_tokenizer

PAPER = {"criterion": "reconstruction", "target": "output", "refit": False, "ridge": 1e-2, "refit_scale": 1.0}


def graft_settings(**settings: object) -> GraftSettings:
    """The paper's settings, and those that are named instead: what is tested does not hang on the defaults."""
    return GraftSettings(**{**PAPER, **settings})


def save_model(folder: Path, seed: int = 0, **changes: object) -> Path:
    """A random Qwen2-MoE of two layers with the demo's tokenizer, as `from_pretrained` wants it."""
    tokenizer = build_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "max_position_embeddings": 128,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.2,
        **changes,
    }
    torch.manual_seed(seed)
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**settings))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_records(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def records(client: str, count: int, start: int = 0) -> list[dict]:
    """Prompts in the demo's language: which of two numbers is larger, in the client's own words."""
    return [
        {
            "instruction": f"which is larger , {i % 40} or {(i * 7 + 3) % 40} ?",
            "context": "",
            "response": f"{max(i % 40, (i * 7 + 3) % 40)} {'kg' if client == 'a' else 'cm'}",
            "client": client,
            "group": "even" if i % 2 == 0 else "odd",
        }
        for i in range(start, start + count)
    ]


def save_data(folder: Path, clients: str = "ab") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_records(folder / "train.jsonl", [r for c in clients for r in records(c, 10)])
    write_records(folder / "test.jsonl", [r for c in clients for r in records(c, 6, start=20)])
    write_records(folder / "general.jsonl", records("a", 4, start=30))


def read_log(path: Path) -> list[dict]:
    """The events of a `metrics.jsonl` as they stand in the file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def tiny_config(folder: Path, **sections: dict) -> RunConfig:
    """A run of two clients, two rounds and two steps on a model and data in `folder`."""
    if not (folder / "model").exists():
        save_model(folder / "model")
        save_data(folder / "data")
    config = RunConfig(output=str(folder / "run"), threads=1).with_values(
        model={"path": str(folder / "model")},
        data={
            "train": str(folder / "data" / "train.jsonl"),
            "test": str(folder / "data" / "test.jsonl"),
            "general": str(folder / "data" / "general.jsonl"),
            "group_by": "group",
            "template": "chat",
            "max_length": 64,
        },
        lora={"rank": 2, "alpha": 4.0, "dropout": 0.1},
        train={"rounds": 2, "steps": 2, "batch_size": 3, "learning_rate": 3e-3, "graft_learning_rate": 3e-3},
        evaluate={"batch_size": 8, "max_new_tokens": 4},
    )
    return config.with_values(**sections)
