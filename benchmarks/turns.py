"""Ways to compute the same, timed by turns: what else the machine does meets all of them. The least time counts."""

import time
from collections.abc import Callable, Mapping


def take_turn(runs: Mapping[str, Callable[[], object]], best: dict[str, float]) -> None:
    """Each of `runs` once; `best`: seconds by name, which become the least so far."""
    for name, run in runs.items():
        start = time.perf_counter()
        run()
        best[name] = min(best.get(name, float("inf")), time.perf_counter() - start)


def least_seconds(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least of so many turns, by name."""
    best: dict[str, float] = {}
    for _ in range(rounds):
        take_turn(runs, best)
    return best
