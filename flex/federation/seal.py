"""A reply says what it answers: the round, and a hash of the tensors it was sent and of those it sends.

What a client sends is only of use to the server if it was made from what the server sent, in this round, and arrived
whole. TLS says the last of one connection; the seal says all three from the client's program to the server's.
"""

import hashlib
from collections.abc import Callable
from typing import Any

from flex.errors import FlexError
from flex.federation.flower import ConfigRecord, Context, Message, RecordDict
from flex.federation.messages import CONFIG, control_of

SEAL = "seal"
ROUND = "server-round"


def digest(content: RecordDict) -> str:
    """sha256 of all tensors of a message or reply: names, dtypes, shapes and values, in their order."""
    found = hashlib.sha256()
    for record in (*content.array_records.values(), control_of(content)):
        for name, array in record.items():
            found.update(f"{name} {array.dtype} {tuple(array.shape)} ".encode())
            found.update(array.data)
    return found.hexdigest()


def round_of(content: RecordDict) -> int:
    """The round that a message speaks of; 0 where it speaks of none."""
    return int(content.config_records.get(CONFIG, {}).get(ROUND, 0))


def sealed(message: Message, context: Context, answer: Callable[[Message, Context], Message]) -> Message:
    """A Flower mod, the outermost one of a ClientApp: adds the seal to what it answers."""
    told: dict[str, Any] = {"round": round_of(message.content), "start": digest(message.content)}
    reply = answer(message, context)
    if isinstance(reply, Message) and reply.has_content():
        reply.content[SEAL] = ConfigRecord({**told, "sha256": digest(reply.content)})
    return reply


def check_seal(message: Message, reply: Message, sender: str) -> None:
    """Raises FlexError where a reply is not one to this message, or has changed since it was made."""
    seal = reply.content.config_records.get(SEAL)
    if seal is None:
        raise FlexError(f"{sender} sent a reply without a seal; expected the round and hashes that it answers with")
    wanted = {"round": round_of(message.content), "start": digest(message.content), "sha256": digest(reply.content)}
    sentences = {
        "round": "a reply to round {came} in round {expected}; expected one to what it was asked",
        "start": "a reply that starts from other tensors ({came:.12}) than it was sent ({expected:.12})",
        "sha256": "tensors that are not those it made (sha256 {expected:.12}, it said {came:.12}): changed on the way",
    }
    for key, expected in wanted.items():
        if (came := seal.get(key)) != expected:
            what = sentences[key].format(came=str(came), expected=str(expected))
            raise FlexError(f"{sender} sent {what}")
