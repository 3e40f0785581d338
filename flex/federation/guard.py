"""What the server takes from a client: every reply is held against what was sent, and against the other replies, before
a strategy sees it, whichever strategy that is.

By itself a reply must have the tensors that were sent, finite, and the numbers that the run needs; it may not be one of
an earlier round again. Its weight is at most what its site declared at the start, and an update longer than the bound
is scaled down to it. Beside the others it may not be `FAR` times as long as the middle of three and more, and may not
be what was sent, unchanged, while others trained. A direction is not judged: whether a site that pulls another way is
wrong or only different, the report shows (norms and cosines) and a person says.
"""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flex.errors import FlexError
from flex.federation.flower import Array, ArrayRecord, Message
from flex.federation.messages import METRICS, NUM_EXAMPLES, control_of, metrics_of, same_tensors, size_of, update_of
from flex.federation.robust import FEWEST
from flex.federation.seal import digest

# All clients take the same number of steps at the same rate: lengths differ by a factor of a few, not of a hundred.
FAR = 100.0


@dataclass(frozen=True)
class Update:
    """What the server sees of a client's update w_k - w.

    norm: its Euclidean length over all tensors, as it came.
    sha256: of the tensors that came, the first 16 digits; empty where none came.
    cosine: between it and the sum of the other clients' updates; None where there is no other, or one of them is 0.
    scale: what it was multiplied by to keep within the bound.
    reported: the number of examples that it came with, where that was more than declared.
    """

    norm: float
    sha256: str
    cosine: float | None = None
    scale: float = 1.0
    reported: float | None = None


class Guard:
    """What is required of every reply of a run.

    Args:
        max_update_norm: the longest update that is taken as it is; 0: no bound.
        sizes: by client id, the number of examples that it declared at the start; empty: what it reports counts.
        told: the metrics, beside `num-examples`, that every reply to training must have.
        seen: by client id, {sha256 of an update: its round}, of rounds that are done.
    """

    def __init__(
        self,
        max_update_norm: float = 0.0,
        sizes: Mapping[str, int] | None = None,
        told: Sequence[str] = (),
        seen: Mapping[str, Mapping[str, int]] | None = None,
    ):
        self.max_update_norm, self.sizes, self.told = max_update_norm, dict(sizes or {}), tuple(told)
        self.seen = {client: dict(rounds) for client, rounds in (seen or {}).items()}

    def admit(self, message: Message, reply: Message, client_id: str, round_index: int) -> Update:
        """Checks a reply to training by itself, and limits it.

        Raises:
            FlexError: it is refused; the client is named.
        """
        sender, numbers = f"client {client_id!r}", metrics_of(reply, f"client {client_id!r}")
        for name in self.told:
            if name not in numbers:
                raise FlexError(f"{sender} reported no {name!r}; expected {', '.join((NUM_EXAMPLES, *self.told))}")
        check_numbers(reply, sender)
        update = self.limit(message, reply, self.measure(message, reply, sender, round_index))
        before = self.seen.get(client_id, {}).get(update.sha256 or "not seen", round_index)
        if before != round_index and update.norm:
            raise FlexError(f"{sender} sent its update of round {before} again in round {round_index}")
        size, declared = size_of(reply, sender), self.sizes.get(client_id, math.inf)
        if size > declared:
            reply.content[_name_of_metrics(reply)][NUM_EXAMPLES] = declared
            update = replace(update, reported=float(size))
        return update

    def compare(self, replies: Mapping[str, Message], updates: Mapping[str, Update]) -> dict[str, str]:
        """What is wrong with a reply beside the others, by client id, as a sentence."""
        wrong: dict[str, str] = {}
        names = {client: frozenset(metrics_of(reply)) for client, reply in replies.items()}
        usual = Counter(names.values()).most_common(1)[0][0] if names else frozenset()
        for client, own in names.items():
            if odd := sorted(own ^ usual):
                said = "sent the metric" if odd[0] in own else "did not send the metric"
                wrong[client] = f"client {client!r} {said} {odd[0]!r}, unlike the others; expected the same of all"
        lengths = {client: update.norm for client, update in updates.items() if client not in wrong}
        middle = statistics.median(lengths.values()) if len(lengths) >= FEWEST else 0.0
        for client, norm in lengths.items():
            if not norm and not updates[client].sha256 and any(lengths.values()):
                wrong[client] = f"client {client!r} sent no tensors; expected those that it was sent, trained"
            elif not norm and any(lengths.values()):
                wrong[client] = f"client {client!r} sent back what it was sent, unchanged; expected a trained update"
            elif middle and norm > FAR * middle:
                wrong[client] = (
                    f"client {client!r} sent an update of norm {norm:.4g}, over {FAR:g} times the median of this round "
                    f"({middle:.4g})"
                )
        return wrong

    def remember(self, updates: Mapping[str, Update], round_index: int) -> None:
        """A round is done: its updates do not count a second time."""
        for client, update in updates.items():
            self.seen.setdefault(client, {})[update.sha256] = round_index

    def measure(self, message: Message, reply: Message, sender: str, round_index: int) -> Update:
        """What the server sees of the update of a reply, once its tensors are found to be good ones."""
        return measure(message, reply, sender, round_index)

    def compare_directions(
        self, messages: Mapping[str, Message], replies: Mapping[str, Message], updates: Mapping[str, Update]
    ) -> dict[str, Update]:
        """The updates with their cosines, by client id."""
        return with_cosines(messages, replies, updates)

    def limit(self, message: Message, reply: Message, update: Update) -> Update:
        """The update, scaled down to the bound in its reply where it is longer."""
        if not self.max_update_norm or update.norm <= self.max_update_norm:
            return update
        scale = self.max_update_norm / update.norm
        (key, sent), came = sent_record(message), reply.content.array_records
        came[key] = ArrayRecord(
            {name: Array(scaled(sent[name].numpy(), array.numpy(), scale)) for name, array in came[key].items()}
        )
        return replace(update, scale=scale)


def scaled(start: np.ndarray, end: np.ndarray, scale: float) -> np.ndarray:
    """start + scale (end - start), in float32: values as far apart as float32 can hold do not overflow on the way."""
    return np.asarray(start + scale * (end.astype(np.float64) - start), dtype=np.float32)


def sent_record(message: Message) -> tuple[str, ArrayRecord]:
    """The shared state of a message, and the name of its record; Flower's strategies may choose another name."""
    return next(iter(message.content.array_records.items()))


def measure(message: Message, reply: Message, sender: str, round_index: int) -> Update:
    """The update of a reply; its tensors are put in the order in which they were sent.

    Raises:
        FlexError: they are not the tensors that were sent, or one of them is not finite.
    """
    key, sent = sent_record(message)
    if list(reply.content.array_records) == [key] and not reply.content.array_records[key]:
        return Update(0.0, "")  # a round in which every client goes on alone; one that keeps to itself is seen beside
    sha256 = digest(reply.content)[:16]
    tensors = update_of(reply, sent, sender, key)
    control = same_tensors(control_of(reply.content, sender), control_of(message.content), sender)
    squares = 0.0
    for name, array in {**tensors, **control}.items():
        values = array.numpy()
        if not np.isfinite(values).all():
            raise FlexError(f"{sender} sent {name!r} with NaN or infinite values in round {round_index}")
        if name in tensors:
            change = values.astype(np.float64) - sent[name].numpy()
            squares += float(np.vdot(change, change))
    reply.content.array_records[key] = ArrayRecord(tensors)  # Flower's wrappers match tensors by their place
    return Update(math.sqrt(squares), sha256)


def check_numbers(reply: Message, sender: str) -> None:
    """Raises FlexError where a number that a client reported is none."""
    for name, value in metrics_of(reply, sender).items():
        if not np.isfinite(np.asarray(value, dtype=np.float64)).all():
            raise FlexError(f"{sender} reported {name} {value!r}; expected a finite number")


def with_cosines(
    messages: Mapping[str, Message], replies: Mapping[str, Message], updates: Mapping[str, Update]
) -> dict[str, Update]:
    """`updates` with the cosine of each and the sum of the others, by client id; without it where the clients have
    tensors of other shapes, or send none."""
    shapes = {tuple((n, tuple(a.shape)) for n, a in sent_record(messages[client])[1].items()) for client in updates}
    if len(updates) < 2 or len(shapes) > 1 or not all(update.sha256 for update in updates.values()):
        return dict(updates)
    own, with_sum = dict.fromkeys(updates, 0.0), dict.fromkeys(updates, 0.0)
    of_sum = 0.0
    for name, start in sent_record(next(iter(messages.values())))[1].items():
        w = start.numpy().astype(np.float64)

        def change(client: str, name: str = name, w: np.ndarray = w) -> np.ndarray:
            return next(iter(replies[client].content.array_records.values()))[name].numpy() - w

        total = sum(change(client) for client in updates)
        of_sum += float(np.vdot(total, total))
        for client in updates:
            d = change(client)
            own[client] += float(np.vdot(d, d))
            with_sum[client] += float(np.vdot(d, total))

    def cosine(client: str) -> float | None:
        others = of_sum - 2 * with_sum[client] + own[client]  # |sum - d|²
        lengths = math.sqrt(own[client] * max(others, 0.0))
        return max(-1.0, min(1.0, (with_sum[client] - own[client]) / lengths)) if lengths else None

    return {client: replace(update, cosine=cosine(client)) for client, update in updates.items()}


def _name_of_metrics(reply: Message) -> str:
    return next(iter(reply.content.metric_records), METRICS)
