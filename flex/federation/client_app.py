"""A site behind Flower's messages: the same `ClientApp` runs in one process and under Flower's engine.

See `messages.py` for the contents of a message.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import torch

from flex.errors import FlexError, first_line, require
from flex.federation.client import Site
from flex.federation.flower import (
    Array,
    ArrayRecord,
    ClientApp,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    Mod,
    RecordDict,
)
from flex.federation.masked_site import NEXT
from flex.federation.masking import LARGEST, MASK, MASKED, UPDATE_NORM, clipped, largest
from flex.federation.messages import (
    ABOUT,
    ARRAYS,
    ASK,
    CLIENT_INDEX,
    CONFIG,
    CONTROL,
    EVENTS,
    KEPT_ROUND,
    METRICS,
    NUM_EXAMPLES,
    SCORED,
    SCORES,
    SPLITS,
    Arrays,
    carried_arrays,
    json_record,
    to_arrays,
    to_control,
    to_record,
)
from flex.federation.rounds import answer_identity, identity
from flex.federation.scaffold import CONTROL_PREFIX
from flex.federation.seal import round_of, sealed
from flex.federation.usage import PEAK_BYTES, TURN_SECONDS, peak_bytes
from flex.store.events import Evaluated, Event


def make_client_app(site_of: Callable[[Message, Context], Site], mods: Sequence[Mod] = ()) -> ClientApp:
    """Answers for the sites that live in this process.

    Args:
        site_of: whom a message speaks to: one of many where a process plays them all (`context.node_config` says which
            one), the only one at a real site, there in the job that the message names.
        mods: Flower's modifiers of a client's update (clipping, noise); they stand around training alone, since the
            answers to the other messages carry no update.
    """
    app = ClientApp(mods=[sealed])

    @app.query()
    def query(message: Message, context: Context) -> Message:
        reply = answer_identity(message, context)
        question = message.content.config_records.get(CONFIG, {}).get(ASK)
        if question == "about":
            reply.content[ABOUT] = json_record(asdict(site_of(message, context).about()))
        elif question == "start":
            reply.content[ARRAYS] = to_record(site_of(message, context).model.shared_arrays())
        elif question in NEXT:
            masked, asked = site_of(message, context).masked, message.content.config_records.get(MASK, {})
            record, numbers = masked.answer(round_of(message.content), str(question), asked)
            reply.content[MASK] = record
            if numbers:
                reply.content[MASKED] = ArrayRecord({name: Array(array) for name, array in numbers.items()})
        return reply

    @app.train(mods=list(mods))
    def train(message: Message, context: Context) -> Message:
        site, shared = site_of(message, context), carried_arrays(message.content)
        at, config = round_of(message.content), message.content[CONFIG]
        asked, splits = message.content.config_records.get(MASK), str(config.get(SPLITS, "")).split()
        require(
            asked is not None or not shared or not site.hides(at),
            f"client {site.client_id!r} was asked for its update without a mask; expected one, as strategy.secure says",
        )
        started = time.perf_counter()
        with memory_named(site):
            # Before the turn the site is as the round before left it: what an exchange of its own would have scored.
            scores = site.evaluate(at - 1, to_arrays(message.content[ARRAYS]), splits=splits) if splits else []
            turn = site.train(at, shared, config.get(KEPT_ROUND))
        numbers = {
            CLIENT_INDEX: identity(context)[1],
            NUM_EXAMPLES: turn.metrics["num_examples"],
            "loss": turn.metrics["loss"],
            "seconds": turn.metrics["seconds"],
            "tokens": turn.metrics["tokens"],
            "opening": turn.metrics["opening"] or [],
            TURN_SECONDS: time.perf_counter() - started,
            PEAK_BYTES: peak_bytes(),
        }
        told = {SCORES: _of_events(scores)} if splits else {}
        if asked is None:
            return _reply(message, numbers, turn.events, {**update_records(turn.update, shared), **told})
        record, masked = masked_update(site, at, asked, turn.update, shared)
        return _reply(message, numbers | masked, turn.events, {MASK: record, **told})

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        site, shared = site_of(message, context), to_arrays(message.content[ARRAYS])
        splits = str(message.content[CONFIG].get(SPLITS, " ".join(SCORED))).split()
        with memory_named(site):
            events = site.evaluate(round_of(message.content), shared, splits=splits)
        first = next(event for event in events if isinstance(event, Evaluated))
        numbers = {
            CLIENT_INDEX: identity(context)[1],
            NUM_EXAMPLES: first.num_examples,
            "loss": first.loss,
            "exact-match": first.exact_match,
        }
        return _reply(message, numbers, events, {})

    return app


def update_records(update: Arrays, sent: Arrays) -> dict[str, ArrayRecord | ConfigRecord]:
    """What a turn gives, by record, in the order in which it was sent: Flower's wrappers and mods go by the place."""
    update = {name: update[name] for name in (*sent, *update) if name in update}
    control = {name: array for name, array in update.items() if name.startswith(CONTROL_PREFIX)}
    records = {ARRAYS: to_record({name: array for name, array in update.items() if name not in control})}
    return {**records, CONTROL: to_control(control)} if control else records


def masked_update(
    site: Site, round_index: int, asked: ConfigRecord, update: Arrays, shared: Arrays
) -> tuple[ConfigRecord, dict[str, float]]:
    """(the site's public keys, what it tells of its update in the clear); the change itself stays at the site."""
    change, norm = clipped(update, shared, site.config.strategy.max_update_norm, f"client {site.client_id!r}")
    weight = len(site.client.train) / float(asked["weight"]) if "weight" in asked else 1.0
    require(weight <= 1, f"client {site.client_id!r} counts {weight:.4g} times the largest; expected at most once")
    change = {name: np.asarray(weight * array, dtype=np.float32) for name, array in change.items()}
    return site.masked.begin(round_index, asked, change), {UPDATE_NORM: norm, LARGEST: largest(change)}


@contextmanager
def memory_named(site: Site) -> Iterator[None]:
    """A memory that is too small is bad luck with the settings, and gets a sentence."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # on a CPU torch raises a RuntimeError of its allocator
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise FlexError(
                f"client {site.client_id!r} is out of memory ({first_line(error)}); "
                "expected a smaller train.batch_size, evaluate.batch_size or data.max_length, or "
                "train.gradient_checkpointing = true"
            ) from error
        raise


def _reply(message: Message, numbers: dict, events: list[Event], records: dict) -> Message:
    told = {METRICS: MetricRecord(numbers), EVENTS: _of_events(events)}
    return Message(RecordDict({**records, **told}), reply_to=message)


def _of_events(events: list[Event]) -> ConfigRecord:
    return json_record([event.to_json() for event in events])
