"""What a run will take, before it begins: lengths, what is trained and sent, minutes, memory, the largest batch.

Minutes come from a step, a scoring pass and a few decoded tokens that are done and timed; nothing is written, and the
base is as it was. The largest batch is an estimate:

    bytes(tokens) = a + b * tokens      through the peaks of two steps, on one example and on a whole batch
    fits          = the most examples of `data.max_length` tokens whose bytes are below what is available

`tokens` counts padding. What an operation allocates inside of itself is not seen on a CPU (`memory.py`), so that some
room should stay.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flex.config import RunConfig
from flex.data.examples import Example, training_batches
from flex.evaluation.score import by_length, generate, response_logits
from flex.federation.client import Held, Site, Told
from flex.federation.client_app import memory_named
from flex.federation.flower import RecordDict
from flex.federation.messages import ARRAYS, sent_bytes, to_record
from flex.methods import METHODS, NEW_MODULE, Method
from flex.model.adapters import recomputed, unwrap
from flex.runs.memory import available_bytes, peak_of
from flex.runs.world import World

DRAWN = 21  # batches, of which the one of middling size is timed
DECODED = 8  # tokens, to time one
CONTROLS = "scaffold"  # the strategy whose messages carry a control variate beside each tensor


@dataclass(frozen=True)
class Lengths:
    """Tokens of a client's examples of one part, `quantiles` at 50, 90 and 100 %, and how many are cut."""

    client_id: str
    part: str
    count: int
    quantiles: tuple[int, int, int]
    cut: int


@dataclass(frozen=True)
class Cost:
    """What one method takes.

    trained: how many numbers by role. tensors, sent_bytes: of one message, up or down. step_seconds: of one step.
    fixed_bytes, token_bytes: `bytes(tokens)`. fits: examples of full length. seconds: of all its seeds; of them
    `train_seconds`, `score_seconds` and `choose_seconds` (of grafts).
    """

    method: str
    trained: dict[str, int]
    tensors: int = 0
    sent_bytes: int = 0
    step_seconds: float = 0.0
    step_bytes: int = 0
    fixed_bytes: float = 0.0
    token_bytes: float = 0.0
    fits: int = 0
    train_seconds: float = 0.0
    score_seconds: float = 0.0
    choose_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.train_seconds + self.score_seconds + self.choose_seconds


@dataclass(frozen=True)
class Forecast:
    """Of a whole run. `prompt`: of the first example as the model reads it, and `answer`, what it is trained to say."""

    lengths: list[Lengths]
    prompt: str
    answer: str
    base_bytes: int
    available: int
    costs: list[Cost]
    seconds: float


def forecast(config: RunConfig, world: World) -> Forecast:
    """Does one step of each kind of method, a scoring pass and a few tokens, and reckons from them."""
    example = world.clients[0].train[0]
    lengths = [
        _lengths(client.client_id, part, examples)
        for client in world.clients
        for part, examples in client.parts().items()
    ]
    base = world.base.model
    base_bytes = sum(t.untyped_storage().nbytes() for t in {*base.parameters(), *base.buffers()})
    available, measured, costs = available_bytes(world.base.device), {}, []
    scoring = _Scoring(config, world)
    for name in config.train.methods:
        method = METHODS[name]
        kind = (method.lora, method.private, method.trains)
        if kind not in measured:
            measured[kind] = _measured(config, world, name, available)
        costs.append(_whole(config, world, name, measured[kind], scoring))
    unwrap(world.base)
    decode = world.encoder.tokenizer.decode
    prompt, answer = (decode(ids) for ids in (_before(example), example.input_ids[example.prompt_length :]))
    # Jobs at once share the processor: their number helps only as far as it has room.
    return Forecast(lengths, prompt, answer, base_bytes, available, costs, sum(cost.seconds for cost in costs))


def _before(example: Example) -> tuple[int, ...]:
    return example.input_ids[: example.prompt_length]


def _lengths(client_id: str, part: str, examples: Sequence[Example]) -> Lengths:
    sizes = sorted(len(example.input_ids) for example in examples)
    last = len(sizes) - 1
    quantiles = (sizes[last // 2], sizes[round(0.9 * last)], sizes[last])
    return Lengths(client_id, part, len(sizes), quantiles, sum(example.truncated for example in examples))


def _padded(examples: Sequence[Example]) -> int:
    return len(examples) * max(len(example.input_ids) for example in examples)


def _measured(config: RunConfig, world: World, name: str, available: int) -> Cost:
    """A method of this kind: real steps of the first client, on the batch of middling size of some that are drawn."""
    site = next(iter(world.sites(config, name, config.train.seeds[0], Path("never written")).values()))
    parts, train = site.model.parts, config.train
    sent = RecordDict({ARRAYS: to_record(site.model.shared_arrays())})
    trained = {role: count for role, count in parts.counts().items() if role != "frozen"}
    if not site.model.method.trains:
        return Cost(name, trained)
    drawn = list(training_batches(site.client.train, train.batch_size, DRAWN, "forecast"))
    batch = sorted(drawn, key=_padded)[DRAWN // 2]
    whole, whole_bytes, seconds = _steps(site, batch)
    one, one_bytes, _ = _steps(site, [min(batch, key=lambda example: len(example.input_ids))], timed=False)
    slope = (whole_bytes - one_bytes) / (whole - one) if whole > one else whole_bytes / whole
    slope = slope if slope > 0 else whole_bytes / whole
    fixed = max(0.0, whole_bytes - slope * whole)
    return Cost(
        name,
        trained,
        tensors=len(sent[ARRAYS]),
        sent_bytes=sent_bytes(sent),
        step_seconds=seconds * train.accumulate,
        step_bytes=whole_bytes,
        fixed_bytes=fixed,
        token_bytes=slope,
        fits=int(max(0.0, available - fixed) / (slope * config.data.max_length)),
    )


def _steps(site: Site, batch: list[Example], timed: bool = True) -> tuple[int, int, float]:
    """(tokens with padding, peak bytes of a first step, seconds of a second one)."""
    model, train = site.model, site.config.train
    base, trained = model.base, model.parts.trained()
    base.model.train()

    def step() -> None:
        optimizer = site.optimizer(1)
        site.steps(1, [(batch, ())], optimizer, trained, Held(), Told())

    with recomputed(base.model, train.gradient_checkpointing), memory_named(site):
        peak = peak_of(step, [*base.model.parameters(), *base.model.buffers()], base.device)
        started = time.perf_counter()
        if timed:
            step()
            if base.device.type == "cuda":
                torch.cuda.synchronize(base.device)
    return _padded(batch), peak, time.perf_counter() - started


class _Scoring:
    """Seconds of a forward pass by token, and of one decoding step of a batch, on the base."""

    def __init__(self, config: RunConfig, world: World):
        self.config, self.world = config, world
        model, settings = world.base.model.eval(), config.evaluate
        tests = [example for client in world.clients for example in client.test]
        batches = by_length(tests, settings.batch_size)
        chosen = [tests[index] for index in batches[len(batches) // 2]]
        batch = world.encoder.batch(chosen, world.base.device, last_alone=True)
        with torch.no_grad():
            response_logits(model, batch)
            started = time.perf_counter()
            float(response_logits(model, batch)[0].sum())
        self.token_seconds = (time.perf_counter() - started) / _padded(chosen)
        self.decode_seconds = 0.0
        if settings.rouge:
            count = min(DECODED, settings.max_new_tokens)
            started = time.perf_counter()
            generate(model, world.encoder, [_before(example) for example in chosen], count)
            self.decode_seconds = (time.perf_counter() - started) / count

    def once(self) -> float:
        """Seconds in which every client scores itself once; an answer is taken to be as long as it may be."""
        total, settings = 0.0, self.config.evaluate
        for client in self.world.clients:
            parts = [client.test, client.validation, self.world.general]
            total += self.token_seconds * sum(len(example.input_ids) for part in parts for example in part)
            batches = -(-len(client.test) // settings.batch_size)
            total += batches * settings.max_new_tokens * self.decode_seconds
        return total


def _whole(config: RunConfig, world: World, name: str, kind: Cost, scoring: _Scoring) -> Cost:
    """All seeds of a method, from what a step of its kind takes."""
    method, train, clients = METHODS[name], config.train, len(world.clients)
    turns = train.rounds * (train.clients_per_round or clients) if method.trains else 0
    scored = sum(config.scores_after(number) for number in range(1, train.rounds + 1)) if method.trains else 1
    scored *= 2 if method.averages else 1  # before the server averages and after
    seeds = len(train.seeds)
    times = (2 if config.strategy.of(name)[0] == CONTROLS else 1) if method.averages else 0
    return replace(
        kind,
        method=name,
        tensors=kind.tensors * times,
        sent_bytes=kind.sent_bytes * times,
        train_seconds=seeds * turns * train.steps * kind.step_seconds,
        score_seconds=seeds * scored * scoring.once(),
        choose_seconds=seeds * _choosing(config, world, method, kind, scoring),
    )


def _choosing(config: RunConfig, world: World, method: Method, kind: Cost, scoring: _Scoring) -> float:
    """Seconds in which every client's grafts are chosen: a pass, or two, over its calibration sequences, forward, and
    back where the target is a correction."""
    if method.start is None:
        return 0.0
    settings = config.graft.of(method)
    passes = 1 if settings.criterion in NEW_MODULE else 1 + settings.fits
    tokens = sum(
        len(example.input_ids) for client in world.clients for example in client.train[: settings.calibration_sequences]
    )
    median = statistics.median(len(example.input_ids) for example in world.clients[0].train)
    per_token = scoring.token_seconds
    if settings.target == "correction":
        per_token = kind.step_seconds / (config.train.accumulate * config.train.batch_size * median)
    return passes * tokens * per_token
