"""Rounds in which nothing is averaged, at the end of a run: each client goes on alone from the last shared state.

`EndsAlone` stands around a strategy, as Flower's wrappers do. From its first round on clients are sent the shared
state, which no longer changes, and send back numbers alone. A client knows these rounds by its own configuration.
"""

from collections.abc import Iterable

from flex.federation.flower import ArrayRecord, ConfigRecord, Grid, Message, MetricRecord, Strategy


class EndsAlone(Strategy):
    """`strategy` up to round `first_alone`, then nothing is aggregated."""

    def __init__(self, strategy: Strategy, first_alone: int):
        self.strategy, self.first_alone = strategy, first_alone

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        if server_round >= self.first_alone:
            return None, None
        return self.strategy.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        self.strategy.summary()
