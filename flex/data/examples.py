"""Examples and splits: JSON lines -> one list of records per client -> token ids with labels on the response alone.

One prompt for training, evaluation and generation (`Encoder.prompt_ids`), and the end-of-sequence token is always
trained: a model that never sees it rewarded never stops.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flex.config import DataConfig
from flex.data.records import Record, read_records
from flex.data.splits import split_clients, split_held_out
from flex.errors import FlexError

IGNORED = -100  # the label that cross_entropy skips
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
    """One client's own examples."""

    client_id: str
    train: list[Example]
    test: list[Example]

    def truncated(self) -> dict[str, int]:
        return {part: sum(e.truncated for e in getattr(self, part)) for part in ("train", "test")}


class Encoder:
    """Text -> tokens, the same way in training, evaluation and generation."""

    def __init__(self, tokenizer: Any, template: str, max_length: int):
        if tokenizer.eos_token_id is None:
            raise FlexError("the tokenizer has no end-of-sequence token; a model could never learn to stop")
        if template == "chat" and not tokenizer.chat_template:
            raise FlexError('the tokenizer has no chat template; expected data.template = "alpaca"')
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length
        self.pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def prompt_ids(self, instruction: str, context: str = "") -> list[int]:
        """Everything before the response."""
        if self.template == "chat":
            text = f"{instruction}\n\n{context}" if context else instruction
            messages = [{"role": "user", "content": text}]
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        template = ALPACA_WITH_CONTEXT if context else ALPACA
        return self.tokenizer(template.format(instruction=instruction, context=context), verbose=False)["input_ids"]

    def example(self, record: Record, group: str = "") -> Example:
        """Prompt, response, end. Past `max_length` the response keeps at most half of the room and loses its end token
        if it was cut; the prompt loses its middle, so that the instruction and the call for a response stay."""
        prompt = self.prompt_ids(record["instruction"], record.get("context") or "")
        # The end token stands in labels by construction, even where a tokenizer uses it for padding too.
        response = self.tokenizer(record["response"], add_special_tokens=False, verbose=False)["input_ids"]
        response = [*response, self.tokenizer.eos_token_id]
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


def load_clients(config: DataConfig, encoder: Encoder) -> list[ClientData]:
    """Every client's encoded examples, in the order that fixes the client's index for the whole run.

    Raises:
        FlexError: a file or column is missing or not what it should be, or a client has nothing to train or to test on.
    """
    if not config.train:
        raise FlexError("data.train is empty; expected a .jsonl or .jsonl.gz file (--data FILE)")
    columns = ["instruction", "response", config.clients_by, *([config.group_by] if config.group_by else [])]
    train = split_clients(read_records(config.train, columns, config.clients_by), config.clients_by, config.clients)
    test = {}
    if config.test:
        test = split_clients(read_records(config.test, columns, config.clients_by), config.clients_by)
    clients = []
    for name, records in train.items():
        parts = (records, test.get(name, [])) if test else split_held_out(records, config.test_fraction, name)
        limits = (config.max_train, config.max_test)
        kept = [part[:limit] if limit else part for part, limit in zip(parts, limits, strict=True)]
        for part, what in zip(kept, ("train", "test"), strict=True):
            if not part:
                raise FlexError(f"client {name!r} has no {what} examples; expected one or more, or no such client")
        encoded = [[encoder.example(r, str(r.get(config.group_by, ""))) for r in part] for part in kept]
        clients.append(ClientData(name, *encoded))
    return clients


def load_general(config: DataConfig, encoder: Encoder) -> list[Example]:
    """The held-out set that belongs to nobody; empty where none is named."""
    if not config.general:
        return []
    return [encoder.example(r, str(r.get(config.group_by, ""))) for r in read_records(config.general)]


def training_batches(examples: list[Example], batch_size: int, steps: int, seed: str) -> Iterator[list[Example]]:
    """`steps` batches drawn without replacement, reshuffled when an epoch ends; a function of `seed` alone."""
    rng = random.Random(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < batch_size:
            order += rng.sample(range(len(examples)), len(examples))
        yield [examples[i] for i in order[:batch_size]]
        order = order[batch_size:]
