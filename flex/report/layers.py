"""What the layers of a run did: how they route before and after, what grafts add over the rounds, and what they cost.

Each client's numbers come from some of its own held-out prompts (`evaluation/layers.py`); here they are means over
clients and seeds, where each pair of both counts the same, and lines of a flat table as they came.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from flex.report import numbers
from flex.report.numbers import JobLog, Row
from flex.store.events import Added, Cost, Routed

MOST_ROUNDS = 12  # columns of the table over the rounds; of more, these are taken at even distances
MOST_CLIENTS = 16  # columns of the table by client
SOURCES = {
    "softmax": "the router's softmax",
    "sigmoid": "the sigmoids of the router's scores, divided by their sum",
    "sqrtsoftplus": "the square roots of the softplus of the router's scores, divided by their sum",
    "scores": "the router's scores, divided by their sum",
    "kept": "the weights of the chosen experts alone, divided by their sum",
}
COLUMNS = ("run", "method", "label", "seed", "client", "round", "layer", "group", "measure", "value")


class Use(NamedTuple):
    """Of one layer: the router's entropy, how many experts are in use (exp of the entropy of their shares of the
    tokens), and the largest share."""

    entropy: float
    used: float
    largest: float


class Routing(NamedTuple):
    """Of one layer: the largest entropy there can be, and its use by the untouched base and after training."""

    most: float
    base: Use
    now: Use


def use(entropy: float, counts: Sequence[int]) -> Use:
    total = sum(counts)
    shares = [count / total for count in counts if count > 0] if total > 0 else []
    return Use(entropy, math.exp(-sum(s * math.log(s) for s in shares)), max(shares, default=0.0))


def of_layers(event: Routed) -> dict[int, Routing]:
    """By the number of the layer."""
    base = map(use, event.base_entropy, event.base_counts)
    return dict(zip(event.layers, map(Routing, event.most, base, map(use, event.entropy, event.counts)), strict=True))


def _mean(found: Sequence[Routing]) -> Routing:
    base, now = (
        Use(*(statistics.fmean(values) for values in zip(*uses, strict=True)))
        for uses in ([own.base for own in found], [own.now for own in found])
    )
    return Routing(max(own.most for own in found), base, now)


def routed_at_end(job: JobLog) -> dict[str, Routed]:
    """By client, of the round whose scores count; of the last one that was measured where that one was not."""
    rounds = {at for at, _ in job.routed}
    at = job.last_round if job.last_round in rounds else max(rounds, default=None)
    return {client: event for (own, client), event in sorted(job.routed.items()) if own == at}


def routing(summary: Iterable[Row]) -> list[dict[str, Any]]:
    """One entry a method: `layers`, {number: Routing} over clients and seeds, and `by_client`, the same of each."""
    found = []
    for row in summary:
        events = [(client, event) for job in row.counted for client, event in routed_at_end(job).items()]
        measured = [(client, of_layers(event)) for client, event in events]
        if not any(layers for _, layers in measured):
            continue
        clients = list(dict.fromkeys(client for client, _ in measured))
        found.append(
            {
                "row": row,
                "tokens": sorted({event.num_tokens for _, event in events}),
                "sources": [SOURCES.get(s, s) for s in sorted({s for _, event in events for s in event.source})],
                "layers": _over(layers for _, layers in measured),
                "by_client": {
                    name: _over(layers for client, layers in measured if client == name)
                    for name in clients[:MOST_CLIENTS]
                },
                "left_out": max(0, len(clients) - MOST_CLIENTS),
            }
        )
    return found


def _over(measured: Iterable[dict[int, Routing]]) -> dict[int, Routing]:
    by_layer: dict[int, list[Routing]] = {}
    for layers in measured:
        for number, own in layers.items():
            by_layer.setdefault(number, []).append(own)
    return {number: _mean(own) for number, own in sorted(by_layer.items())}


def additions(summary: Iterable[Row]) -> list[dict[str, Any]]:
    """One entry a method: `rounds`, and `layers`: {number: {round: (added, opening)}} over clients and seeds."""
    found = []
    for row in summary:
        values: dict[int, dict[int, list[tuple[float, float]]]] = {}
        for job in row.counted:
            for (at, _), event in sorted(job.added.items()):
                for number, added, opening in zip(event.layers, event.added, event.opening, strict=True):
                    values.setdefault(number, {}).setdefault(at, []).append((added, opening))
        if values:
            means = {
                number: {at: tuple(statistics.fmean(v) for v in zip(*own, strict=True)) for at, own in by_round.items()}
                for number, by_round in sorted(values.items())
            }
            rounds = sorted({at for by_round in means.values() for at in by_round})
            found.append({"row": row, "rounds": rounds, "shown": thinned(rounds), "layers": means})
    return found


def thinned(rounds: Sequence[int], at_most: int = MOST_ROUNDS) -> list[int]:
    """The first, the last, and what lies between them at even distances."""
    if len(rounds) <= at_most:
        return list(rounds)
    return [rounds[round(i * (len(rounds) - 1) / (at_most - 1))] for i in range(at_most)]


def costs(summary: Iterable[Row]) -> list[dict[str, Any]]:
    """One entry a method with grafts: operations a token of all layers together and of each, and the median over
    clients and seeds of what a forward took."""
    found = []
    for row in summary:
        events = [event for job in row.counted for event in costs_at_end(job).values()]
        if not events or not any(event.layers for event in events):
            continue
        first = next(event for event in events if event.layers)
        times = {which: _median(event.seconds.get(which) for event in events) for which in ("with", "without")}
        overheads = [e.seconds["with"] / e.seconds["without"] - 1 for e in events if _is_timed(e)]
        found.append(
            {
                "row": row,
                "graft": sum(first.graft_flops),
                "layer": sum(first.layer_flops),
                "layers": list(zip(first.layers, first.graft_flops, first.layer_flops, strict=True)),
                "times": times,
                "more": _median(overheads),
                "tokens": sorted({event.num_tokens for event in events}),
                "repeats": first.repeats,
                "devices": ", ".join(sorted({event.device for event in events})),
            }
        )
    return found


def costs_at_end(job: JobLog) -> dict[str, Cost]:
    """By client, of the last round in which it was measured."""
    return {client: event for (_, client), event in sorted(job.costs.items())}


def _is_timed(event: Cost) -> bool:
    return event.seconds.get("with") is not None and event.seconds.get("without", 0.0) > 0


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def detail_rows(summary: Iterable[Row], run: str = "") -> list[dict[str, Any]]:
    """What a run's logs say of messages and layers, one line for each value under the names of `COLUMNS`.

    Bytes are of one client's message, by group of arrays, in the first job of a method; what is not of one client,
    round, layer or group leaves that column out.
    """
    found = []
    for row in summary:
        line = {"run": run, "method": row.method, "label": row.label}
        sent = next((job for job in row.jobs if job.sent), None)
        for way, tensors in sorted(sent.sent.items()) if sent else ():
            for group, (_, size) in numbers.byte_groups(tensors).items():
                found.append({**line, "seed": sent.seed, "group": group, "measure": f"bytes_{way}", "value": size})
        for job in row.jobs:
            for events, lines in ((job.routed, _of_routed), (job.added, _of_added), (job.costs, _of_cost)):
                found += _lines({**line, "seed": job.seed}, events, lines)
    return found


def _lines(
    line: dict[str, Any],
    events: dict[tuple[int, str], Any],
    lines: Callable[[Any], Iterator[tuple[int | None, str, float]]],
) -> Iterator[dict[str, Any]]:
    for (at, client), event in sorted(events.items()):
        for layer, measure, value in lines(event):
            yield {**line, "client": client, "round": at, "layer": layer, "measure": measure, "value": value}


def _of_routed(event: Routed) -> Iterator[tuple[int | None, str, float]]:
    for layer, own in of_layers(event).items():
        yield layer, "routing_entropy_most", own.most
        for suffix, found in (("_base", own.base), ("", own.now)):
            yield layer, f"routing_entropy{suffix}", found.entropy
            yield layer, f"experts_used{suffix}", found.used
            yield layer, f"largest_share{suffix}", found.largest


def _of_added(event: Added) -> Iterator[tuple[int | None, str, float]]:
    for layer, added, opening in zip(event.layers, event.added, event.opening, strict=True):
        yield layer, "added_norm", added
        yield layer, "opening", opening


def _of_cost(event: Cost) -> Iterator[tuple[int | None, str, float]]:
    for layer, graft, experts in zip(event.layers, event.graft_flops, event.layer_flops, strict=True):
        yield layer, "graft_flops_per_token", graft
        yield layer, "layer_flops_per_token", experts
    yield None, "forward_tokens", event.num_tokens
    for which, seconds in event.seconds.items():
        yield None, f"forward_seconds_{which}", seconds
