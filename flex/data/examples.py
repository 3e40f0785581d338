"""Examples and splits: JSON lines -> one list of records per client -> token ids with labels on the response alone.

One prompt for training, evaluation and generation (`Encoder.prompt_ids`), and the end-of-sequence token is always
trained: a model never trained on it does not learn to stop.
"""

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flex.config import DataConfig
from flex.data.records import Record, read_records, unread_columns
from flex.data.splits import split_clients, split_held_out, split_validation, texts
from flex.errors import FlexError

IGNORED = -100  # the label that cross_entropy skips
CLOSED = "\u2063closed\u2063"  # stands in for an answer where only what follows it is looked at
PROMPT_TAIL = 16  # tokens at the end of a cut prompt that stay: they hold the template's call for the response

# The template of Stanford Alpaca (Taori et al. 2023), which the paper trains and tests with.
ALPACA_WITH_CONTEXT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Example:
    """One encoded sequence: the prompt's tokens, then the response's (with the end token unless it was cut)."""

    input_ids: tuple[int, ...]
    prompt_length: int
    response: str
    group: str = ""
    truncated: bool = False


@dataclass(frozen=True)
class Batch:
    """`input_ids`, `attention_mask`, `labels`: [B, L] int64, padded on the right; labels are -100 off the response."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ClientData:
    """One client's own examples. `validation` is a part of its training file that it never trains on; mostly empty."""

    client_id: str
    train: list[Example]
    test: list[Example]
    validation: list[Example] = field(default_factory=list)

    def parts(self) -> dict[str, list[Example]]:
        """The parts by name; one that is empty is left out."""
        parts = {"train": self.train, "test": self.test, "validation": self.validation}
        return {name: part for name, part in parts.items() if part}

    def fingerprint(self) -> str:
        """A name for these examples, in their order."""
        digest = hashlib.sha256()
        for part in (self.train, self.test):
            digest.update(f"{self.client_id}/{len(part)}".encode(errors="surrogatepass"))
            for example in part:
                digest.update(f"{example.input_ids}{example.prompt_length}".encode())
                digest.update(example.response.encode(errors="surrogatepass"))
        return digest.hexdigest()[:16]

    def truncated(self) -> dict[str, int]:
        return {name: sum(e.truncated for e in part) for name, part in self.parts().items()}


class Encoder:
    """Text -> tokens, the same way in training, evaluation and generation.

    Args:
        num_rows: of the model's embedding; None checks no token against it.
    """

    def __init__(self, tokenizer: Any, template: str, max_length: int, num_rows: int | None = None):
        if tokenizer.eos_token_id is None:
            raise FlexError("the tokenizer has no end-of-sequence token; a model could never learn to stop")
        if template == "chat" and not tokenizer.chat_template:
            raise FlexError('the tokenizer has no chat template; expected data.template = "alpaca"')
        self.tokenizer, self.template, self.max_length, self.num_rows = tokenizer, template, max_length, num_rows
        self.pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._check_rows([self.pad_id, tokenizer.eos_token_id])

    def end_ids(self) -> list[int]:
        """What ends an answer: the tokenizer's end of sequence, and the special token with which the chat template, if
        it is in use, closes an assistant's turn."""
        ends = [self.tokenizer.eos_token_id]
        if self.template == "chat":
            turn = [{"role": "user", "content": "x"}, {"role": "assistant", "content": CLOSED}]
            text = self.tokenizer.apply_chat_template(turn, tokenize=False)
            after = self.tokenizer(text.rpartition(CLOSED)[2], add_special_tokens=False)["input_ids"]
            ends += [token for token in after[:1] if token in self.tokenizer.all_special_ids]
        return list(dict.fromkeys(ends))

    def _check_rows(self, ids: Sequence[int]) -> None:
        highest = max(ids, default=0)
        if self.num_rows is not None and highest >= self.num_rows:
            raise FlexError(
                f"the token {self.tokenizer.convert_ids_to_tokens(highest)!r} has id {highest}, but the model's "
                f"embedding has {self.num_rows} rows; expected the tokenizer of this model, or a model resized to it "
                "(`resize_token_embeddings`)"
            )

    def prompt_ids(self, instruction: str, context: str = "") -> list[int]:
        """Everything before the response."""
        if self.template == "chat":
            text = f"{instruction}\n\n{context}" if context else instruction
            messages = [{"role": "user", "content": text}]
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        else:
            template = ALPACA_WITH_CONTEXT if context else ALPACA
            text = template.format(instruction=instruction, context=context)
            ids = self.tokenizer(text, verbose=False)["input_ids"]
        self._check_rows(ids)
        return ids

    def example(self, record: Record, group: str = "") -> Example:
        """Prompt, response, end. Past `max_length` the response keeps at most half of the room and loses its end token
        if it was cut; the prompt loses its middle, so that the instruction and the call for a response stay."""
        prompt = self.prompt_ids(record["instruction"], record.get("context") or "")
        # The end token stands in labels by construction, even where a tokenizer uses it for padding too.
        response = self.tokenizer(record["response"], add_special_tokens=False, verbose=False)["input_ids"]
        response = [*response, self.tokenizer.eos_token_id]
        self._check_rows(response)
        truncated = len(prompt) + len(response) > self.max_length
        if truncated:
            response = response[: max(self.max_length // 2, self.max_length - len(prompt))]
            room = self.max_length - len(response)
            tail = min(PROMPT_TAIL, room // 2)
            prompt = prompt if len(prompt) <= room else prompt[: room - tail] + prompt[-tail:]
        return Example(tuple(prompt + response), len(prompt), record["response"], group, truncated)

    def batch(self, examples: Sequence[Example], device: torch.device | str = "cpu") -> Batch:
        longest = max(len(e.input_ids) for e in examples)
        ids = torch.full((len(examples), longest), self.pad_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for row, example in enumerate(examples):
            n = len(example.input_ids)
            ids[row, :n] = torch.tensor(example.input_ids)
            mask[row, :n] = 1
            labels[row, example.prompt_length : n] = ids[row, example.prompt_length : n]
        return Batch(ids.to(device), mask.to(device), labels.to(device))


def load_clients(
    config: DataConfig, encoder: Encoder, notes: list[str] | None = None, seed: int = 0
) -> list[ClientData]:
    """Every client's encoded examples, in the order that fixes the client's index for the whole run.

    Args:
        notes: takes what a person should know of the files, in sentences: columns that nobody reads, test examples that
            are trained on.
        seed: of the run; draws the validation part, if there is one.

    Raises:
        FlexError: a file or column is missing or not what it should be, a client has nothing to train or to test on, or
            all that would be tested is trained on.
    """
    if not config.train:
        raise FlexError("data.train is empty; expected a .jsonl or .jsonl.gz file (--data FILE)")
    notes = [] if notes is None else notes
    columns = ["instruction", "response", config.clients_by, *([config.group_by] if config.group_by else [])]
    read = read_records(config.train, columns, config.clients_by)
    if unread := unread_columns(read, columns):
        notes.append(f"{config.train} has columns that nobody reads: {', '.join(map(repr, unread))}")
    train = split_clients(read, config.clients_by, config.clients)
    test = {}
    if config.test:
        test = split_clients(read_records(config.test, columns, config.clients_by), config.clients_by)
    clients, trained_on = [], 0
    for name, records in train.items():
        parts = (records, test.get(name, [])) if test else split_held_out(records, config.test_fraction, name)
        limits = (config.max_train, config.max_test)
        kept = [part[:limit] if limit else part for part, limit in zip(parts, limits, strict=True)]
        for part, what in zip(kept, ("train", "test"), strict=True):
            if not part:
                raise FlexError(f"client {name!r} has no {what} examples; expected one or more, or no such client")
        if test:
            trained_on += _trained_on(name, *kept, notes)
        kept[0], validation = split_validation(kept[0], config.validation_fraction, name, seed)
        encoded = [[encoder.example(r, _group(r, config)) for r in part] for part in (*kept, validation)]
        clients.append(ClientData(name, *encoded))
    if trained_on and trained_on == sum(len(client.test) for client in clients):
        raise FlexError(
            f"all {trained_on} examples of {config.test} are trained on; expected others in data.test, or data.test "
            "left out, so that a share of the training file is held out"
        )
    return clients


def _trained_on(name: str, train: list[Record], test: list[Record], notes: list[str]) -> int:
    """How many test examples of a client it also trains on."""
    known = {texts(record) for record in train}
    seen = sum(texts(record) in known for record in test)
    if seen:
        notes.append(f"{seen} of {len(test)} test examples of client {name!r} are among its training examples")
    return seen


def _group(record: Record, config: DataConfig) -> str:
    value = record.get(config.group_by) if config.group_by else None
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return "" if missing else str(value)


def load_general(config: DataConfig, encoder: Encoder) -> list[Example]:
    """The held-out set that belongs to nobody; empty where none is named."""
    if not config.general:
        return []
    return [encoder.example(r, _group(r, config)) for r in read_records(config.general)]


def training_batches(examples: list[Example], batch_size: int, steps: int, seed: str) -> Iterator[list[Example]]:
    """`steps` batches drawn without replacement, reshuffled when an epoch ends; a function of `seed` alone."""
    rng = random.Random(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < batch_size:
            order += rng.sample(range(len(examples)), len(examples))
        yield [examples[i] for i in order[:batch_size]]
        order = order[batch_size:]
