"""What a base model is pretrained on: the demo's general mixture, or text and instruction records packed into windows.

A corpus is an endless stream of batches and a way to score a model on what is held out of that stream.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flex.config import EvaluateSettings
from flex.data.examples import IGNORED, Batch, Encoder
from flex.data.records import read_records
from flex.demo import data as demo
from flex.demo.language import build_tokenizer
from flex.errors import FlexError
from flex.evaluation.score import response_logits, score

DEMO_TESTS = 600
DEMO_TEST_BATCH = 100
HELD_OUT_ONE_IN = 100  # pieces of real text and instructions kept for the held-out loss
HELD_OUT_BATCHES = 8  # at most: the held-out loss is taken every log_every steps

Piece = tuple[list[int], list[int]]  # input_ids, labels


@dataclass(frozen=True)
class Corpus:
    """`held_out(model)` gives the "loss" in nats a labelled token and, for the demo, "exact_match" and "by_skill"."""

    tokenizer: PreTrainedTokenizerBase
    batches: Iterator[Batch]
    held_out: Callable[[nn.Module], dict[str, Any]]


def demo_corpus(batch_size: int, max_length: int, seed: int) -> Corpus:
    """The demo's general mixture, loss on the response; held out: prompts that the stream never shows."""
    tokenizer = build_tokenizer()
    encoder = Encoder(tokenizer, "chat", max_length)
    tests = [encoder.example(record, group=record["skill"]) for record in demo.general_tests(seed, DEMO_TESTS)]
    settings = EvaluateSettings(batch_size=DEMO_TEST_BATCH, rouge=False)

    def batches() -> Iterator[Batch]:
        stream = demo.general_stream(seed)
        while True:
            yield encoder.batch([encoder.example(record) for record in itertools.islice(stream, batch_size)])

    def held_out(model: nn.Module) -> dict[str, Any]:
        scores = score(model, encoder, tests, settings)
        by_skill = {skill: round(group["exact_match"], 3) for skill, group in scores["groups"].items()}
        return {"loss": round(scores["loss"], 4), "exact_match": round(scores["exact_match"], 4), "by_skill": by_skill}

    return Corpus(tokenizer, batches(), held_out)


def packed_corpus(
    text: Sequence[Path],
    data: Sequence[Path],
    tokenizer_name: str,
    *,
    skip: str,
    full_loss: bool,
    batch_size: int,
    length: int,
    seed: int,
) -> Corpus:
    """Text files and instruction records, shuffled by pieces and packed end to end into windows of `length` tokens.

    Args:
        text: UTF-8 files, cut into pieces of `length` tokens.
        data: JSON lines with `instruction`, `context`, `response`, written into the Alpaca template.
        skip: "column=value,value": records to leave out, such as those the clients will train on.
        full_loss: whether the prompts of instruction records count in the loss, too.

    Raises:
        FlexError: a file or the tokenizer cannot be read, or there is not enough to train on.
    """
    tokenizer = _load_tokenizer(tokenizer_name)
    pieces = [*_text_pieces(text, tokenizer, length), *_record_pieces(data, tokenizer, length, skip, full_loss)]
    Random(f"pieces/{seed}").shuffle(pieces)
    cut = max(1, len(pieces) // HELD_OUT_ONE_IN)
    if len(pieces) <= cut:
        raise FlexError(f"the text and data hold {len(pieces)} piece(s) to train on; expected at least 2")
    tests = list(itertools.islice(_windows(pieces[:cut], batch_size, length, seed, endless=False), HELD_OUT_BATCHES))
    batches = _windows(pieces[cut:], batch_size, length, seed, endless=True)
    return Corpus(tokenizer, batches, lambda model: {"loss": round(mean_loss(model, tests), 4)})


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Mean cross-entropy of the labelled tokens of `batches`, in nats a token."""
    model.eval()
    total, num_tokens = 0.0, 0
    for batch in batches:
        logits, targets, _ = response_logits(model, batch)
        total += F.cross_entropy(logits.float(), targets, reduction="sum").item()
        num_tokens += len(targets)
    return total / max(1, num_tokens)


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FlexError(f"no tokenizer can be loaded from --tokenizer {name!r}: {reason}") from None
    if tokenizer.eos_token_id is None:
        raise FlexError(f"the tokenizer {name!r} has no end-of-sequence token; a model could never learn to stop")
    return tokenizer


def _text_pieces(paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[Piece]:
    for path in paths:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FlexError(f"the text file {path} cannot be read: {error}") from None
        if not text.strip():
            raise FlexError(f"the text file {path} is empty; expected UTF-8 text")
        lines = tokenizer(text.splitlines(keepends=True), add_special_tokens=False)["input_ids"]
        ids = list(itertools.chain.from_iterable(lines))
        for start in range(0, len(ids), length):
            piece = ids[start : start + length]
            yield piece, piece


def _record_pieces(
    paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase, length: int, skip: str, full_loss: bool
) -> Iterator[Piece]:
    column, _, values = skip.partition("=")
    skipped = set(values.split(","))
    encoder = Encoder(tokenizer, "alpaca", length)
    for path in paths:
        for record in read_records(path):
            if column and str(record.get(column)) in skipped:
                continue
            example = encoder.example(record)
            ids, prompt_length = list(example.input_ids), example.prompt_length
            yield ids, ids if full_loss else [IGNORED] * prompt_length + ids[prompt_length:]


def _windows(pieces: Sequence[Piece], batch_size: int, length: int, seed: int, *, endless: bool) -> Iterator[Batch]:
    """Batches of windows cut from the concatenated pieces, which are reshuffled every epoch.

    One window may hold several pieces. Without `endless`: one epoch, and its last, smaller batch too.
    """
    ids: list[int] = []
    labels: list[int] = []
    room = batch_size * length
    for epoch in itertools.count() if endless else range(1):
        for index in Random(f"epoch/{seed}/{epoch}").sample(range(len(pieces)), len(pieces)):
            ids += pieces[index][0]
            labels += pieces[index][1]
            while len(ids) >= room:
                yield _as_batch(ids[:room], labels[:room], length)
                ids, labels = ids[room:], labels[room:]
    whole = len(ids) // length * length
    if whole:
        yield _as_batch(ids[:whole], labels[:whole], length)
    elif ids:
        yield _as_batch(ids, labels, len(ids))


def _as_batch(ids: list[int], labels: list[int], length: int) -> Batch:
    input_ids = torch.tensor(ids).view(-1, length)
    return Batch(input_ids, torch.ones_like(input_ids), torch.tensor(labels).view(-1, length))
