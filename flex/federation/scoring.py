"""The scores of a round, on their way: who trains in the next round gives them at the beginning of its turn.

A score after aggregation is one of the shared state that the next round sends out anyway, with the personal state that
the next turn begins with. So an exchange of their own is for those who do not train in the next round, and for whoever
did not answer in its turn (it failed, was refused, or knows nothing of the question). Its numbers are the same.
"""

from collections.abc import Iterable

from flex.federation.exchange import Exchange, Turn
from flex.federation.flower import ConfigRecord, Message, RecordDict
from flex.federation.guard import sent_record
from flex.federation.messages import CONFIG, SCORED, SPLITS
from flex.store.events import LeftOut


class Scoring:
    """The scores of `round_index` that are still to come.

    Args:
        messages: those that would ask for them in an exchange of their own.
    """

    def __init__(self, round_index: int, messages: Iterable[Message]):
        self.round_index = round_index
        self.messages = {message.metadata.dst_node_id: message for message in messages}

    def asked_with(self, messages: Iterable[Message]) -> list[Message]:
        """The next round's messages to train; those that carry the state that is to be scored ask for its scores."""
        messages = list(messages)
        for message in messages:
            own, config = self.messages.get(message.metadata.dst_node_id), message.content.config_records.get(CONFIG)
            if own is not None and config is not None and _tensors(own) == _tensors(message):
                splits = own.content.config_records.get(CONFIG, {}).get(SPLITS, " ".join(SCORED))
                asking = ConfigRecord({**config, SPLITS: splits})
                message.content = RecordDict({**message.content, CONFIG: asking})  # others may share what it was
        return messages

    def collect(self, exchange: Exchange) -> tuple[list[Turn], list[LeftOut]]:
        """What each client scored, in client order, and who is left out: what came with `exchange`, the next round's
        training, and all others' in an exchange of their own."""
        came = {node: turn for node, turn in exchange.scored.items() if node in self.messages}
        own = Exchange(exchange.grid, exchange.clients, self.round_index, exchange.skip_failed, exchange.timeout)
        rest = [_anew(message) for node, message in self.messages.items() if node not in came]
        _, turns = own(rest, others=len(came)) if rest else ([], [])
        place = {name: index for index, name in enumerate(exchange.clients.values())}
        return sorted([*came.values(), *turns], key=lambda turn: place.get(turn.client_id, len(place))), own.left_out


def _tensors(message: Message) -> dict:
    return dict(sent_record(message)[1]) if message.content.array_records else {}


def _anew(message: Message) -> Message:
    """The same message, made now: Flower drops what is older than its time to live, and a round may last longer."""
    metadata = message.metadata
    return Message(message.content, metadata.dst_node_id, metadata.message_type, ttl=metadata.ttl)
