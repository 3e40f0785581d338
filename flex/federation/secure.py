"""Secure aggregation, the server's half: a round of training of which it learns the sum of the changes and no update.

`masking.py` says what is asked in which order. A site that fails after its turn is a drop-out: the others' shares take
its masks off, and the round is that of those who are left, as long as more than half are.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flex.errors import FlexError
from flex.federation.exchange import ClientFailed, Exchange, Turn
from flex.federation.flower import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict, secagg
from flex.federation.guard import Guard, Update, check_numbers, sent_record
from flex.federation.masking import (
    COLLECT,
    FEWEST,
    LARGEST,
    MASK,
    MASKED,
    SHARES,
    UNMASK,
    UPDATE_NORM,
    add_mask,
    decode,
    error_bound,
    levels_of,
    sign_of_pair,
    threshold_of,
)
from flex.federation.messages import (
    ASK,
    CONFIG,
    METRICS,
    NUM_EXAMPLES,
    Arrays,
    mean_metrics,
    metrics_of,
    same_tensors,
    sent_tensors,
    to_arrays,
    to_record,
)
from flex.federation.seal import ROUND, digest
from flex.store.events import Secured


class MaskedGuard(Guard):
    """What is required of a reply whose update the server does not see: the norms are the sites' own word."""

    def measure(self, message: Message, reply: Message, sender: str, round_index: int) -> Update:
        if MASK not in message.content.config_records:
            return super().measure(message, reply, sender, round_index)
        numbers = metrics_of(reply, sender)
        if any(reply.content.array_records.values()):
            raise FlexError(f"{sender} sent its update without a mask; expected none before the masks are agreed on")
        for name in (UPDATE_NORM, LARGEST):
            if not isinstance(numbers.get(name), int | float) or numbers[name] < 0:
                raise FlexError(f"{sender} reported {name} {numbers.get(name)!r}; expected a number from 0 on")
        reached, bound = float(numbers[LARGEST]), self.max_update_norm or math.inf
        if reached > bound * (1 + 1e-6):  # a client clips its own; its largest number shows if it did not
            raise FlexError(f"{sender} has a change that reaches {reached:.4g}; expected at most the bound, {bound:g}")
        _lists(reply, sender, MASK, (secagg().Key.PUBLIC_KEY_1, secagg().Key.PUBLIC_KEY_2), bytes)
        return Update(float(numbers[UPDATE_NORM]), "")

    def limit(self, message: Message, reply: Message, update: Update) -> Update:
        """The client has done it."""
        bound = self.max_update_norm
        return replace(update, scale=bound / update.norm) if bound and update.norm > bound else update

    def compare_directions(
        self, messages: Mapping[str, Message], replies: Mapping[str, Message], updates: Mapping[str, Update]
    ) -> dict[str, Update]:
        return dict(updates)


@dataclass
class _Round:
    """What the server keeps while a masked round goes on; sites by their number in it, from 1."""

    nodes: dict[int, int]
    keys: dict[int, list[bytes]]
    threshold: int
    limit: float
    levels: int


class SecureRound:
    """A round of training under masks, in place of a plain exchange.

    Args:
        weigh_by_size: whether a site's change counts by its number of examples, or all alike.
        first_alone: the first round in which no client sends an update any more, and none hides one.
    """

    def __init__(self, weigh_by_size: bool = True, first_alone: float = math.inf):
        self.weigh_by_size, self.first_alone = weigh_by_size, first_alone

    def __call__(
        self, exchange: Exchange, messages: list[Message], guard: Guard
    ) -> tuple[list[Message], list[Turn], Secured]:
        """(one reply with the mean of all, the turns that are in it, what to say of it).

        Raises:
            FlexError: fewer than three sites, a site that is refused, or masks that do not come off.
            ClientFailed: too few sites are left.
        """
        started = time.perf_counter()
        if len(messages) < FEWEST:
            raise FlexError(f"strategy.secure hides one site among {len(messages)}; expected {FEWEST} or more a round")
        if self.weigh_by_size and not guard.sizes:
            raise FlexError("the clients' numbers of examples are unknown; expected a guard with what each declared")
        nodes = {number: message.metadata.dst_node_id for number, message in enumerate(messages, 1)}
        threshold, most = threshold_of(len(nodes)), max(guard.sizes.values(), default=1)
        begin = {
            number: {"number": number, "sites": len(nodes), "threshold": threshold}
            | ({"weight": float(most)} if self.weigh_by_size else {})
            for number in nodes
        }
        replies, turns = exchange(
            [
                Message(
                    RecordDict({**message.content, MASK: ConfigRecord(begin[number])}), nodes[number], MessageType.TRAIN
                )
                for number, message in enumerate(messages, 1)
            ],
            guard,
        )
        number_of = {node: number for number, node in nodes.items()}
        trained = {number_of[r.metadata.src_node_id]: (r, t) for r, t in zip(replies, turns, strict=True)}
        key = secagg().Key
        state = _Round(
            nodes,
            {
                number: [bytes(reply.content[MASK][name]) for name in (key.PUBLIC_KEY_1, key.PUBLIC_KEY_2)]
                for number, (reply, _) in trained.items()
            },
            threshold,
            max(float(metrics_of(reply)[LARGEST]) for reply, _ in trained.values()),
            levels_of(len(nodes)),
        )
        keys = {str(number): pair for number, pair in state.keys.items()}
        _, sent = sent_record(messages[0])

        def check_shares(reply: Message, sender: str) -> None:
            _lists(reply, sender, MASK, (key.DESTINATION_LIST,), list, int)
            _lists(reply, sender, MASK, (key.CIPHERTEXT_LIST,), list, bytes)

        def check_opened(reply: Message, sender: str) -> None:
            _lists(reply, sender, MASK, (key.NODE_ID_LIST,), list, int)
            _lists(reply, sender, MASK, (key.SHARE_LIST,), list, bytes)

        def check_masked(reply: Message, sender: str) -> None:
            masked_of(reply, sent, sender)

        shares = self._ask(exchange, state, SHARES, dict.fromkeys(trained, keys), check_shares)
        masked = self._ask(exchange, state, COLLECT, self._forwarded(state, shares), check_masked)
        total = _summed({number: masked_of(reply, sent, "") for number, reply in masked.items()})
        active, dead = sorted(masked), sorted(set(shares) - set(masked))
        dropped = [turn.client_id for number, (_, turn) in sorted(trained.items()) if number not in masked]
        who = {key.ACTIVE_NODE_ID_LIST: active, key.DEAD_NODE_ID_LIST: dead}
        opened = self._ask(exchange, state, UNMASK, dict.fromkeys(active, who), check_opened)
        _take_masks_off(total, state, opened, active, dead)
        kept = [(_with_masked(trained[n][1], masked[n].content), trained[n][0]) for n in active]
        weight = float(most) if self.weigh_by_size else None
        reply, said = _mean(messages[0], state, total, kept, weight, exchange.round_index)
        return (
            [reply],
            [turn for turn, _ in kept],
            replace(said, dropped=dropped, seconds=time.perf_counter() - started),
        )

    def _ask(
        self,
        exchange: Exchange,
        state: _Round,
        stage: str,
        asked: Mapping[int, Mapping[str, Any]],
        check: Callable[[Message, str], object],
    ) -> dict[int, Message]:
        """The answers by site; one that `check` raises FlexError for is left out."""
        messages = [
            Message(
                RecordDict(
                    {CONFIG: ConfigRecord({ROUND: exchange.round_index, ASK: stage}), MASK: ConfigRecord(dict(what))}
                ),
                state.nodes[number],
                MessageType.QUERY,
            )
            for number, what in asked.items()
        ]
        answers = exchange.ask(messages, stage)
        for node, reply in list(answers.items()):
            try:
                check(reply, f"client {exchange.name(node)!r}")
            except FlexError as error:
                del answers[node]
                exchange.refuse(node, stage, error)
        found = {number: answers[node] for number, node in state.nodes.items() if node in answers}
        if len(found) < state.threshold:
            raise ClientFailed(
                f"{len(found)} of {len(state.nodes)} clients are left in round {exchange.round_index} ({stage}); "
                f"expected {state.threshold} or more to take the masks off: {exchange.said}"
            )
        return found

    def _forwarded(self, state: _Round, shares: Mapping[int, Message]) -> dict[int, dict[str, Any]]:
        """Each site's questions for its masked change: what the others made for it, and the range."""
        key = secagg().Key
        asked: dict[int, dict[str, Any]] = {
            number: {key.SOURCE_LIST: [], key.CIPHERTEXT_LIST: [], "range": state.limit, "levels": state.levels}
            for number in shares
        }
        for source, reply in shares.items():
            record = reply.content[MASK]
            for to, text in zip(record[key.DESTINATION_LIST], record[key.CIPHERTEXT_LIST], strict=False):
                if to in asked:
                    asked[to][key.SOURCE_LIST].append(source)
                    asked[to][key.CIPHERTEXT_LIST].append(text)
        return asked


def _mean(
    message: Message,
    state: _Round,
    total: Arrays,
    kept: list[tuple[Turn, Message]],
    weight: float | None,
    round_index: int,
) -> tuple[Message, Secured]:
    """The mean change, added to what was sent, as one reply, with the mean of what the sites told in the clear.

    Raises:
        FlexError: no mean of these updates can be so long.
    """
    (key, sent), turns = sent_record(message), [turn for turn, _ in kept]
    sizes = [float(turn.metrics[NUM_EXAMPLES]) for turn in turns]
    shares = sum(size / weight if weight else 1.0 for size in sizes)
    change = {name: decode(array, state.limit, state.levels) / shares for name, array in total.items()}
    norm = math.sqrt(sum(float(np.vdot(array, array)) for array in change.values()))
    longest = max(turn.update.norm * turn.update.scale for turn in turns)
    if norm > longest * (1 + 1e-3):
        raise FlexError(
            f"the mean of the masked changes of round {round_index} is longer ({norm:.4g}) than any of them "
            f"({longest:.4g}): a share or a mask was wrong, and nobody can tell whose"
        )
    arrays = {name: array + change[name] for name, array in to_arrays(sent).items()}
    told = mean_metrics([metrics_of(reply) for _, reply in kept], sizes)
    content = {key: to_record(arrays), METRICS: MetricRecord({**told, NUM_EXAMPLES: sum(sizes)})}
    size = sum(array.size for array in change.values())
    error = error_bound(len(turns), size, state.limit, state.levels) / shares
    said = Secured(round_index, len(turns), range=state.limit, error=error / norm if norm else 0.0)
    return Message(RecordDict(content), reply_to=message), said


def _lists(reply: Message, sender: str, record: str, names: Sequence[str], kind: type, of: type | None = None) -> None:
    """Raises FlexError where a reply's record lacks one of these values, or it is none of its kind."""
    values = reply.content.config_records.get(record, {})
    for name in names:
        value = values.get(name)
        if not isinstance(value, kind) or (of and not all(isinstance(one, of) for one in value)):
            raise FlexError(f"{sender} sent no {name!r} for the masks; expected {(of or kind).__name__}")


def _with_masked(turn: Turn, content: RecordDict) -> Turn:
    """A turn whose tensors came later, under masks."""
    update = turn.update and replace(turn.update, sha256=digest(content)[:16])
    return replace(turn, up=sent_tensors(content), update=update)


def masked_of(reply: Message, sent: ArrayRecord, sender: str) -> Arrays:
    """The masked numbers of a reply, uint32, by the names that were sent.

    Raises:
        FlexError: they are not of the tensors that were sent, or no masked numbers.
    """
    records = reply.content.array_records
    if list(records) != [MASKED]:
        raise FlexError(f"{sender} sent the ArrayRecords {list(records)}; expected {MASKED!r} alone")
    same_tensors(records[MASKED], sent, sender, "uint32")
    check_numbers(reply, sender)
    return {name: records[MASKED][name].numpy().copy() for name in sent}


def _summed(numbers: Mapping[int, Arrays]) -> Arrays:
    """Modulo 2**32, which no order changes."""
    total: Arrays = {}
    for own in numbers.values():
        for name, array in own.items():
            total[name] = np.asarray(np.add(total[name], array)) if name in total else array
    return total


def _take_masks_off(
    total: Arrays, state: _Round, opened: Mapping[int, Message], active: list[int], dead: list[int]
) -> None:
    """In place: the own masks of those who answered, and what they hold of those who did not."""
    flower, found = secagg(), {number: [] for number in (*active, *dead)}
    for reply in opened.values():
        record = reply.content[MASK]
        for owner, share in zip(record[flower.Key.NODE_ID_LIST], record[flower.Key.SHARE_LIST], strict=False):
            if owner in found:
                found[owner].append(share)
    try:
        secrets = {number: flower.combine_shares(shares) for number, shares in found.items()}
        for number in active:
            add_mask(total, secrets[number], -1)
        for number in dead:
            for other in active:  # each holds its mask with the one that is gone
                pair = flower.pair_key(secrets[number], state.keys[other][0])
                add_mask(total, pair, -sign_of_pair(other, number))
    except (KeyError, ValueError, IndexError) as error:
        raise FlexError(f"the shares of this round do not open its masks: {error}") from None
