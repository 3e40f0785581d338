"""Examples and splits: JSON lines -> one list of records per client -> token ids with labels on the response alone.

One prompt for training, evaluation and generation (`Encoder.prompt_ids`), and the end-of-sequence token is always
trained: a model that never sees it rewarded never stops.
"""

import gzip
import json
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flex.config import DataConfig
from flex.errors import FlexError

Record = dict[str, Any]
IGNORED = -100  # the label that cross_entropy skips
TEXTS = ("instruction", "context", "response")
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


def read_records(
    path: str | Path, columns: Sequence[str] = ("instruction", "response"), clients_by: str = ""
) -> list[Record]:
    """The records of a `.jsonl` or `.jsonl.gz` file.

    Raises:
        FlexError: the file is missing, damaged or empty, a line is no JSON object, a record lacks one of `columns`, a
            text is no string, or the column `clients_by` (where one is given) names no client.
    """
    path = Path(path)
    if not path.is_file():
        raise FlexError(f"no data file at {path}; wanted a .jsonl or .jsonl.gz file")
    open_text = gzip.open if path.suffix == ".gz" else open
    records = []
    try:
        with open_text(path, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    records.append(_record(line, f"{path}, line {number}", columns, clients_by))
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise FlexError(f"{path} cannot be read as JSON lines: {error}") from None
    if not records:
        raise FlexError(f"{path} holds no records; wanted one JSON object a line")
    return records


def _record(line: str, where: str, columns: Sequence[str], clients_by: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise FlexError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise FlexError(f"{where} is not JSON that can be read: {error}") from None
    if not isinstance(record, dict):
        raise FlexError(f"{where} is a {type(record).__name__}; wanted a JSON object")
    for column in columns:
        if column not in record:
            raise FlexError(f"{where} has no column {column!r}; it has {', '.join(map(repr, record))}")
    if "\\ud" in line.lower():
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise FlexError(f"{where} holds half of a character (a \\ud… alone); wanted whole ones") from None
    for column in TEXTS:
        value = record.get(column, "")
        if not (isinstance(value, str) or (value is None and column == "context")):
            raise FlexError(f"{where} has {_shown(value)} as {column!r}; wanted a string")
    if clients_by:
        name = record[clients_by]
        if not isinstance(name, str | int | float) or not str(name).strip():
            raise FlexError(f"{where} has {_shown(name)} as {clients_by!r}; wanted the name of a client")
    return record


def _shown(value: Any) -> str:
    """A value as the file has it, in a few characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}…"


def split_clients(records: list[Record], column: str, chosen: Sequence[str] = ()) -> dict[str, list[Record]]:
    """Records by the value of `column`, in the order of `chosen`, or of the values' names where nothing is chosen."""
    clients: dict[str, list[Record]] = {}
    for record in records:
        clients.setdefault(str(record[column]), []).append(record)
    for name in chosen:
        if name not in clients:
            raise FlexError(f"no record has {column} = {name!r}; the values are {', '.join(sorted(clients))}")
    return {name: clients[name] for name in (chosen or sorted(clients))}


def split_held_out(records: list[Record], fraction: float, name: str) -> tuple[list[Record], list[Record]]:
    """(train, test), by a shuffle that depends on the client's name alone: every method and seed tests on the same."""
    order = list(range(len(records)))
    random.Random(f"held out {name}").shuffle(order)
    cut = max(1, round(len(records) * fraction))
    return [records[i] for i in sorted(order[cut:])], [records[i] for i in sorted(order[:cut])]


class Encoder:
    """Text -> tokens, the same way in training, evaluation and generation."""

    def __init__(self, tokenizer: Any, template: str, max_length: int):
        if tokenizer.eos_token_id is None:
            raise FlexError("the tokenizer has no end-of-sequence token; a model could never learn to stop")
        if template == "chat" and not tokenizer.chat_template:
            raise FlexError('the tokenizer has no chat template; wanted data.template = "alpaca"')
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
        raise FlexError("data.train is empty; wanted a .jsonl or .jsonl.gz file (--data FILE)")
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
                raise FlexError(f"client {name!r} has no {what} examples; wanted at least one, or leave the client out")
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
