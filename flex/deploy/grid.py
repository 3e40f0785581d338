"""The sites of a run as a Flower Grid: who is who by node key, the job in every message, waiting that ends."""

import time
from collections.abc import Callable, Iterable

from flex.deploy.job import JOB
from flex.errors import FlexError
from flex.federation.flower import ConfigRecord, Grid, Message, MessageType, RecordDict
from flex.federation.seal import round_of

POLL_S = 0.5
QUERY_S = 1800.0  # the first question of a job waits for a worker that builds its model
TURN_S = 24 * 3600.0  # where the configuration names no timeout: a dead node is told by its heartbeat, long before
LOOK_S = 1.0


class SiteGrid(Grid):
    """Flower's own Grid with the sites' names.

    Args:
        grid: the one that Flower hands to a ServerApp.
        clients: node id -> site, in the order in which sites are numbered, sampled and summed.
        job: goes with every message (`job.py`).
        say: told who has answered, and who is waited for.
        trained: called for every turn of training that has come back.
    """

    def __init__(
        self,
        grid: Grid,
        clients: dict[int, str],
        job: ConfigRecord,
        say: Callable[[str], None],
        trained: Callable[[], None],
    ):
        self.grid, self.clients, self.job, self.say, self.trained = grid, clients, job, say, trained
        super().__init__()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        messages = list(messages)
        for message in messages:
            message.content = RecordDict({**message.content, JOB: self.job})
        doing = messages[0].metadata.message_type if messages else ""
        limit = timeout or (QUERY_S if doing == MessageType.QUERY else TURN_S)
        pushed = dict(zip(self.push_messages(messages), messages, strict=True))
        pending = {key: self.clients[message.metadata.dst_node_id] for key, message in pushed.items()}
        replies: list[Message] = []
        ends = time.monotonic() + limit
        while pending and time.monotonic() < ends:
            came = list(self.pull_messages(list(pending)))
            for reply in came:
                pending.pop(reply.metadata.reply_to_message_id, None)
            replies += came
            for _ in came if doing == MessageType.TRAIN else ():
                self.trained()
            if came:
                at = f"round {round_of(messages[0].content)}, " if round_of(messages[0].content) else ""
                left = f"waiting for {', '.join(pending.values())}" if pending else "all sites answered"
                self.say(f"{at}{doing}: {left}")
            elif pending:
                time.sleep(POLL_S)
        return replies

    def get_node_ids(self) -> list[int]:
        """All sites, there or not: one that is not answers with an error."""
        return list(self.clients)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return list(self.grid.push_messages(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return list(self.grid.pull_messages(message_ids))

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    @property
    def run(self):
        return self.grid.run

    def set_run(self, run) -> None:
        self.grid.set_run(run)


def wait_for(
    present: Callable[[], set[int]], clients: dict[int, str], seconds: float, say: Callable[[str], None]
) -> None:
    """Waits until every site is connected: what a run rests on is asked of all of them.

    Raises:
        FlexError: a site did not come within `seconds`; names it.
    """
    ends, before = time.monotonic() + seconds, None
    while True:
        there = present()
        missing = [name for node, name in clients.items() if node not in there]
        if not missing:
            return
        if time.monotonic() > ends:
            raise FlexError(
                f"{', '.join(missing)} did not connect within {seconds:g} s; expected `flex node` to run there"
            )
        if missing != before:
            say(f"waiting for {', '.join(missing)} to connect")
            before = missing
        time.sleep(LOOK_S)
