"""Splits that are drawn: how records with labels are dealt to clients that nobody named.

    iid            every client gets an equal share of all records, whatever their labels
    pathological   every client gets `n` labels; who has a label shares its records evenly
    dirichlet      a label's records are divided by shares drawn from Dirichlet(alpha, ..., alpha) over the clients;
                   with replacement: every client draws its own mixture of labels from Dirichlet(alpha * frequencies),
                   and as many records as the others; clients may have records in common, none has one twice

All that is drawn comes from `random()` of Python's Mersenne twister by formulas written here, so that a seed gives one
split on every machine, whatever the versions of torch and numpy. Shares are rounded to nine digits before they become
counts: a last bit that two machines compute differently moves no record.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from flex.errors import FlexError

TRIES = 100  # draws of shares until every client has its minimum
Indices = list[list[int]]  # by client


@dataclass(frozen=True)
class Mixture:
    """How much of each label each client takes: `shares[label][client]`.

    replace: shares of a label are of the client's own records (they add up to one per client), and clients draw
        independently; else they are of the label's records (they add up to at most one per label).
    """

    shares: dict[str, list[float]]
    num_clients: int
    replace: bool = False


def iid(labels: Sequence[str], num_clients: int) -> Mixture:
    return Mixture({"": [1 / num_clients] * num_clients}, num_clients)


def pathological(labels: Sequence[str], num_clients: int, classes: int, rng: random.Random) -> Mixture:
    """`classes` labels a client, by turns from a shuffled list of them, so that labels are had about equally often.

    Raises:
        FlexError: there are not so many labels.
    """
    known = sorted(set(labels))
    if classes > len(known):
        raise FlexError(
            f"data.classes_per_client is {classes}; expected at most {len(known)}, as many as data.label_by has values"
        )
    order = shuffled(known, rng)
    having: dict[str, list[int]] = {label: [] for label in known}
    for client in range(num_clients):
        for step in range(classes):
            having[order[(client * classes + step) % len(order)]].append(client)
    shares = {
        label: [1 / len(owners) if client in owners else 0.0 for client in range(num_clients)]
        for label, owners in having.items()
    }
    return Mixture(shares, num_clients)


def dirichlet(
    labels: Sequence[str], num_clients: int, alpha: float, min_size: int, replace: bool, rng: random.Random
) -> Mixture:
    """Shares are drawn again, at most `TRIES` times, until every client has `min_size` records.

    Raises:
        FlexError: it never has.
    """
    counts = Counter(labels)
    known = sorted(counts)
    smallest = 0
    for _ in range(TRIES):
        if replace:
            drawn = [
                draw_dirichlet([alpha * counts[label] / len(labels) for label in known], rng)
                for _ in range(num_clients)
            ]
            mixture = Mixture({label: [own[i] for own in drawn] for i, label in enumerate(known)}, num_clients, True)
        else:
            mixture = Mixture({label: draw_dirichlet([alpha] * num_clients, rng) for label in known}, num_clients)
        fewest = min(sizes(counts, mixture))
        if fewest >= min_size:
            return mixture
        smallest = max(smallest, fewest)
    raise FlexError(
        f"data.alpha = {alpha:g} leaves a client with {smallest or 'no'} examples in each of {TRIES} draws of "
        f"{num_clients} clients; expected {min_size} or more (data.min_size): a larger data.alpha, or fewer clients"
    )


def sizes(counts: Counter[str], mixture: Mixture) -> list[int]:
    """How many records each client would get."""
    if mixture.replace:
        return [counts.total() // mixture.num_clients] * mixture.num_clients
    by_label = [rounded(count, mixture.shares[label]) for label, count in counts.items() if label in mixture.shares]
    return [sum(column) for column in zip(*by_label, strict=True)]


def deal(labels: Sequence[str], mixture: Mixture, rng: random.Random) -> Indices:
    """The indices of each client's records, ascending. Labels that the mixture does not know belong to nobody."""
    pools: dict[str, list[int]] = {label: [] for label in mixture.shares}
    for index, label in enumerate(labels):
        key = "" if list(mixture.shares) == [""] else label
        if key in pools:
            pools[key].append(index)
    if mixture.replace:
        return _draw(pools, mixture, rng)
    dealt: Indices = [[] for _ in range(mixture.num_clients)]
    for label in sorted(pools):
        order, start = shuffled(pools[label], rng), 0
        for client, count in enumerate(rounded(len(order), mixture.shares[label])):
            dealt[client] += order[start : start + count]
            start += count
    return [sorted(own) for own in dealt]


def _draw(pools: dict[str, list[int]], mixture: Mixture, rng: random.Random) -> Indices:
    """Every client draws an equal number by its own mixture; where a label runs out, the others fill up."""
    size = sum(map(len, pools.values())) // mixture.num_clients
    dealt: Indices = []
    for client in range(mixture.num_clients):
        shares = {label: mixture.shares[label][client] for label in sorted(pools)}
        counts = dict(zip(shares, rounded(size, list(shares.values())), strict=True))
        counts = {label: min(count, len(pools[label])) for label, count in counts.items()}
        missing = size - sum(counts.values())
        for label in sorted(shares, key=lambda name: -shares[name]):
            more = min(missing, len(pools[label]) - counts[label])
            counts[label] += more
            missing -= more
        dealt.append(sorted(i for label, count in counts.items() for i in shuffled(pools[label], rng)[:count]))
    return dealt


def rounded(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers nearest to `total * share`: rounded down, then one more for the largest remainders.

    Shares that add up to less than one leave the rest to nobody.
    """
    exact = [round(total * share, 9) for share in shares]
    counts = [math.floor(value) for value in exact]
    left = min(total, round(sum(exact))) - sum(counts)
    for index in sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))[:left]:
        counts[index] += 1
    return counts


def shuffled(items: Sequence, rng: random.Random) -> list:
    """Fisher and Yates, on `random()` alone."""
    order = list(items)
    for last in range(len(order) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        order[last], order[other] = order[other], order[last]
    return order


def draw_dirichlet(alphas: Sequence[float], rng: random.Random) -> list[float]:
    """One draw, rounded to nine digits; by logarithms, so that a small alpha does not make all of it zero."""
    logs = [_log_gamma_draw(alpha, rng) for alpha in alphas]
    highest = max(logs)
    weights = [math.exp(value - highest) for value in logs]
    return [round(weight / sum(weights), 9) for weight in weights]


def _log_gamma_draw(shape: float, rng: random.Random) -> float:
    """The logarithm of a Gamma(shape, 1) draw: Marsaglia and Tsang (2000), with their step for a shape below one."""
    d = (shape if shape >= 1 else shape + 1) - 1 / 3
    c = 1 / math.sqrt(9 * d)
    while True:
        x = math.sqrt(-2 * math.log(1 - rng.random())) * math.cos(2 * math.pi * rng.random())  # Box and Muller
        v = (1 + c * x) ** 3
        if v > 0 and math.log(1 - rng.random()) < 0.5 * x * x + d - d * v + d * math.log(v):
            break
    value = math.log(d * v)
    return value if shape >= 1 else value + math.log(1 - rng.random()) / shape
