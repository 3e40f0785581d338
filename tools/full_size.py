"""A federated round at the real sizes of Qwen1.5-MoE-A2.7B, its experts in 4 bits, on a machine with 24 GB (`make
full-size`).

    python -m tools.full_size [--layers 24] [--experts 60] [--model FOLDER] [--output runs/full-size]

Without `--model` the base has random weights. They are made matrix by matrix and written in the format at once, so
that no dense copy of the experts ever exists, in memory or on disk. Then two clients choose full grafts on 8 sequences
of 256 tokens each, train them with a LoRA on the attention for 5 steps of 4 sequences, and the server averages. At the
end stand sizes, minutes and the peak of this process' memory. The text is noise: what is shown is that it fits and how
long it takes, and nothing about quality.
"""

import argparse
import json
import random
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Qwen2MoeConfig

from flex.config import RunConfig
from flex.demo.language import build_tokenizer
from flex.errors import FlexError
from flex.runs.run import run
from flex_kernels import reference
from flex_kernels.weight_files import INDEX, PreparedWriter
from flex_kernels.weights import QUANTIZED, FrozenWeight

SEQUENCES, LENGTH, STEPS, BATCH = 8, 256, 5, 4
STD = 0.02  # of random weights
GB = 1e9


def base_config(layers: int, experts: int, tokenizer: PreTrainedTokenizerBase) -> Qwen2MoeConfig:
    """Qwen1.5-MoE-A2.7B, as its config.json has it, but for what is asked for."""
    return Qwen2MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        num_experts=experts,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        max_position_embeddings=8192,
        rms_norm_eps=1e-6,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.bfloat16,
    )


def make_base(folder: Path, layers: int, experts: int, format: str, seed: int = 0) -> None:
    """Random weights of these sizes, tensor by tensor into the files of `save_prepared`."""
    tokenizer = build_tokenizer()
    config = base_config(layers, experts, tokenizer)
    tokenizer.model_max_length = config.max_position_embeddings
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config).state_dict()
    writer = PreparedWriter(folder, config, format, f"random weights, seed {seed}")
    for name, like in shapes.items():
        writer.add(name, _random(name, like, format, generator))
    writer.close()
    tokenizer.save_pretrained(folder)


def _random(name: str, like: Tensor, format: str, generator: torch.Generator) -> Tensor:
    if like.dim() == 3:  # experts, each made and forgotten
        parts = [
            reference.quantize(torch.randn(like.shape[1:], generator=generator) * STD, format)
            for _ in range(like.shape[0])
        ]
        codes, scales = (torch.stack(part) for part in zip(*parts, strict=True))
        return FrozenWeight(codes, scales, like.shape[2], torch.bfloat16)
    if like.dim() == 2:
        return (torch.randn(like.shape, generator=generator) * STD).to(torch.bfloat16)
    return (torch.zeros if name.endswith("bias") else torch.ones)(like.shape, dtype=torch.bfloat16)


def write_data(folder: Path) -> tuple[Path, Path]:
    """Records of two clients, each longer than `LENGTH` tokens, in words of the demo's language; and two to score."""
    words = sorted(word for word in build_tokenizer().get_vocab() if word.isalpha())
    draw = random.Random(0)

    def record(client: str) -> dict[str, str]:
        # A prompt that is too long loses its middle: every sequence has LENGTH tokens, and a whole answer.
        text = [" ".join(draw.choices(words, k=count)) for count in (12, LENGTH, LENGTH // 8)]
        return {**dict(zip(("instruction", "context", "response"), text, strict=True)), "client": client}

    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "train.jsonl", folder / "test.jsonl"
    for file, count in zip(files, (max(SEQUENCES, BATCH * STEPS), 1), strict=True):
        rows = [record(client) for client in ("a", "b") for _ in range(count)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


def run_config(base: Path | str, data: tuple[Path, Path], output: Path, format: str, criterion: str) -> RunConfig:
    return RunConfig(output=str(output), threads=0).with_values(
        model={"path": str(base), "dtype": "bfloat16", "device": "cpu", "experts": format},
        data={"train": str(data[0]), "test": str(data[1]), "max_length": LENGTH, "template": "auto"},
        lora={"rank": 16, "alpha": 32.0},
        graft={
            "criterion": criterion,
            "target": "output",
            "refit": False,
            "calibration_sequences": SEQUENCES,
            "training": "full",
        },
        # The activations of 24 layers would be the largest part of what is held, more than the experts.
        train={"methods": ("flex",), "rounds": 1, "steps": STEPS, "batch_size": BATCH, "gradient_checkpointing": True},
        evaluate={"batch_size": BATCH, "rouge": False},
    )


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--experts", type=int, default=60)
    parser.add_argument("--format", choices=QUANTIZED, default="nf4")
    parser.add_argument("--criterion", default="reconstruction", help="how a graft is chosen, as [graft] has it")
    parser.add_argument("--model", help="a folder or hub name of a real checkpoint instead of random weights")
    parser.add_argument("--output", type=Path, default=Path("runs/full-size"))
    given = parser.parse_args(arguments)
    console, started = Console(), time.perf_counter()
    base = given.model or given.output / "base"
    if given.model is None and not (base / INDEX).exists():
        console.print(f"making {given.layers} layers of {given.experts} experts in {given.format}, random weights")
        make_base(base, given.layers, given.experts, given.format)
    made = time.perf_counter()
    shutil.rmtree(given.output / "run", ignore_errors=True)
    config = run_config(base, write_data(given.output / "data"), given.output / "run", given.format, given.criterion)
    try:
        run(config, console)
    except FlexError as error:
        console.print(f"error: {error}", style="red")
        return 2
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if given.model is None:
        console.print(f"base: {folder_bytes(base) / GB:.2f} GB on disk, made in {(made - started) / 60:.1f} minutes")
    console.print(f"run: {folder_bytes(given.output / 'run') / GB:.2f} GB on disk")
    console.print(f"one round of two clients: {(done - made) / 60:.1f} minutes on {torch.get_num_threads()} threads")
    console.print(f"peak memory of this process: {peak / GB:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
