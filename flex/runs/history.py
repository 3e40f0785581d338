"""What the log of a job says of its past: how many rounds were planned, with whom, and which round is the best.

A job may go on otherwise than it was planned: for more rounds, with clients that join, without those that left. Its
rounds so far stay what they are, with the rates that they had; an `Extended` event says when the plan changed.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from flex.store.events import OF_LAYERS, VALIDATION, Done, Evaluated, Event, Extended, JobStarted, Trained


@dataclass(frozen=True)
class Plan:
    """What a job does: so many rounds, with these clients; and after which round the clients last changed.

    clients: empty where the log has not begun, or is of an earlier version and does not say who they are.
    """

    num_rounds: int = 0
    clients: tuple[str, ...] = ()
    clients_since: int = 0


@dataclass
class Best:
    """The validation loss of every round, mean over the clients, since the clients last changed; the lowest is kept. Of
    rounds in which fewer were scored than in another (a site that failed) none is.

    Attributes:
        since: the round after which they changed; 0: never.
        losses, scored: mean loss and number of clients by round.
    """

    since: int = 0
    losses: dict[int, float] = field(default_factory=dict)
    scored: dict[int, int] = field(default_factory=dict)

    def add(self, round_index: int, events: Iterable[Event]) -> None:
        """Takes in what a round's clients scored on their validation parts."""
        found = [e.loss for e in events if isinstance(e, Evaluated) and e.split == VALIDATION]
        if found and round_index > self.since:
            self.losses[round_index], self.scored[round_index] = statistics.fmean(found), len(found)

    @property
    def round(self) -> int | None:
        """The best so far, the first of equals; None before any."""
        return min(self.losses, key=lambda at: (-self.scored[at], self.losses[at], at), default=None)

    @property
    def rounds_without_improvement(self) -> int:
        return 0 if self.round is None else max(self.losses) - self.round


def plan_of(events: Sequence[Event]) -> Plan:
    """The plan that stands at the end of a log."""
    plan = Plan()
    for event in events:
        if isinstance(event, JobStarted):
            seen = _seen(events)
            known = event.clients or (seen if len(seen) == event.num_clients else [])
            plan = Plan(event.num_rounds or 0, tuple(known))
        elif isinstance(event, Extended):
            staying = [name for name in plan.clients if name not in event.left]
            changed = event.round if event.joined or event.left else plan.clients_since
            plan = Plan(event.num_rounds or plan.num_rounds, (*staying, *event.joined), changed)
    return plan


def _seen(events: Iterable[Event]) -> list[str]:
    """Logs of before name no clients: those that trained or were scored took part."""
    return list(dict.fromkeys(e.client_id for e in events if isinstance(e, Trained | Evaluated)))


def extension(events: Sequence[Event], done: int, started: JobStarted) -> Extended | None:
    """What has changed since a log was written that ends after round `done`; None where nothing has.

    Args:
        started: what the job would say if it began anew.
    """
    plan = plan_of(events)
    joined = [name for name in started.clients if plan.clients and name not in plan.clients]
    left = [name for name in plan.clients if name not in started.clients]
    if started.num_rounds == plan.num_rounds and not joined and not left:
        return None
    return Extended(done, started.num_rounds, len(started.clients), joined, left, started.started)


def best_of(events: Sequence[Event], at_most: int) -> Best:
    """From a log: the best of the rounds up to `at_most`."""
    best = Best(plan_of(events).clients_since)
    by_round: dict[int, list[Event]] = {}
    for event in events:
        if isinstance(event, Evaluated) and event.split == VALIDATION and event.round <= at_most:
            by_round.setdefault(event.round, []).append(event)
    for round_index, found in sorted(by_round.items()):
        best.add(round_index, found)
    return best


def reopened(events: Iterable[Event]) -> list[Event]:
    """The log without its end."""
    return [event for event in events if not isinstance(event, Done)]


def before_scores(events: Sequence[Event], round_index: int) -> list[Event]:
    """The log up to the last turn of a round: what came after it, its scores, is asked for again."""
    turns = [place for place, e in enumerate(events) if isinstance(e, Trained) and e.round == round_index]
    return list(events[: turns[-1] + 1]) if turns else list(events)


def is_finished(events: Sequence[Event], trains: bool, num_rounds: int, clients: Sequence[str]) -> bool:
    """Whether a job with this log has nothing left to do of this plan."""
    done = next((event for event in reversed(events) if isinstance(event, Done)), None)
    was = plan_of(events).clients
    if done is None or (was and set(was) != set(clients)):
        return False
    return not trains or done.stopped or done.round >= num_rounds


def without_scores(events: Iterable[Event], round_index: int) -> list[Event]:
    """The log without a round's scores on test parts, and what the layers do on them, which are taken again."""

    def is_again(event: Event) -> bool:
        scores = isinstance(event, Evaluated) and event.split != VALIDATION
        return event.at_round == round_index and (scores or isinstance(event, OF_LAYERS))

    return [event for event in events if not is_again(event)]
