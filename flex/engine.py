"""The federated run in one process: a Grid that calls the ClientApp itself, the rounds, and the server's checkpoint.

`run_rounds` is the algorithm. It drives Flower's Strategy, Message and ArrayRecord through any Flower Grid: the
`InProcessGrid` here, or the one that Flower hands to a ServerApp. Whatever the Grid, one ClientApp serves:

    train      content: `arrays` (the shared state), `config` with `server-round`, `evaluate` (is this a round that ends
               with an evaluation?) and the caller's own;  reply: `arrays` and `metrics`
    evaluate   the same content;  reply: `metrics`
    query      reply: who this node is (`answer_identity` is the handler)

A client's own state does not belong into Flower's `Context.state`, which is lost with the process: it is in the
client's personal file.
"""

import hashlib
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flex.errors import FlexError
from flex.flower import (
    CLIENT_RAISED,
    ClientApp,
    ConfigRecord,
    Context,
    Error,
    Grid,
    Message,
    MessageType,
    RecordDict,
    Strategy,
    become_server,
    empty_run,
)
from flex.state import load_tensors, save_tensors
from flex.strategy import FedAvg, strategy_state
from flex.wire import CLIENT_INDEX, Arrays, metrics_of, sent_bytes, to_arrays, to_record

Config = Mapping[str, bool | int | float | str]
FIRST_NODE_ID = 1000  # deterministic, where a real server draws 64 random bits
RUN_ID = 1


class ClientFailed(RuntimeError):
    """A client raised or did not answer. The sentence names it; what it raised in this process is the cause."""


class InProcessGrid(Grid):
    """A Flower Grid without processes: each message runs the ClientApp here, one client after another.

    Args:
        client_app: Flower's ClientApp, the one that would run on the nodes.
        client_ids: the clients; their order is the order of sampling, training and summation.
        run_config: what the app finds in `context.run_config`. In `context.node_config` it finds `client-id` and
            `partition-id`, the client's index.
        on_message: called with (message, reply, seconds) after each message: progress, traffic.
    """

    def __init__(
        self,
        client_app: ClientApp,
        client_ids: list[str],
        run_config: Config | None = None,
        on_message: Callable[[Message, Message, float], None] | None = None,
    ):
        if not client_ids or len(set(client_ids)) < len(client_ids):
            raise FlexError(f"client_ids is {client_ids}; wanted at least one name, each once")
        become_server(RUN_ID)
        self.client_app, self.on_message = client_app, on_message
        self.clients = {FIRST_NODE_ID + index: client_id for index, client_id in enumerate(client_ids)}
        self.raised: dict[int, Exception] = {}  # node id -> what its ClientApp raised in its last message
        self._contexts = {
            node: Context(
                run_id=RUN_ID,
                node_id=node,
                node_config={"client-id": self.clients[node], "partition-id": node - FIRST_NODE_ID},
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for node in self.clients
        }
        self._run = empty_run(RUN_ID)
        self._replies: dict[str, Message] = {}

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """The replies, each computed when it is asked for: who stops at a failure does not train the rest in vain."""
        return (self._deliver(message) for message in messages)

    def _deliver(self, message: Message) -> Message:
        node, started = message.metadata.dst_node_id, time.perf_counter()
        self.raised.pop(node, None)
        # Strategies put one RecordDict into all messages: a client that drops a key must not take it from the next one.
        content = message.content
        message.content = RecordDict({name: type(record)(dict(record)) for name, record in content.items()})
        try:
            reply = self.client_app(message, self._contexts[node])
            if not isinstance(reply, Message):
                raise TypeError(f"the ClientApp returned {type(reply).__name__}; wanted a Message")
        except Exception as error:  # as on a real node: the reply says what happened
            self.raised[node] = error
            reply = Message(Error(code=CLIENT_RAISED, reason=_sentence(error)), reply_to=message)
        message.content = content
        if self.on_message:
            self.on_message(message, reply, time.perf_counter() - started)
        return reply

    def get_node_ids(self) -> list[int]:
        return list(self.clients)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        replies = {uuid.uuid4().hex: self._deliver(message) for message in messages}
        self._replies |= replies
        return list(replies)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(key) for key in list(message_ids) if key in self._replies]

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    @property
    def run(self):
        return self._run

    def set_run(self, run) -> None:
        self._run = run


@dataclass(frozen=True)
class Turn:
    """One client's part in a round: what it reported, and the bytes of the tensors that travelled."""

    client_id: str
    metrics: dict[str, Any]
    bytes_down: int
    bytes_up: int


@dataclass(frozen=True)
class RoundReport:
    """What happened in a round, client by client, in client order."""

    round_index: int
    train: list[Turn]
    evaluate: list[Turn] = field(default_factory=list)  # empty where the round has no evaluation
    failed: dict[str, str] = field(default_factory=dict)  # client id -> what it said; only with `skip_failed`


def run_rounds(
    strategy: Strategy,
    grid: Grid,
    shared: Arrays,
    num_rounds: int,
    *,
    start_round: int = 1,
    train_config: Config | None = None,
    evaluate_config: Config | None = None,
    evaluate_every: int | None = 1,
    on_round: Callable[[int, Arrays, RoundReport], None] | None = None,
    skip_failed: bool = False,
    timeout: float | None = None,
) -> Arrays:
    """Rounds `start_round` to `num_rounds` of federated training.

    Args:
        strategy: who averages how; for a resumed run with its state restored.
        shared: the shared state that round `start_round` begins with.
        train_config, evaluate_config: what goes to the clients with every message, beside what the module names.
        evaluate_every: rounds from one evaluation to the next; the last round always has one. 0: the last only. None:
            never.
        on_round: called with (round, shared state after it, report) when all of a round is done: the place for a
            checkpoint.
        skip_failed: go on without a client that failed, as long as one has trained. By default the run stops.
        timeout: seconds to wait for the replies of a round; not for `InProcessGrid`.

    Returns:
        the shared state after the last round.

    Raises:
        ClientFailed, or FlexError where that is what the client raised: names the client, round and reason.
    """
    strategy.clients = clients = getattr(grid, "clients", None) or ask_clients(grid, timeout)
    for round_index in range(start_round, num_rounds + 1):
        exchange = _Exchange(grid, clients, round_index, skip_failed, timeout)
        evaluating = _evaluates(round_index, num_rounds, evaluate_every)

        config = ConfigRecord({**(train_config or {}), "evaluate": evaluating})
        messages = strategy.configure_train(round_index, to_record(shared), config, grid)
        replies, train = exchange(messages)

        average, _ = strategy.aggregate_train(round_index, replies)
        shared = shared if average is None else to_arrays(average)

        evaluate: list[Turn] = []
        if evaluating:
            config = ConfigRecord(dict(evaluate_config or {}))
            messages = strategy.configure_evaluate(round_index, to_record(shared), config, grid)
            _, evaluate = exchange(messages)

        if on_round:
            on_round(round_index, shared, RoundReport(round_index, train, evaluate, exchange.failed))
    return shared


def _evaluates(round_index: int, num_rounds: int, every: int | None) -> bool:
    if every is None:
        return False
    return round_index == num_rounds or (every > 0 and round_index % every == 0)


class _Exchange:
    """Sends the messages of a round and takes the replies in: errors become exceptions, or are kept by client."""

    def __init__(self, grid: Grid, clients: dict[int, str], round_index: int, skip_failed: bool, timeout: float | None):
        self.grid, self.clients, self.round_index = grid, clients, round_index
        self.skip_failed, self.timeout = skip_failed, timeout
        self.failed: dict[str, str] = {}

    def __call__(self, messages: Iterable[Message]) -> tuple[list[Message], list[Turn]]:
        """The replies that are no errors, and the turns they tell of, both in client order."""
        pending = {message.metadata.dst_node_id: message for message in messages}
        answered: dict[int, tuple[Message, Turn]] = {}
        for reply in self.grid.send_and_receive(list(pending.values()), timeout=self.timeout):
            node = self._sender(reply, pending)
            message = pending.pop(node)
            if reply.has_error():
                cause = getattr(self.grid, "raised", {}).pop(node, None)
                self._fail(node, message.metadata.message_type, reply.error.reason or "no reason given", cause)
            else:
                down, up = sent_bytes(message.content), sent_bytes(reply.content)
                answered[node] = reply, Turn(self._name(node), metrics_of(reply), down, up)
        for node, message in pending.items():
            self._fail(node, message.metadata.message_type, f"no reply within {self.timeout} s")
        if not answered and self.failed:
            said = "; ".join(f"{name}: {reason}" for name, reason in self.failed.items())
            raise ClientFailed(f"every client failed in round {self.round_index}: {said}")
        in_order = [answered[node] for node in sorted(answered, key=list(self.clients).index)]
        return [reply for reply, _ in in_order], [turn for _, turn in in_order]

    def _name(self, node: int) -> str:
        return self.clients.get(node, f"node {node}")

    def _sender(self, reply: Message, pending: dict[int, Message]) -> int:
        """The node that answers; the reply for a node that died comes from the server, and only names the message."""
        if reply.metadata.src_node_id in pending:
            return reply.metadata.src_node_id
        ids = {message.metadata.message_id: node for node, message in pending.items()}
        return ids[reply.metadata.reply_to_message_id]

    def _fail(self, node: int, doing: str, reason: str, cause: Exception | None = None) -> None:
        self.failed[self._name(node)] = reason
        if not self.skip_failed:
            kind = FlexError if isinstance(cause, FlexError) else ClientFailed
            raise kind(f"client {self._name(node)!r} failed in round {self.round_index} ({doing}): {reason}") from cause


def ask_clients(grid: Grid, timeout: float | None = None) -> dict[int, str]:
    """node id -> client id of the nodes of any Grid, in client order: each node is asked who it is.

    Raises:
        FlexError: a node does not say, or two nodes are the same client.
    """
    messages = [Message(RecordDict(), node, MessageType.QUERY) for node in grid.get_node_ids()]
    answers: dict[int, tuple[int, str]] = {}
    for reply in grid.send_and_receive(messages, timeout=timeout):
        node = reply.metadata.src_node_id
        if reply.has_error():
            raise FlexError(f"node {node} does not say which client it is: {reply.error.reason}")
        answer = reply.content["client"]
        answers[node] = int(answer[CLIENT_INDEX]), str(answer["client-id"])
    if len(answers) < len(messages) or len(set(answers.values())) < len(answers) or not answers:
        raise FlexError(f"{len(messages)} nodes, who say they are {sorted(answers.values())}; wanted each client once")
    return {node: answers[node][1] for node in sorted(answers, key=answers.__getitem__)}


def answer_identity(message: Message, context: Context) -> Message:
    """The client's half of `ask_clients`, to be registered with the ClientApp: `app.query()(answer_identity)`."""
    node = context.node_config
    index = int(node["partition-id"])
    answer = {"client-id": str(node.get("client-id", index)), CLIENT_INDEX: index}
    return Message(RecordDict({"client": ConfigRecord(answer)}), reply_to=message)


def save_server(
    path: Path, round_index: int, shared: Arrays, strategy: FedAvg, header: Mapping[str, Any] | None = None
) -> None:
    """All that the server needs to go on after round `round_index`, in one safetensors file; whole or not at all.

    Args:
        header: what the caller wants to find again (base, method, seed); JSON values.

    Raises:
        FlexError: the file cannot be written (disk full, no such folder).
    """
    tensors = {f"shared:{name}": array for name, array in shared.items()}
    tensors |= {f"strategy:{name}": array for name, array in strategy_state(strategy).items()}
    tensors = {name: torch.from_numpy(np.array(array, dtype=np.float32)) for name, array in tensors.items()}
    kept = {"kind": "server", "round": round_index, "sha256": _digest(tensors), "header": dict(header or {})}
    save_tensors(path, tensors, kept)


def load_server(path: Path) -> tuple[int, Arrays, Arrays, dict[str, Any]]:
    """(round_index, shared, strategy_arrays, header) of a file that `save_server` wrote.

    Raises:
        FlexError: the file is missing, cut short, changed, or something else than a server's state.
    """
    tensors, kept = load_tensors(path)
    if not isinstance(kept, dict) or kept.get("kind") != "server":
        raise FlexError(f"{path} is no server state; wanted a file that `save_server` wrote")
    if kept.get("sha256") != _digest(tensors):
        raise FlexError(f"{path} is damaged: its tensors are not those that were written")
    parts: dict[str, Arrays] = {"shared": {}, "strategy": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition(":")
        parts[part][name] = tensor.numpy().copy()  # the tensor is a map of the file
    return kept["round"], parts["shared"], parts["strategy"], kept["header"]


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].numpy()
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, FlexError) else f"{type(error).__name__}: {error}"
