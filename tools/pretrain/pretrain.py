"""Pretrain a small Qwen2-MoE from nothing: the demo's base model, or one on real text and instructions.

    python -m tools.pretrain --out runs/demo_base --dtype bfloat16
    python -m tools.pretrain --out runs/base --tokenizer DIR --text A.txt --data B.jsonl.gz --skip category=qa

The loss is next-token cross-entropy plus the load-balancing term of the Switch Transformer (arXiv 2101.03961, eq. 4-6),
`CE + balance * num_experts * sum_e share_of_tokens_e * mean_router_probability_e`. The schedule counts steps, not
seconds, and every draw comes from `seed`: one machine, one thread count and one command give one model.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2MoeConfig, Qwen2MoeForCausalLM

from flex.data.examples import IGNORED, Batch
from flex.errors import FlexError
from tools.pretrain.corpus import Corpus, demo_corpus, packed_corpus

EXPERTS_IMPLEMENTATION = "grouped_mm"  # transformers' own: the experts' weights are trained here, nothing is frozen
DECAY_FROM = 0.55  # the share of the steps after which the learning rate falls
FINAL_RATE = 0.02  # of the peak learning rate
ADAM_BETAS = (0.9, 0.98)
MAX_GRAD_NORM = 1.0


def _option(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class PretrainConfig:
    """What to pretrain on (without `text` and `data`: the demo's general mixture), the model's shape, the schedule."""

    out: Path
    text: tuple[Path, ...] = _option((), "UTF-8 text files")
    data: tuple[Path, ...] = _option((), "instruction records, .jsonl or .jsonl.gz")
    skip: str = _option("", "COLUMN=VALUE,VALUE: records of --data to leave out, such as the clients' own")
    tokenizer: str = _option("", "folder or hub name of a tokenizer; the demo's mixture has its own")
    loss: str = _option("response", "on instruction records: response, or full (the prompt counts, too)")
    hidden: int = _option(128, "width of the hidden states")
    layers: int = _option(4, "number of layers")
    heads: int = _option(4, "attention heads")
    experts: int = _option(16, "routed experts in a layer")
    top_k: int = _option(2, "experts a token goes to")
    expert_width: int = _option(96, "intermediate width of a routed expert")
    shared_width: int = _option(32, "intermediate width of the shared expert")
    length: int = _option(128, "tokens in a window of packed text; the model's longest input")
    steps: int = _option(4000, "optimizer steps")
    batch_size: int = _option(64, "examples or windows in a step")
    learning_rate: float = _option(2e-3, "peak learning rate of AdamW")
    warmup: int = _option(50, "steps of linear warm-up")
    weight_decay: float = _option(0.05, "on matrices; vectors do not decay")
    balance: float = _option(0.01, "weight of the load-balancing term")
    seed: int = _option(0, "of the initial weights and of every draw")
    dtype: str = _option("float32", "of the saved weights, float32 or bfloat16; training is in float32")
    threads: int = _option(0, "of torch; 0: torch's own choice")
    log_every: int = _option(200, "steps between two held-out scores")
    overwrite: bool = _option(False, "replace what lies in --out")

    def __post_init__(self) -> None:
        shape = ("hidden", "layers", "heads", "experts", "top_k", "expert_width", "shared_width", "length")
        for name in (*shape, "steps", "batch_size", "warmup", "log_every"):
            self._require(name, getattr(self, name) >= 1, "1 or more")
        self._require("hidden", self.hidden % (2 * self.heads) == 0, f"a multiple of twice --heads ({2 * self.heads})")
        self._require("top_k", self.top_k <= self.experts, f"at most --experts ({self.experts})")
        self._require("learning_rate", 0 < self.learning_rate < math.inf, "a finite number above 0")
        for name in ("weight_decay", "balance", "threads"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "a finite number from 0 up")
        self._require("dtype", self.dtype in ("float32", "bfloat16"), "float32 or bfloat16")
        self._require("loss", self.loss in ("response", "full"), "response or full")
        self._require("skip", not self.skip or "=" in self.skip, "COLUMN=VALUE,VALUE")
        if self.is_demo:
            self._require("tokenizer", not self.tokenizer, "none without --text or --data: the demo has its own")
        else:
            self._require("tokenizer", bool(self.tokenizer), "a tokenizer's folder or hub name for --text and --data")
        self._require("out", not self.out.exists() or self.out.is_dir(), "a folder, and this is a file")
        occupied = self.out.is_dir() and any(self.out.iterdir())
        self._require("out", self.overwrite or not occupied, "a new or empty folder, or --overwrite")

    def _require(self, name: str, condition: bool, wanted: str) -> None:
        if not condition:
            value = getattr(self, name)
            shown = str(value) if isinstance(value, Path) else repr(value)
            raise FlexError(f"--{name.replace('_', '-')} is {shown}; expected {wanted}")

    @property
    def is_demo(self) -> bool:
        return not self.text and not self.data


def load_corpus(config: PretrainConfig) -> Corpus:
    if config.is_demo:
        return demo_corpus(config.batch_size, config.length, config.seed)
    return packed_corpus(
        config.text,
        config.data,
        config.tokenizer,
        skip=config.skip,
        full_loss=config.loss == "full",
        batch_size=config.batch_size,
        length=config.length,
        seed=config.seed,
    )


def build_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> Qwen2MoeForCausalLM:
    """A new Qwen2-MoE in float32, the same for the same seed; the caller's random state is left as it was."""
    shape = Qwen2MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        moe_intermediate_size=config.expert_width,
        shared_expert_intermediate_size=config.shared_width,
        num_experts=config.experts,
        num_experts_per_tok=config.top_k,
        norm_topk_prob=True,
        router_aux_loss_coef=config.balance,
        max_position_embeddings=config.length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Qwen2MoeForCausalLM(shape)
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    return model


def learning_rate(config: PretrainConfig, step: int) -> float:
    """Linear warm-up, then constant, then a linear fall to FINAL_RATE of the peak; `step` counts from 0."""
    warm = min(1.0, (step + 1) / config.warmup)
    left = min(1.0, (1 - step / config.steps) / (1 - DECAY_FROM))
    return config.learning_rate * warm * (FINAL_RATE + (1 - FINAL_RATE) * left)


def train(model: Qwen2MoeForCausalLM, corpus: Corpus, config: PretrainConfig, console: Console) -> None:
    """`config.steps` steps of AdamW; prints the held-out score now and then."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=ADAM_BETAS)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("pretraining", total=config.steps)
        for step, batch in enumerate(itertools.islice(corpus.batches, config.steps)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            model.train()
            loss = training_loss(model, batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            progress.update(task, advance=1, description=f"loss {loss.item():.3f}")
            if (step + 1) % config.log_every == 0:
                console.print(f"step {step + 1}: loss {loss.item():.3f}, held out: {_short(corpus.held_out(model))}")


def training_loss(model: Qwen2MoeForCausalLM, batch: Batch) -> Tensor:
    """Mean cross-entropy of the labelled tokens plus the load-balancing term."""
    output = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, output_router_logits=True
    )
    targets = batch.labels[:, 1:].flatten()
    labelled = targets != IGNORED
    logits = output.logits[:, :-1].flatten(0, 1)[labelled]
    return F.cross_entropy(logits, targets[labelled]) + model.config.router_aux_loss_coef * output.aux_loss


def run(config: PretrainConfig, console: Console | None = None) -> dict[str, Any]:
    """Pretrain and save into `config.out`; returns what is also written to `pretrain.json` there.

    The folder appears whole or not at all. The held-out score is taken twice: of the trained weights, and of the saved
    ones, rounded to `config.dtype` and read back.
    """
    console = console or Console(stderr=True)
    started = time.perf_counter()
    corpus = load_corpus(config)
    model = build_model(config, corpus.tokenizer)
    num_parameters = sum(p.numel() for p in model.parameters())
    console.print(f"{num_parameters / 1e6:.2f} M parameters, {torch.get_num_threads()} thread(s)")
    train(model, corpus, config, console)
    trained = corpus.held_out(model)
    seconds = time.perf_counter() - started
    model.to(getattr(torch, config.dtype))
    with _whole_folder(config.out) as folder:
        model.save_pretrained(folder)
        corpus.tokenizer.save_pretrained(folder)
        saved = corpus.held_out(Qwen2MoeForCausalLM.from_pretrained(folder, dtype=torch.float32))
        record = {
            "settings": _settings(config),
            "parameters": num_parameters,
            "seconds": round(seconds),
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "held_out": {"trained": trained, "saved": saved},
        }
        (folder / "pretrain.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print(f"saved in {config.out} as {config.dtype}; held out: {_short(saved)}")
    return record


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place at the end; after an error nothing has changed."""
    temporary, replaced = (folder.with_name(f".{folder.name}.{what}-{os.getpid()}") for what in ("new", "old"))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            os.replace(folder, replaced)
        os.replace(temporary, folder)
    except OSError as error:
        raise FlexError(f"the model cannot be saved in {folder}: {error}") from None
    finally:
        if replaced.exists() and not folder.exists():
            os.replace(replaced, folder)
        for leftover in (temporary, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def _settings(config: PretrainConfig) -> dict[str, Any]:
    """The config as JSON; files by their names alone, since folders differ from machine to machine."""
    values = dataclasses.asdict(config)
    values.update(text=[p.name for p in config.text], data=[p.name for p in config.data])
    values["tokenizer"] = Path(config.tokenizer).name
    for name in ("out", "overwrite", "threads", "log_every"):
        del values[name]
    return values


def _short(scores: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if isinstance(value, float))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for every field of `PretrainConfig`, under the field's name."""
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, its tokenizer and pretrain.json")
    for field in dataclasses.fields(PretrainConfig)[1:]:
        option, text = f"--{field.name.replace('_', '-')}", field.metadata["help"]
        if field.default is False:
            parser.add_argument(option, action="store_true", help=text)
        elif field.default == ():
            parser.add_argument(option, type=Path, nargs="+", default=[], metavar="FILE", help=text)
        else:
            shown = f"{text} (default {field.default})" if field.default != "" else text
            parser.add_argument(option, type=type(field.default), default=field.default, metavar="X", help=shown)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, 2 after one sentence on what was wrong with the input, or 130 where Ctrl-C ended it."""
    parser = argparse.ArgumentParser(prog="python -m tools.pretrain", description=__doc__.splitlines()[0])
    add_arguments(parser)
    values = vars(parser.parse_args(arguments))
    values.update(text=tuple(values["text"]), data=tuple(values["data"]))
    try:
        config = PretrainConfig(**values)
        if config.threads:
            torch.set_num_threads(config.threads)
        run(config)
    except FlexError as error:
        print(f"pretrain: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"pretrain: interrupted; {config.out} is as it was", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
