"""A Flower Grid in one process: every message runs the ClientApp here, one client after another."""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator

from flex.errors import FlexError
from flex.federation.flower import (
    CLIENT_RAISED,
    ClientApp,
    Context,
    Error,
    Grid,
    Message,
    RecordDict,
    become_server,
    empty_run,
)
from flex.federation.rounds import (
    Config,
)

FIRST_NODE_ID = 1000  # deterministic, where a real server draws 64 random bits


RUN_ID = 1


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
            raise FlexError(f"client_ids is {client_ids}; expected at least one name, each once")
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

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return list(self.stream(messages))

    def stream(self, messages: Iterable[Message]) -> Iterator[Message]:
        """The replies, each computed when it is asked for: who stops at a failure does not train the rest in vain."""
        return map(self._deliver, messages)

    def _deliver(self, message: Message) -> Message:
        node, started = message.metadata.dst_node_id, time.perf_counter()
        self.raised.pop(node, None)
        # Strategies put one RecordDict into all messages: a client that drops a key must not take it from the next one.
        content = message.content
        message.content = RecordDict({name: type(record)(dict(record)) for name, record in content.items()})
        try:
            reply = self.client_app(message, self._contexts[node])
            if not isinstance(reply, Message):
                raise TypeError(f"the ClientApp returned {type(reply).__name__}; expected a Message")
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


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, FlexError) else f"{type(error).__name__}: {error}"
