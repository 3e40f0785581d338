"""One exchange of messages: the replies by client, each checked before anybody uses it, and who is left out of it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from flex.errors import FlexError
from flex.federation.flower import Grid, Message
from flex.federation.guard import Guard, Update, check_numbers
from flex.federation.messages import CONFIG, SCORES, SPLITS, events_of, metrics_of, sender_of, sent_tensors
from flex.federation.seal import check_seal
from flex.store.events import Event, LeftOut


class ClientFailed(RuntimeError):
    """A client raised or did not answer. The sentence names it; what it raised in this process is the cause."""


@dataclass(frozen=True)
class Turn:
    """One client's part in an exchange: the numbers and events it reported, and the tensors that travelled, with their
    `name`, `shape`, `dtype` and `bytes`, down to the client and up from it; of training also what was measured of its
    update."""

    client_id: str
    metrics: dict[str, Any]
    events: list[Event]
    down: list[dict[str, Any]]
    up: list[dict[str, Any]]
    update: Update | None = None

    @property
    def bytes_down(self) -> int:
        return sum(tensor["bytes"] for tensor in self.down)

    @property
    def bytes_up(self) -> int:
        return sum(tensor["bytes"] for tensor in self.up)


class Exchange:
    """Sends the messages of a round and takes the replies in: errors become exceptions, or are kept by client.

    Attributes:
        scored: by node, the scores of the round before that came with a turn of this one.
    """

    def __init__(self, grid: Grid, clients: dict[int, str], round_index: int, skip_failed: bool, timeout: float | None):
        self.grid, self.clients, self.round_index = grid, clients, round_index
        self.skip_failed, self.timeout = skip_failed, timeout
        self.left_out: list[LeftOut] = []
        self.scored: dict[int, Turn] = {}

    def __call__(
        self, messages: Iterable[Message], guard: Guard | None = None, others: int = 0
    ) -> tuple[list[Message], list[Turn]]:
        """The replies that are no errors and are not refused, and the turns they tell of, both in client order.

        Args:
            guard: of replies to training.
            others: how many have answered elsewhere: without any, a round in which every client fails ends the run.
        """
        sent = {message.metadata.dst_node_id: message for message in messages}
        answered: dict[int, tuple[Message, Turn]] = {}
        for node, reply in self._replies(sent):
            try:
                answered[node] = reply, self._turn(node, sent[node], reply, guard)
            except FlexError as error:
                self.refuse(node, sent[node].metadata.message_type, error)
        if guard:
            answered = self._compared(sent, answered, guard)
        if not answered and not others and self.left_out:
            raise ClientFailed(f"every client failed in round {self.round_index}: {self.said}")
        place = {node: index for index, node in enumerate(self.clients)}
        in_order = [answered[node] for node in sorted(answered, key=lambda node: place.get(node, len(place)))]
        return [reply for reply, _ in in_order], [turn for _, turn in in_order]

    def ask(self, messages: Iterable[Message], doing: str) -> dict[int, Message]:
        """The replies by node, as they came; `doing` is what an error calls it."""
        sent = {message.metadata.dst_node_id: message for message in messages}
        answered: dict[int, Message] = {}
        for node, reply in self._replies(sent, doing):
            try:
                check_seal(sent[node], reply, f"client {self.name(node)!r}")
                answered[node] = reply
            except FlexError as error:
                self.refuse(node, doing, error)
        return answered

    @property
    def said(self) -> str:
        """Why clients are left out, in one line."""
        return "; ".join(f"{event.client_id}: {event.reason}" for event in self.left_out)

    def _replies(self, sent: dict[int, Message], doing: str = "") -> Iterator[tuple[int, Message]]:
        """(node, reply) as they come, of those who answer in time and with no error."""
        pending, stream = dict(sent), getattr(self.grid, "stream", None)
        messages = list(sent.values())
        # One by one where the grid can do that: who stops at a failure does not train the rest in vain.
        for reply in stream(messages) if stream else self.grid.send_and_receive(messages, timeout=self.timeout):
            node = sender_of(reply, pending)
            kind = doing or sent[node].metadata.message_type
            del pending[node]
            if reply.has_error():
                cause = getattr(self.grid, "raised", {}).pop(node, None)
                self._fail(node, kind, reply.error.reason or "no reason given", cause)
            else:
                yield node, reply
        for node, message in pending.items():
            waited = "" if self.timeout is None else f" within {self.timeout:g} s"
            self._fail(node, doing or message.metadata.message_type, f"no reply{waited}")

    def _turn(self, node: int, message: Message, reply: Message, guard: Guard | None) -> Turn:
        """What a reply tells, and of training what was measured of its update; FlexError where it is refused."""
        name, update = self.name(node), None
        check_seal(message, reply, f"client {name!r}")
        down, up = sent_tensors(message.content), sent_tensors(reply.content)
        if guard:
            update = guard.admit(message, reply, name, self.round_index)
            if SPLITS in message.content.config_records.get(CONFIG, {}) and SCORES in reply.content.config_records:
                scores = events_of(reply, name, self.round_index - 1, SCORES)
                self.scored[node] = Turn(name, {}, scores, [], [])
        else:
            check_numbers(reply, f"client {name!r}")
        return Turn(name, metrics_of(reply), events_of(reply, name, self.round_index), down, up, update)

    def _compared(
        self, messages: dict[int, Message], answered: dict[int, tuple[Message, Turn]], guard: Guard
    ) -> dict[int, tuple[Message, Turn]]:
        """What is left of the replies when each is held against the others."""
        nodes = {self.name(node): node for node in answered}
        replies = {name: answered[node][0] for name, node in nodes.items()}
        updates = {name: turn.update for name, node in nodes.items() if (turn := answered[node][1]).update}
        for name, reason in guard.compare(replies, updates).items():
            self.refuse(node := nodes.pop(name), messages[node].metadata.message_type, FlexError(reason))
            del updates[name]
        sent = {name: messages[node] for name, node in nodes.items()}
        updates = guard.compare_directions(sent, replies, updates)
        return {node: (replies[name], replace(answered[node][1], update=updates[name])) for name, node in nodes.items()}

    def name(self, node: int) -> str:
        return self.clients.get(node, f"node {node}")

    def refuse(self, node: int, doing: str, error: FlexError) -> None:
        """A reply that came, but is not taken."""
        self.left_out.append(LeftOut(self.round_index, self.name(node), doing, str(error)))
        if not self.skip_failed:
            raise error

    def _fail(self, node: int, doing: str, reason: str, cause: Exception | None = None) -> None:
        self.left_out.append(LeftOut(self.round_index, self.name(node), doing, reason))
        if not self.skip_failed:
            kind = FlexError if isinstance(cause, FlexError) else ClientFailed
            raise kind(f"client {self.name(node)!r} failed in round {self.round_index} ({doing}): {reason}") from cause
