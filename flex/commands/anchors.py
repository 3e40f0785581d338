"""`flex anchors`: text drawn from the base itself, for who has no general text of their own."""

import json
import os
from pathlib import Path

import torch
from transformers import GenerationConfig

from flex.config import ModelConfig
from flex.errors import FlexError, first_line, require
from flex.model.base import Base, load_base

BATCH_SIZE = 32
ASKED = "\u2063asked\u2063"  # stands in for a question where only what comes before it is looked at


def anchors(model: str, target: Path, count: int, length: int, seed: int) -> int:
    """Writes `count` texts of up to `length` tokens as JSON lines with a column `text`, for `anchor.text`.

    Raises:
        FlexError: a number out of range, a file that is there, or no base at `model`.
    """
    for name, value, least in (("--count", count, 1), ("--length", length, 2)):
        require(value >= least, f"{name} is {value}; expected {least} or more")
    require(not target.exists(), f"{target} is there; expected a file that is not there yet")
    texts = draw(load_base(ModelConfig(path=model)), count, length, seed)
    part = target.with_name(f".{target.name}.part")
    try:
        part.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        os.replace(part, target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise FlexError(f"cannot write {target}: {first_line(error)}") from None
    print(target)
    return 0


@torch.no_grad()
def draw(base: Base, count: int, length: int, seed: int) -> list[str]:
    """Texts sampled from the base as it is (temperature 1), from where a text or a user's turn begins."""
    tokenizer = base.tokenizer
    require(tokenizer.eos_token_id is not None, "the tokenizer has no end-of-sequence token; texts would never end")
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    start = torch.tensor([_beginning(tokenizer)], device=base.device)
    settings = GenerationConfig(
        max_new_tokens=max(1, length - start.shape[1]), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=pad,
    )  # fmt: skip
    kept, base.model.generation_config = base.model.generation_config, settings  # the checkpoint's own is left aside
    texts: list[str] = []
    try:
        with torch.random.fork_rng([base.device] if base.device.type == "cuda" else []):
            torch.manual_seed(seed)
            while len(texts) < count:
                size = min(BATCH_SIZE, count - len(texts))
                ids = base.model.generate(
                    input_ids=start.repeat(size, 1), attention_mask=torch.ones_like(start).repeat(size, 1)
                )
                texts += [tokenizer.decode(_whole(row, start.shape[1], tokenizer.eos_token_id)) for row in ids.tolist()]
    finally:
        base.model.generation_config = kept
    return texts


def _whole(row: list[int], start: int, end: int) -> list[int]:
    """A drawn row with its end token, without the padding behind it."""
    return row[: row.index(end, start) + 1] if end in row[start:] else row


def _beginning(tokenizer) -> list[int]:
    """What comes before a user's words in the chat template; without one, the token that begins a text."""
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": ASKED}]
        before = tokenizer.apply_chat_template(turn, tokenize=False).partition(ASKED)[0]
        if ids := tokenizer(before, add_special_tokens=False)["input_ids"]:
            return ids
    return [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
