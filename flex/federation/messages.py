"""What travels between the server and its clients: shared tensors as Flower's records, counted, checked and averaged.

A message carries one ArrayRecord `arrays` (float32) and one ConfigRecord `config`; a reply to training one ArrayRecord
of the same tensors and one MetricRecord with at least `num-examples`; a reply to evaluation the MetricRecord alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flex.errors import FlexError

if TYPE_CHECKING:  # Flower itself only where a record is made: a client's turn needs none
    from flex.federation.flower import Array, ArrayRecord, Message, MetricRecord, RecordDict

Arrays = dict[str, np.ndarray]

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"  # the records' names in a message, as Flower's strategies use
NUM_EXAMPLES, CLIENT_INDEX = "num-examples", "client-index"


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
        for record in content.array_records.values()
        for name, array in record.items()
    ]


def sent_bytes(content: RecordDict) -> int:
    """The bytes of all tensors of a message or reply; its few numbers are not counted."""
    return sum(tensor["bytes"] for tensor in sent_tensors(content))


def metrics_of(reply: Message) -> dict[str, Any]:
    """The numbers a client reported, as it reported them."""
    return dict(next(iter(reply.content.metric_records.values()), {}))


def size_of(reply: Message, sender: str) -> float:
    """The weight of a reply in a mean: its number of examples."""
    size = metrics_of(reply).get(NUM_EXAMPLES)
    if not isinstance(size, int | float) or not 0 < size < math.inf:
        raise FlexError(f"{sender} reported {NUM_EXAMPLES} {size!r}; wanted a number above 0")
    return size


def update_of(reply: Message, sent: ArrayRecord, sender: str) -> dict[str, Array]:
    """The tensors of a reply, in the order in which they were sent out.

    Raises:
        FlexError: they are not the tensors that were sent, in names, shapes and dtype; the sender and the tensor are
            named.
    """
    records = list(reply.content.array_records.values())
    if len(records) != 1:
        raise FlexError(f"{sender} sent {len(records)} ArrayRecords; wanted exactly one")
    came = records[0]
    if missing := [name for name in sent if name not in came]:
        raise FlexError(f"{sender} did not send {missing[0]!r}; wanted every tensor that the server sent out")
    if extra := [name for name in came if name not in sent]:
        raise FlexError(f"{sender} sent {extra[0]!r}, which the server did not send out; nothing else may travel")
    for name, wanted in sent.items():
        if tuple(came[name].shape) != tuple(wanted.shape):
            raise FlexError(
                f"{sender} sent {name!r} with shape {tuple(came[name].shape)}; wanted {tuple(wanted.shape)}, as the "
                "server sent it (all clients must have the same model and LoRA rank)"
            )
        if came[name].dtype != "float32":
            raise FlexError(f"{sender} sent {name!r} as {came[name].dtype}; wanted float32")
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
