"""Examples: records -> token ids with labels on what the assistant says alone.

One prompt for training, evaluation and generation (`Encoder.conversation_ids`), and the end-of-sequence token is always
trained: a model never trained on it does not learn to stop. Of a conversation all answers train, the last is scored.
"""

import hashlib
import math
import random
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from torch import Tensor

from flex.config import DataConfig
from flex.data.clients import ClientRecords, read_clients, read_general
from flex.data.records import CONVERSATION, Record, is_conversation
from flex.errors import FlexError, first_line

MANY = 100  # clients; of more, examples are encoded when their client takes part
PARTS_KEPT = 8  # of those, how many parts stay encoded
IGNORED = -100  # the label that cross_entropy skips
# Where an answer begins and ends in a rendered template: nobody's text has these.
OPEN, CLOSED = "\u2063open\u2063", "\u2063closed\u2063"
PROMPT_TAIL = 16  # tokens at the end of a cut prompt that stay: they hold the template's call for the response

# The template of Stanford Alpaca (Taori et al. 2023), which the paper trains and tests with.
ALPACA_WITH_CONTEXT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
)
# Of a conversation a system turn takes the opening's place, and each answer ends with the end token.
ALPACA_OPENING = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
ALPACA_TURN = "\n\n### Instruction:\n{instruction}\n\n### Response:\n"

Turn = dict[str, str]  # `role` and `content`
Span = tuple[int, int]  # tokens from the first to before the second


@dataclass(frozen=True)
class Example:
    """One encoded sequence: the prompt's tokens, then the response's (with the end token unless it was cut).

    earlier: where in the prompt of a conversation the answers before the last stand; they train, and are not scored.
    """

    input_ids: tuple[int, ...]
    prompt_length: int
    response: str
    group: str = ""
    truncated: bool = False
    earlier: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Batch:
    """`input_ids`, `attention_mask`, `labels`: [B, L] int64, padded on the right; labels are -100 off the responses."""

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
        return self._looked[0]

    def truncated(self) -> dict[str, int]:
        return dict(self._looked[1])

    @cached_property
    def _looked(self) -> tuple[str, dict[str, int]]:
        """(fingerprint, how many of each part are truncated): of many clients each look encodes the examples anew."""
        digest, truncated = hashlib.sha256(), {}
        for name, part in self.parts().items():
            digest.update(f"{self.client_id}/{name}/{len(part)}".encode(errors="surrogatepass"))
            truncated[name] = 0
            for example in part:
                digest.update(f"{example.input_ids}{example.prompt_length}{example.earlier or ''}".encode())
                digest.update(example.response.encode(errors="surrogatepass"))
                truncated[name] += example.truncated
        return digest.hexdigest()[:16], truncated


class Encoder:
    """Text -> tokens, the same way in training, evaluation and generation.

    Args:
        template: "alpaca", "chat", or "auto": the tokenizer's chat template where it has one, else alpaca.
        num_rows: of the model's embedding; None checks no token against it.

    Attributes:
        template: the one in use, never "auto".
    """

    def __init__(self, tokenizer: Any, template: str, max_length: int, num_rows: int | None = None):
        if tokenizer.eos_token_id is None:
            raise FlexError("the tokenizer has no end-of-sequence token; a model could never learn to stop")
        if template == "auto":
            template = "chat" if tokenizer.chat_template else "alpaca"
        if template == "chat" and not tokenizer.chat_template:
            raise FlexError('the tokenizer has no chat template; expected data.template = "alpaca"')
        self.tokenizer, self.template, self.max_length, self.num_rows = tokenizer, template, max_length, num_rows
        self.pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.highest = self.longest = 0  # token id, and tokens of an example, so far
        self._check_rows([self.pad_id, tokenizer.eos_token_id])

    def fit(self, num_rows: int) -> None:
        """The model that the tokens are for, where it was loaded after they were made.

        Raises:
            FlexError: one of them has no row in its embedding.
        """
        self.num_rows = num_rows
        self._check_rows([])

    def end_ids(self) -> list[int]:
        """What ends an answer: the tokenizer's end of sequence, and the special token with which the chat template, if
        it is in use, closes an assistant's turn."""
        return list(self._ends)

    @cached_property
    def _ends(self) -> list[int]:
        ends = [self.tokenizer.eos_token_id]
        if self.template == "chat":
            turn = [{"role": "user", "content": "x"}, {"role": "assistant", "content": CLOSED}]
            text = self.tokenizer.apply_chat_template(turn, tokenize=False)
            after = self.tokenizer(text.rpartition(CLOSED)[2], add_special_tokens=False)["input_ids"]
            ends += [token for token in after[:1] if token in self.tokenizer.all_special_ids]
        return list(dict.fromkeys(ends))

    def _check_rows(self, ids: Sequence[int]) -> None:
        self.highest = highest = max([self.highest, *ids])
        if self.num_rows is not None and highest >= self.num_rows:
            raise FlexError(
                f"the token {self.tokenizer.convert_ids_to_tokens(highest)!r} has id {highest}, but the model's "
                f"embedding has {self.num_rows} rows; expected the tokenizer of this model, or a model resized to it "
                "(`resize_token_embeddings`)"
            )

    def prompt_ids(self, instruction: str, context: str = "") -> list[int]:
        """Everything before the response."""
        if self.template == "alpaca" and context:
            ids = self._tokens(ALPACA_WITH_CONTEXT.format(instruction=instruction, context=context), special=True)
            self._check_rows(ids)
            return ids
        asked = f"{instruction}\n\n{context}" if context else instruction
        return self.conversation_ids([{"role": "user", "content": asked}])[0]

    def text_ids(self, text: str) -> list[int]:
        """Plain text, without the tokens that a tokenizer puts around one."""
        ids = self._tokens(text)
        self._check_rows(ids)
        return ids

    def conversation_ids(self, turns: Sequence[Turn]) -> tuple[list[int], list[Span]]:
        """Everything before the next answer, and where in it the earlier answers stand, with what ends them.

        Args:
            turns: perhaps a system turn, then user and assistant by turns, the last a user turn.

        Raises:
            FlexError: the chat template cannot say these turns, or a token has no row in the embedding.
        """
        ids, spans = self._chat(turns) if self.template == "chat" else self._alpaca(turns)
        self._check_rows(ids)
        return ids, spans

    def next_ids(self, turns: Sequence[Turn]) -> list[int]:
        """Everything before the next answer, for generation alone: a chat template may do with earlier answers what it
        wants (leave out their reasoning, say).

        Raises:
            FlexError: the chat template cannot say these turns, or a token has no row in the embedding.
        """
        if self.template != "chat":
            return self.conversation_ids(turns)[0]
        try:
            ids = self.tokenizer.apply_chat_template(list(turns), add_generation_prompt=True, return_dict=False)
        except TemplateError as error:
            raise FlexError(f"the tokenizer's chat template refuses it: {first_line(error)}") from None
        self._check_rows(ids)
        return list(ids)

    def _chat(self, turns: Sequence[Turn]) -> tuple[list[int], list[Span]]:
        answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        marked = [
            {**turn, "content": _marked(turn["content"])} if turn["role"] == "assistant" else turn for turn in turns
        ]
        try:
            if not answers:
                ids = self.tokenizer.apply_chat_template(list(turns), add_generation_prompt=True, return_dict=False)
                return list(ids), []
            text = self.tokenizer.apply_chat_template(marked, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise FlexError(f"the tokenizer's chat template refuses it: {first_line(error)}") from None
        pieces = re.split(f"{OPEN}|{CLOSED}", text)  # prompt, answer, prompt, answer, ..., prompt
        if len(pieces) != 2 * len(answers) + 1:
            raise FlexError(
                "the tokenizer's chat template leaves out or changes an earlier answer, so that it cannot train; "
                'expected data.template = "alpaca", or one answer an example'
            )
        return self._with_spans(pieces)

    def _with_spans(self, pieces: Sequence[str]) -> tuple[list[int], list[Span]]:
        """The tokens of the whole text, and those of every second piece; an end token right after a piece is part of
        it. A tokenizer that does not tell where its tokens stand gives each piece tokens of its own."""
        spans = []
        if not self.tokenizer.is_fast:
            ids: list[int] = []
            for index, piece in enumerate(pieces):
                start = len(ids)
                ids += self._tokens(piece)
                spans += [(start, len(ids))] if index % 2 else []
        else:
            text = self.tokenizer("".join(pieces), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids, places, at = text["input_ids"], text["offset_mapping"], 0
            for index, piece in enumerate(pieces):
                if index % 2:
                    inside = [i for i, (a, b) in enumerate(places) if a < at + len(piece) and b > at]
                    spans += [(inside[0], inside[-1] + 1)] if inside else []
                at += len(piece)
        return ids, [(start, stop + (stop < len(ids) and ids[stop] in self._ends)) for start, stop in spans]

    def _alpaca(self, turns: Sequence[Turn]) -> tuple[list[int], list[Span]]:
        opening = ALPACA_OPENING
        if turns[0]["role"] == "system":
            opening, turns = turns[0]["content"], turns[1:]
        ids, spans = self._tokens(opening + ALPACA_TURN.format(instruction=turns[0]["content"]), special=True), []
        for answer, asked in zip(turns[1::2], turns[2::2], strict=True):
            start = len(ids)
            ids += [*self._tokens(answer["content"]), self.tokenizer.eos_token_id]
            spans.append((start, len(ids)))
            ids += self._tokens(ALPACA_TURN.format(instruction=asked["content"]))
        return ids, spans

    def _tokens(self, text: str, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def example(self, record: Mapping[str, Any], group: str = "") -> Example:
        """Prompt, response, end. Past `max_length` a conversation loses its oldest exchanges; then the response keeps
        at most half of the room and loses its end token if it was cut, and the prompt loses its middle, so that the
        instruction and the call for a response stay.

        Raises:
            FlexError: see `conversation_ids`; it names the record's line.
        """
        try:
            example = self._example(record, group)
        except FlexError as error:
            where = getattr(record, "where", "")
            raise FlexError(f"{where}: {error}") if where else error from None
        self.longest = max(self.longest, len(example.input_ids))
        return example

    def _example(self, record: Mapping[str, Any], group: str) -> Example:
        turns: list[Turn] = []
        earlier: list[Span] = []
        if is_conversation(record):
            *turns, last = record[CONVERSATION]
            answer = last["content"]
            prompt, earlier = self.conversation_ids(turns)
        else:
            answer = record["response"]
            prompt = self.prompt_ids(record["instruction"], record.get("context") or "")
        # The end token stands in labels by construction, even where a tokenizer uses it for padding too.
        response = [*self._tokens(answer), self.tokenizer.eos_token_id]
        self._check_rows(response)
        truncated = len(prompt) + len(response) > self.max_length
        while earlier and len(prompt) + len(response) > self.max_length:
            head = 1 if turns[0]["role"] == "system" else 0
            turns = turns[:head] + turns[head + 2 :]
            prompt, earlier = self.conversation_ids(turns)
        if len(prompt) + len(response) > self.max_length:
            response = response[: max(self.max_length // 2, self.max_length - len(prompt))]
            room = self.max_length - len(response)
            tail = min(PROMPT_TAIL, room // 2)
            prompt = prompt if len(prompt) <= room else prompt[: room - tail] + prompt[-tail:]
        return Example(tuple(prompt + response), len(prompt), answer, group, truncated, tuple(earlier))

    def batch(self, examples: Sequence[Example], device: torch.device | str = "cpu", last_alone: bool = False) -> Batch:
        """Examples side by side. `last_alone`: labels on the last answer of a conversation, none on those before it."""
        longest = max(len(e.input_ids) for e in examples)
        ids = torch.full((len(examples), longest), self.pad_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for row, example in enumerate(examples):
            n = len(example.input_ids)
            ids[row, :n] = torch.tensor(example.input_ids)
            mask[row, :n] = 1
            spans = [(example.prompt_length, n), *(() if last_alone else example.earlier)]
            for start, stop in spans:
                labels[row, start:stop] = ids[row, start:stop]
        return Batch(ids.to(device), mask.to(device), labels.to(device))

    def side_by_side(self, batches: Sequence[Batch]) -> Batch:
        """Batches as one, in their order."""
        longest = max(batch.input_ids.shape[1] for batch in batches)
        parts = []
        for name, filling in (("input_ids", self.pad_id), ("attention_mask", 0), ("labels", IGNORED)):
            tensors = [getattr(batch, name) for batch in batches]
            parts.append(torch.cat([F.pad(t, (0, longest - t.shape[1]), value=filling) for t in tensors]))
        return Batch(*parts)


def load_clients(
    config: DataConfig, encoder: Encoder, notes: list[str] | None = None, seed: int = 0
) -> list[ClientData]:
    """Every client's encoded examples, in the order of `read_clients`.

    Raises:
        FlexError: see `read_clients` and `encode_clients`.
    """
    return encode_clients(read_clients(config, notes, seed), config, encoder)


def encode_clients(clients: Sequence[ClientRecords], config: DataConfig, encoder: Encoder) -> list[ClientData]:
    """Records -> examples.

    Raises:
        FlexError: a conversation that the template cannot say, or every answer of everyone is cut at `max_length`.
    """
    make = encode if len(clients) <= MANY else EncodedWhenAsked
    encoded = []
    for client in clients:
        parts = (make(part, config, encoder) for part in (client.train, client.test, client.validation))
        encoded.append(ClientData(client.client_id, *parts))
    end, count = encoder.tokenizer.eos_token_id, sum(len(client.train) for client in encoded)
    if count and not any(example.input_ids[-1] == end for client in encoded for example in client.train):
        raise FlexError(
            f"data.max_length is {config.max_length}, and every answer of all {count} training examples is cut "
            "there; expected room for at least one prompt with its answer"
        )
    return encoded


def encode(records: Sequence[Record], config: DataConfig, encoder: Encoder) -> list[Example]:
    return [encoder.example(record, _group(record, config)) for record in records]


class EncodedWhenAsked(Sequence[Example]):
    """A part of one client's examples, which are tokens while it is at work: of all clients' parts the last few that
    were asked for stay, so that memory does not grow with the number of clients."""

    _kept: ClassVar[OrderedDict[int, list[Example]]] = OrderedDict()

    def __init__(self, records: Sequence[Record], config: DataConfig, encoder: Encoder):
        self.records, self.config, self.encoder = records, config, encoder

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        return self._examples()[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self._examples())

    def _examples(self) -> list[Example]:
        kept = self._kept
        if id(self) not in kept:
            kept[id(self)] = encode(self.records, self.config, self.encoder)
            while len(kept) > PARTS_KEPT:
                kept.popitem(last=False)
        kept.move_to_end(id(self))
        return kept[id(self)]

    def __del__(self) -> None:
        self._kept.pop(id(self), None)


def _group(record: Record, config: DataConfig) -> str:
    value = record.get(config.group_by) if config.group_by else None
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return "" if missing else str(value)


def load_general(config: DataConfig, encoder: Encoder) -> list[Example]:
    """The held-out set that belongs to nobody; empty where none is named."""
    return encode(read_general(config), config, encoder)


def _marked(text: str) -> str:
    """The text between marks. What a template may strip stays outside of them."""
    core = text.strip()
    before, _, after = text.partition(core)
    return f"{before}{OPEN}{core}{CLOSED}{after}"


def training_batches(examples: list[Example], batch_size: int, steps: int, seed: str) -> Iterator[list[Example]]:
    """`steps` batches drawn without replacement, reshuffled when an epoch ends; a function of `seed` alone."""
    rng = random.Random(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < batch_size:
            order += rng.sample(range(len(examples)), len(examples))
        yield [examples[i] for i in order[:batch_size]]
        order = order[batch_size:]
