"""One job: a method and a seed on the same data as every other, resumable at any moment.

JOB/metrics.jsonl                       its events
JOB/server/round-0003.safetensors       shared state and the strategy's moments after round 3
JOB/clients/<folder_name(client_id)>/   that client's personal files, for nobody else

`Job` is the server's half. It needs no base, no tokenizer and no data: what it knows of a client, and all that it
writes into the log, comes in replies.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flex.config import RunConfig
from flex.federation.agreement import check_sites
from flex.federation.checkpoint import load_server, save_server
from flex.federation.flower import Grid, Strategy
from flex.federation.messages import NUM_EXAMPLES, Arrays, SiteAbout
from flex.federation.rounds import RoundReport, Turn, ask_about, ask_start, evaluate_all, inner, run_rounds
from flex.federation.strategy import load_strategy_state, make_strategy
from flex.methods import METHODS
from flex.runs.progress import Bar
from flex.store.events import (
    AFTER,
    FORMAT,
    METRICS,
    Done,
    Evaluated,
    Event,
    EventLog,
    Grafted,
    JobStarted,
    Sent,
    Trained,
    read_events,
)
from flex.store.files import check_header, round_file, rounds_in
from flex.store.personal import KEPT_ROUNDS


class Job:
    """One method and one seed: goes on where it was stopped, runs the rounds, keeps what they give.

    Args:
        folder: of the job.
        grid: of the clients, in this process or elsewhere.
        admit: what a job that is resumed must agree in, beside its method, seed and strategy (base, data), made from
            what the sites say of themselves; the place to refuse one of them.
    """

    def __init__(
        self,
        config: RunConfig,
        method: str,
        seed: int,
        folder: Path,
        grid: Grid,
        admit: Callable[[Sequence[SiteAbout]], Mapping[str, str]],
        bar: Bar,
    ):
        self.config, self.method, self.folder, self.grid, self.bar = config, METHODS[method], folder, grid, bar
        self.log = EventLog(folder / METRICS, method, seed)
        self.server = folder / "server"
        self.strategy_name, self.strategy_settings = config.strategy.of(method)
        self.admit = admit
        self.header = {"method": method, "seed": seed, "strategy": self.strategy_name}
        self.told = bool(rounds_in(self.server))  # what exactly travelled is told once
        self.exact: dict[str, float] = {}
        self.tokens = 0

    @property
    def verdict(self) -> str:
        mean = sum(self.exact.values()) / max(1, len(self.exact))
        return f"exact match {mean:.3f}"

    def run(self) -> None:
        """Does what is left of the job: all of it where it is new."""
        started, train = time.perf_counter(), self.config.train
        sites = ask_about(self.grid)
        check_sites(sites, self.config)
        self.header |= self.admit(sites)
        per_round = (train.clients_per_round or len(sites)) * train.steps
        total = train.rounds * per_round if self.method.trains else 1
        self.bar.begin(total)
        strategy = make_strategy(
            self.strategy_name, len(sites), clients_per_round=train.clients_per_round, **self.strategy_settings
        )
        started_event = JobStarted(
            num_rounds=train.rounds if self.method.trains else 0,
            num_clients=len(sites),
            trained_parameters=sites[0].trained_parameters,
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            format=FORMAT,
        )
        shared, done = self._resume(strategy, started_event)
        self.bar.step(done * per_round)
        if self.method.trains:
            run_rounds(
                strategy,
                self.grid,
                shared,
                train.rounds,
                start_round=done + 1,
                evaluate_every=self.config.evaluate.every,
                on_round=lambda index, arrays, report: self._keep(index, arrays, strategy, report),
            )
        else:
            for turn in evaluate_all(strategy, self.grid, shared, 0):
                self._write(turn.events)
            self.bar.step()
        self._write([Done(train.rounds, time.perf_counter() - started, self.tokens)])
        self.bar.say(f"done, {self.verdict}")
        self.bar.end()

    def _resume(self, strategy: Strategy, started: JobStarted) -> tuple[Arrays, int]:
        """(shared state, rounds done): from the newest server file, or the start. What came after it is forgotten."""
        rounds = rounds_in(self.server)
        if not rounds:
            self.log.path.unlink(missing_ok=True)
            self.known: set[tuple] = set()
            self._write([started])
            return ask_start(self.grid), 0
        path = round_file(self.server, rounds[-1])
        done, shared, moments, header = load_server(path)
        check_header(path, header, self.header)
        load_strategy_state(strategy, moments)
        self.known = {_place(event) for event in self.log.rewind(done) if isinstance(event, Grafted)}
        return shared, done

    def _keep(self, round_index: int, shared: Arrays, strategy: Strategy, report: RoundReport) -> None:
        if not self.told and report.train:
            self.told = True
            self._write(sent_events(report.train[0]))
        self._write(round_events(round_index, report))
        self.tokens += sum(turn.metrics["tokens"] for turn in report.train)
        save_server(round_file(self.server, round_index), round_index, shared, inner(strategy), self.header)
        for old in rounds_in(self.server)[:-KEPT_ROUNDS]:
            round_file(self.server, old).unlink(missing_ok=True)

    def _write(self, events: list[Event]) -> None:
        """Into the log; a choice of grafts that it has already is left out (a turn that was cut off tells it again)."""
        for event in events:
            if isinstance(event, Grafted):
                if _place(event) in self.known:
                    continue
                self.known.add(_place(event))
            if isinstance(event, Evaluated) and event.split == "test" and event.when == AFTER:
                self.exact[event.client_id] = event.exact_match
            self.log.write(event)


def sent_events(turn: Turn) -> list[Event]:
    """What exactly travelled in a turn, tensor by tensor."""
    return [Sent("down", turn.down), Sent("up", turn.up)]


def round_events(round_index: int, report: RoundReport) -> list[Event]:
    """What the log says of a round: all of it from the replies."""
    trained = [
        Trained(
            round=round_index,
            client_id=turn.client_id,
            num_examples=turn.metrics[NUM_EXAMPLES],
            loss=turn.metrics["loss"],
            opening=turn.metrics["opening"] or None,
            seconds=turn.metrics["seconds"],
            bytes_down=turn.bytes_down,
            bytes_up=turn.bytes_up,
        )
        for turn in report.train
    ]
    return [*(event for turn in (*report.train, *report.evaluate) for event in turn.events), *trained]


def is_done(folder: Path) -> bool:
    """Whether the job in `folder` is finished."""
    return any(isinstance(event, Done) for event in read_events(folder / METRICS))


def _place(event: Grafted) -> tuple[Any, ...]:
    return event.client_id, event.round, event.layer


def latest_shared(folder: Path, fingerprint: str, start: Arrays) -> tuple[int, Arrays]:
    """(round, shared state) of a job's newest server file; (0, `start`) where it has not finished a round."""
    rounds = rounds_in(folder / "server")
    if not rounds:
        return 0, start
    path = round_file(folder / "server", rounds[-1])
    round_index, shared, _, header = load_server(path)
    check_header(path, header, {"base": fingerprint})
    return round_index, shared
