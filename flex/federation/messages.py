"""What travels between the server and its clients, as Flower's records: counted, checked and averaged.

    train      `arrays` (the shared state, float32), `config` with `server-round`, `evaluate` (whether this round ends
               with an evaluation; this project's own clients read that in their configuration), perhaps `kept-round`
               (whose state a client must not lose) and the caller's own; perhaps `splits`: what is sent is to be scored
               on them before the turn, as of the round before (`scoring.py`); with SCAFFOLD also `control`, its
               control variates
               reply: `arrays` (the same tensors), `metrics` with at least `num-examples`, `events`, `scores` (events of
               the round before) where they were asked for, and `control` where it was sent
    evaluate   the same content, perhaps with `splits`, the names of those to score   reply: `metrics`, `events`
    query      `config` with `ask`, or nothing: who are you?  reply: `client` (id and index); to "about" also `about`
               (see `SiteAbout`), to "start" also `arrays`, the shared state as the method initialises it

Every reply also has a `seal` (`seal.py`): which round and which tensors it answers.

`events` is a ConfigRecord with the JSON of what the log is to say of the turn (`store/events.py`): scores of every
split and moment, what its layers do, and what the grafts are made of. A client speaks of itself alone.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from flex.errors import FlexError
from flex.store.events import OF_LAYERS, Evaluated, Event, Grafted, check_types, from_json

if TYPE_CHECKING:  # Flower itself only where a record is made: a client's turn needs none
    from flex.federation.flower import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

Arrays = dict[str, np.ndarray]

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"  # the records' names in a message, as Flower's strategies use
EVENTS, SCORES, ABOUT, ASK = "events", "scores", "about", "ask"
CONTROL = "control"  # a ConfigRecord of tensors: what clips an update, or adds noise to it, takes every ArrayRecord
NUM_EXAMPLES, CLIENT_INDEX = "num-examples", "client-index"
ABOUT_KINDS = {"str": str, "int": int, "dict": dict}
KEPT_ROUND, SPLITS = "kept-round", "splits"
SCORED = ("test", "general")  # what an evaluation scores where it does not say what
MEASURED = (Evaluated, *OF_LAYERS)  # of one round
TOLD = (Grafted, *MEASURED)  # what a client may say to the log


@dataclass(frozen=True)
class SiteAbout:
    """What a site says of itself before the first round.

    fingerprint: of its base. truncated: examples cut, by part. trained_parameters: how many are shared, and personal.
    settings, data: digests of its configuration (`agreement.py`) and of its examples. versions: of flex and torch.
    """

    client_id: str
    fingerprint: str
    num_train: int
    num_test: int
    truncated: dict[str, int]
    trained_parameters: dict[str, int] = field(default_factory=dict)
    settings: str = ""
    data: str = ""
    versions: dict[str, str] = field(default_factory=dict)


def to_record(arrays: Arrays) -> ArrayRecord:
    """Arrays as they travel: float32, whatever the arithmetic made of them."""
    from flex.federation.flower import Array, ArrayRecord

    return ArrayRecord({name: Array(np.asarray(a, dtype=np.float32)) for name, a in arrays.items()})


def to_arrays(record: Mapping[str, Array]) -> Arrays:
    """The inverse of `to_record`: a fresh float32 copy of every tensor."""
    return {name: np.asarray(array.numpy(), dtype=np.float32) for name, array in record.items()}


def sent_tensors(content: RecordDict) -> list[dict[str, Any]]:
    """What exactly was sent: `name`, `shape`, `dtype` and `bytes` of every tensor of a message or reply.

    The bytes are those of the serialised tensor (values and a header of 128), read off the message itself.
    """
    return [
        {"name": name, "shape": list(array.shape), "dtype": array.dtype, "bytes": len(array.data)}
        for record in (*content.array_records.values(), control_of(content))
        for name, array in record.items()
    ]


def sent_bytes(content: RecordDict) -> int:
    """The bytes of all tensors of a message or reply; its few numbers are not counted."""
    return sum(tensor["bytes"] for tensor in sent_tensors(content))


def sender_of(reply: Message, sent: Mapping[int, Message]) -> int:
    """The node that answers, of those in `sent` (node -> message).

    The reply for a node that died comes from the server, and only names the message.
    """
    if reply.metadata.src_node_id in sent:
        return reply.metadata.src_node_id
    ids = {message.metadata.message_id: node for node, message in sent.items()}
    return ids[reply.metadata.reply_to_message_id]


def metrics_of(reply: Message, sender: str = "a client") -> dict[str, Any]:
    """The numbers a client reported, as it reported them; FlexError where it reported them twice."""
    records = list(reply.content.metric_records.values())
    if len(records) > 1:
        raise FlexError(f"{sender} sent {len(records)} MetricRecords; expected at most one")
    return dict(records[0]) if records else {}


def json_record(values: Any) -> ConfigRecord:
    """JSON as it travels: a record of numbers and texts cannot nest."""
    from flex.federation.flower import ConfigRecord

    return ConfigRecord({"json": json.dumps(values)})


def _json_of(reply: Message, record: str, sender: str) -> Any:
    try:
        return json.loads(str(reply.content.config_records[record]["json"]))
    except (KeyError, ValueError):
        raise FlexError(f"{sender} sent no readable {record!r} record; expected JSON") from None


def events_of(reply: Message, client_id: str, round_index: int | None = None, record: str = EVENTS) -> list[Event]:
    """What a reply says for the log, as said of `client_id` whatever name it gives; nothing where it says nothing.

    Args:
        round_index: of which scores must be; None: of any.
        record: which says it.

    Raises:
        FlexError: it is no JSON, no event that a client may tell, or one whose values are not what such an event has.
    """
    if record not in reply.content.config_records:
        return []
    sender = f"client {client_id!r}"
    values = _json_of(reply, record, sender)
    well_formed = isinstance(values, list) and all(isinstance(value, dict) for value in values)
    events = [from_json(value) for value in values] if well_formed else [None]
    if not all(isinstance(event, TOLD) for event in events):
        raise FlexError(f"{sender} sent events that are no scores, no measures of layers and no grafts; expected these")
    for event in events:
        check_types(event, sender)
        if round_index is not None and isinstance(event, MEASURED) and event.round != round_index:
            raise FlexError(f"{sender} sent scores of round {event.round} in round {round_index}")
    return [replace(event, client_id=client_id, method=None, seed=None) for event in events]


def about_of(reply: Message, client_id: str) -> SiteAbout:
    """What a site says of itself, by the name that the server knows it by."""
    values = _json_of(reply, ABOUT, f"client {client_id!r}")
    try:
        about = replace(SiteAbout(**values), client_id=client_id)
    except TypeError as error:
        raise FlexError(f"client {client_id!r} does not say who it is: {error}") from None
    for f in fields(SiteAbout):
        came = getattr(about, f.name)
        if not isinstance(came, kind := ABOUT_KINDS[str(f.type).partition("[")[0]]) or came is True:
            raise FlexError(f"client {client_id!r} says that its {f.name} is {came!r}; expected {kind.__name__}")
    return about


def size_of(reply: Message, sender: str) -> float:
    """The weight of a reply in a mean: its number of examples."""
    size = metrics_of(reply, sender).get(NUM_EXAMPLES)
    if not isinstance(size, int | float) or not 1 <= size < math.inf:
        raise FlexError(f"{sender} reported {NUM_EXAMPLES} {size!r}; expected a number from 1 on")
    return size


def check_metrics(metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises FlexError where one sender's numbers are not those that the first one sent, by name."""
    (first, expected), *others = metrics.items()
    for sender, own in others:
        if odd := sorted(own.keys() ^ expected.keys()):
            has, lacks = (sender, first) if odd[0] in own else (first, sender)
            raise FlexError(
                f"{has} sent the metric {odd[0]!r}, which {lacks} did not; expected the same of every client"
            )


def to_control(arrays: Arrays) -> ConfigRecord:
    """Control variates as they travel."""
    from flex.federation.flower import ConfigRecord

    return ConfigRecord({name: array.data for name, array in to_record(arrays).items()})


def control_of(content: RecordDict, sender: str = "the server") -> ArrayRecord:
    """The inverse of `to_control`; empty where a message has none.

    Raises:
        FlexError: one of them is no tensor.
    """
    from flex.federation.flower import Array, ArrayRecord

    try:
        came = content.config_records.get(CONTROL, {})
        return ArrayRecord({name: Array(np.load(io.BytesIO(data), allow_pickle=False)) for name, data in came.items()})
    except (TypeError, ValueError, EOFError) as error:
        raise FlexError(f"{sender} sent a {CONTROL!r} record that holds no tensors: {error}") from None


def carried_arrays(content: RecordDict) -> Arrays:
    """What a turn starts from: the shared state, and control variates where they were sent, by their names."""
    return to_arrays(content[ARRAYS]) | to_arrays(control_of(content))


def update_of(reply: Message, sent: ArrayRecord, sender: str, record: str = ARRAYS) -> dict[str, Array]:
    """The tensors of a reply, in the order in which they were sent out.

    Raises:
        FlexError: they are not the tensors that were sent, in names, shapes and dtype; the sender and the tensor are
            named.
    """
    records = reply.content.array_records
    if list(records) != [record]:
        names = ", ".join(map(repr, records)) or "none"
        raise FlexError(f"{sender} sent {len(records)} ArrayRecords ({names}); expected exactly one, {record!r}")
    return same_tensors(records[record], sent, sender)


def same_tensors(came: ArrayRecord, sent: ArrayRecord, sender: str, dtype: str = "float32") -> dict[str, Array]:
    """`came` in the order of `sent`; FlexError where its names, shapes or dtypes are others."""
    if missing := [name for name in sent if name not in came]:
        raise FlexError(f"{sender} did not send {missing[0]!r}; expected every tensor that the server sent out")
    if extra := [name for name in came if name not in sent]:
        raise FlexError(f"{sender} sent {extra[0]!r}, which the server did not send out; nothing else may travel")
    for name, wanted in sent.items():
        if tuple(came[name].shape) != tuple(wanted.shape):
            raise FlexError(
                f"{sender} sent {name!r} with shape {tuple(came[name].shape)}; expected {tuple(wanted.shape)}, as the "
                "server sent it (all clients must have the same model and LoRA rank)"
            )
        if came[name].dtype != dtype:
            raise FlexError(f"{sender} sent {name!r} as {came[name].dtype}; expected {dtype}")
    return {name: came[name] for name in sent}


def shares(sizes: Sequence[float]) -> list[float]:
    """n_k / sum_k n_k"""
    return [size / sum(sizes) for size in sizes]


def weighted_mean(updates: Sequence[Mapping[str, Array]], sizes: Sequence[float]) -> Arrays:
    """sum_k n_k w_k / sum_k n_k in float32, summed in the order given: the bits of Flower's own FedAvg."""
    mean: Arrays = {}
    for update, share in zip(updates, shares(sizes), strict=True):
        for name, array in update.items():
            term = array.numpy() * share
            mean[name] = mean[name] + term if name in mean else term
    return mean


def mean_metrics(metrics: Sequence[Mapping[str, Any]], sizes: Sequence[float]) -> MetricRecord:
    """The weighted mean of every number, or list of numbers of one length, that all clients reported."""
    from flex.federation.flower import MetricRecord

    mean = {}
    for key in metrics[0]:
        values = [np.asarray(m[key], dtype=np.float64) for m in metrics if key in m]
        if key in (NUM_EXAMPLES, CLIENT_INDEX) or len(values) < len(metrics) or len({v.shape for v in values}) > 1:
            continue
        mean[key] = sum(share * value for share, value in zip(shares(sizes), values, strict=True)).tolist()
    return MetricRecord(mean)
