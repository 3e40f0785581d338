"""What goes over a worker's socket: a length, JSON and safetensors. Nothing is ever unpickled.

    frame      magic, bytes of the JSON (uint32), bytes of the tensors (uint64), JSON, safetensors
    question   {"kind": "train" | "evaluate" | "query", "records": ...}
    answer     {"records": ...}, or {"error": sentence}; while the worker is at it, {"alive": true} every few seconds

`records` describes a Flower RecordDict, record by record; its tensors and bytes are in the safetensors part.
"""

import json
import math
import socket
import struct
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from flex.errors import FlexError
from flex.federation.flower import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

MAGIC = b"FLX1"
HEAD = struct.Struct("<4sIQ")
MOST_JSON = 16 * 2**20
MOST_TENSORS = 4 * 2**30
KINDS = ("train", "evaluate", "query")  # of messages; Flower's names
LISTS = (list, tuple)


def send_frame(connection: socket.socket, head: dict[str, Any], content: RecordDict | None = None) -> None:
    """Sends one frame; OSError where the other side has gone."""
    records, tensors = describe(content) if content is not None else (None, {})
    text = json.dumps(head if records is None else {**head, "records": records}).encode()
    body = save(tensors) if tensors else b""
    connection.sendall(HEAD.pack(MAGIC, len(text), len(body)) + text)
    connection.sendall(body)


def receive_frame(connection: socket.socket, who: str) -> tuple[dict[str, Any], RecordDict]:
    """(JSON without its records, records) of one frame.

    Raises:
        FlexError: the other side has gone, is silent for longer than the socket's timeout, or sends something else.
    """
    magic, num_json, num_tensors = HEAD.unpack(_exactly(connection, HEAD.size, who))
    if magic != MAGIC:
        raise FlexError(f"{who} speaks another language (it begins with {magic!r}); expected {MAGIC!r}")
    if num_json > MOST_JSON or num_tensors > MOST_TENSORS:
        raise FlexError(
            f"{who} announces {num_json} and {num_tensors} bytes; expected at most {MOST_JSON} and {MOST_TENSORS}"
        )
    text, body = _exactly(connection, num_json, who), _exactly(connection, num_tensors, who)
    try:
        head = json.loads(text.decode())
        tensors = load(bytes(body)) if body else {}
        return head, build(head.pop("records", {}), tensors)
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError, RecursionError) as error:
        raise FlexError(f"{who} sent no frame that can be read ({type(error).__name__}: {error})") from None


def _exactly(connection: socket.socket, count: int, who: str) -> bytearray:
    came, view = bytearray(count), 0
    with memoryview(came) as whole:
        while view < count:
            try:
                got = connection.recv_into(whole[view:])
            except TimeoutError:
                raise FlexError(f"{who} has been silent for {connection.gettimeout():g} s") from None
            except OSError as error:
                raise FlexError(f"{who} has gone ({error})") from None
            if not got:
                raise FlexError(f"{who} has gone")
            view += got
    return came


def describe(content: RecordDict) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """A RecordDict as JSON and tensors."""
    records, tensors = [], {}

    def keep(value: np.ndarray) -> str:
        tensors[key := f"{len(tensors)}"] = np.ascontiguousarray(value).reshape(value.shape)
        return key

    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            values: dict[str, Any] = {key: keep(array.numpy()) for key, array in record.items()}
            records.append({"name": name, "type": "arrays", "values": values})
            continue
        kind = "metrics" if isinstance(record, MetricRecord) else "config"
        records.append({"name": name, "type": kind, "values": {key: _plain(v, keep) for key, v in record.items()}})
    return records, tensors


def _plain(value: Any, keep: Any) -> Any:
    """A value of a record as JSON; bytes go among the tensors."""
    if isinstance(value, bytes):
        return {"bytes": keep(np.frombuffer(value, dtype=np.uint8))}
    if isinstance(value, LISTS):
        return [_plain(item, keep) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def build(records: list[dict[str, Any]], tensors: dict[str, np.ndarray]) -> RecordDict:
    """The inverse of `describe`; ValueError, KeyError or TypeError where it describes nothing."""
    content = RecordDict()
    for record in records:
        kind, values = record["type"], record["values"]
        if kind == "arrays":
            content[record["name"]] = ArrayRecord({key: Array(tensors[name]) for key, name in values.items()})
        else:
            record_type = {"metrics": MetricRecord, "config": ConfigRecord}[kind]
            content[record["name"]] = record_type({key: _value(value, tensors) for key, value in values.items()})
    return content


def _value(value: Any, tensors: dict[str, np.ndarray]) -> Any:
    if isinstance(value, list):
        return [_value(item, tensors) for item in value]
    if isinstance(value, dict):
        return float(value["float"]) if "float" in value else tensors[value["bytes"]].tobytes()
    return value
