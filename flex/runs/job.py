"""One job: a method and a seed on the same data as every other, resumable at any moment.

JOB/metrics.jsonl                       its events
JOB/server/round-0003.safetensors       shared state and the strategy's moments after round 3
JOB/clients/<folder_name(client_id)>/   that client's personal files, for nobody else

`Job` is the server's half. It needs no base, no tokenizer and no data: what it knows of a client, and all that it
writes into the log, comes in replies.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flex.config import RunConfig
from flex.errors import FlexError
from flex.federation.agreement import check_sites, first_round_alone
from flex.federation.alone import EndsAlone
from flex.federation.checkpoint import load_server, save_server
from flex.federation.flower import Grid, Strategy
from flex.federation.guard import Guard
from flex.federation.messages import KEPT_ROUND, NUM_EXAMPLES, Arrays, SiteAbout
from flex.federation.rounds import RoundReport, Turn, ask_about, ask_start, evaluate_all, inner, run_rounds
from flex.federation.secure import MaskedGuard, SecureRound
from flex.federation.strategy import configured_strategy, load_strategy_state
from flex.federation.usage import PEAK_BYTES
from flex.methods import METHODS
from flex.runs.history import Best, before_scores, best_of, extension, plan_of, reopened, without_scores
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
    Limited,
    Sent,
    Trained,
    read_events,
    write_events,
)
from flex.store.files import check_header, round_file, rounds_in
from flex.store.personal import KEPT_ROUNDS

UNSCORED = "unscored"  # in the header of a server file: the scores of its round were not in the log yet
TOLD = ("loss", "seconds", "tokens", "opening")  # what the log needs of every turn, beside its number of examples


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
        self.admit = admit
        self.secure = config.strategy.secure and self.method.averages
        self.header = {"method": method, "seed": seed, "strategy": config.strategy.of(method)[0]}
        if method in config.train.rates:
            self.header["rate"] = config.train.rates[method]
        if method in config.strategy.etas:
            self.header["eta"] = config.strategy.etas[method]
        self.best = Best()
        self.unscored: tuple[str, ...] = ()  # whose scores of the last round did not come before the run was stopped
        self.keeps_best, self.patience = config.train.keep == "best", config.train.patience
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
        self.clients = [site.client_id for site in sites]
        self.header |= {**self.admit(sites), "clients": {site.client_id: site.data for site in sites}}
        per_round = (train.clients_per_round or len(sites)) * train.steps
        total = train.rounds * per_round if self.method.trains else 1
        strategy = configured_strategy(self.config, self.log.method, len(sites))
        strategy.clients_evaluated = self.config.evaluate.clients
        factor = train.rates.get(self.log.method, 1.0)
        started_event = JobStarted(
            num_rounds=train.rounds if self.method.trains else 0,
            num_clients=len(sites),
            trained_parameters=sites[0].trained_parameters,
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            clients=[site.client_id for site in sites],
            learning_rates={name: getattr(train, name) * factor for name in ("learning_rate", "graft_learning_rate")},
            format=FORMAT,
        )
        shared, done = self._resume(strategy, started_event)
        self.bar.begin(total, done * per_round if self.method.trains else 0, train.rounds)
        self.last_round = done
        if self.method.trains:
            first_alone = first_round_alone(self.method, train)
            run_rounds(
                strategy if first_alone is None else EndsAlone(strategy, first_alone),
                self.grid,
                shared,
                done if self._is_stalled else train.rounds,
                start_round=done + 1,
                train_config=lambda _: {} if self.best.round is None else {KEPT_ROUND: self.best.round},
                evaluate_every=self.config.evaluate.every,
                validate=self.keeps_best,
                on_round=lambda index, arrays, report: self._keep(index, arrays, strategy, report),
                on_scores=lambda report: self._write(round_events(report.round_index, report)),
                unscored=self.unscored,
                skip_failed=train.skip_failed,
                timeout=train.timeout,
                guard=(MaskedGuard if self.secure else Guard)(
                    self.config.strategy.max_update_norm,
                    {site.client_id: site.num_train for site in sites},
                    TOLD,
                    self.seen,
                ),
                secure=SecureRound(strategy.weigh_by_size, first_alone or math.inf) if self.secure else None,
            )
            if self.keeps_best:
                self._score_kept(strategy)
        else:
            report = evaluate_all(strategy, self.grid, shared, 0, train.skip_failed, train.timeout)
            self._write(round_events(0, report))
            self.bar.step()
        seconds = time.perf_counter() - started
        last = self.last_round if self.method.trains else train.rounds
        kept = self.best.round if self.keeps_best else None
        self._write([Done(last, seconds, self.tokens, kept=kept, stopped=last < train.rounds)])
        self.bar.end(f"done, {self.verdict}")

    def _resume(self, strategy: Strategy, started: JobStarted) -> tuple[Arrays, int]:
        """(shared state, rounds done): from the newest server file, or the start. What came after it is forgotten."""
        rounds = rounds_in(self.server)
        if not rounds:
            self.log.path.unlink(missing_ok=True)
            self.known: set[tuple] = set()
            self.seen: dict[str, dict[str, int]] = {}
            self._write([started])
            return ask_start(self.grid), 0
        path = round_file(self.server, rounds[-1])
        done, shared, moments, header = load_server(path)
        self._check_header(path, header)
        load_strategy_state(strategy, moments)
        events = reopened(self.log.rewind(done))
        if header.get(UNSCORED):
            events = before_scores(events, done)
            self.unscored = plan_of(events).clients
        write_events(self.log.path, events)
        self.known = {_place(event) for event in events if isinstance(event, Grafted)}
        self.seen = _seen(events)
        if (extended := extension(events, done, started)) is not None:
            self._write([extended])
            events.append(extended)
        self.best = best_of(events, done)
        return shared, done

    def _check_header(self, path: Path, header: dict[str, Any]) -> None:
        """The file is of this job, and each client that it knows has the data that it had then."""
        known = header.get("clients")
        left_out = {"clients"} if known is None else {"clients", "data"}
        check_header(path, header, {key: value for key, value in self.header.items() if key not in left_out})
        own = self.header["clients"]
        for name in own.keys() & (known or {}).keys():
            if known[name] != own[name]:
                raise FlexError(f"{path} belongs to other data of client {name!r}; expected the data that it had then")
        self.header["clients"] = {**(known or {}), **own}

    @property
    def _is_stalled(self) -> bool:
        return 0 < self.patience <= self.best.rounds_without_improvement

    def _keep(self, round_index: int, shared: Arrays, strategy: Strategy, report: RoundReport) -> bool:
        """Into log and checkpoint; whether training ends here, for want of improvement."""
        if not self.told and report.train:
            self.told = True
            self._write(sent_events(report.train[0]))
        self._write(round_events(round_index, report))
        self.tokens += sum(turn.metrics["tokens"] for turn in report.train)
        header = self.header | ({UNSCORED: True} if report.unscored else {})
        save_server(round_file(self.server, round_index), round_index, shared, inner(strategy), header)
        self.last_round = round_index
        self.best.add(round_index, [event for turn in report.evaluate for event in turn.events])
        for old in rounds_in(self.server)[:-KEPT_ROUNDS]:
            if old != self.best.round:
                round_file(self.server, old).unlink(missing_ok=True)
        return self._is_stalled

    def _score_kept(self, strategy: Strategy) -> None:
        """The scores of the round that is kept, unless the log has them all."""
        kept, events = self.best.round, read_events(self.log.path)
        if kept is None:
            return
        there = [e for e in events if isinstance(e, Evaluated) and (e.round, e.split, e.when) == (kept, "test", AFTER)]
        if not set(self.clients) <= {event.client_id for event in there}:
            write_events(self.log.path, without_scores(events, kept))
            shared = load_server(round_file(self.server, kept))[1]
            train = self.config.train
            report = evaluate_all(strategy, self.grid, shared, kept, train.skip_failed, train.timeout)
            self._write(there := round_events(kept, report))
        self.exact = {e.client_id: e.exact_match for e in there if isinstance(e, Evaluated) and e.split == "test"}

    def _write(self, events: list[Event]) -> None:
        """Into the log; a choice of grafts that it has already is left out (a turn that was cut off tells it again)."""
        told = []
        for event in events:
            if isinstance(event, Grafted):
                if _place(event) in self.known:
                    continue
                self.known.add(_place(event))
            if isinstance(event, Evaluated) and event.split == "test" and event.when == AFTER:
                self.exact[event.client_id] = event.exact_match
            self.log.write(event)
            told.append(event)
        self.bar.hear(told)


def sent_events(turn: Turn) -> list[Event]:
    """What exactly travelled in a turn, tensor by tensor."""
    return [Sent("down", turn.down), Sent("up", turn.up)]


def round_events(round_index: int, report: RoundReport) -> list[Event]:
    """What the log says of a round, all of it from the replies: the turns, and then the scores after aggregation, which
    may be told later, alone."""
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
            peak_bytes=turn.metrics.get(PEAK_BYTES),
            **_measured(turn),
        )
        for turn in report.train
    ]
    told, scored = ([event for turn in turns for event in turn.events] for turns in (report.train, report.evaluate))
    secured = [report.secured] if report.secured else []
    exchanged = [report.exchanged] if report.exchanged else []
    return [*told, *report.left_out, *_limits(round_index, report.train), *secured, *exchanged, *trained, *scored]


def _measured(turn: Turn) -> dict[str, Any]:
    """Of an update; of a method that shares nothing there is none."""
    if turn.update is None or not turn.up:
        return {}
    update = turn.update
    return {"update_norm": update.norm, "update_cosine": update.cosine, "sha256": update.sha256}


def _limits(round_index: int, turns: list[Turn]) -> Iterator[Limited]:
    for turn in turns:
        if (update := turn.update) is None:
            continue
        if update.scale < 1:
            kept = update.scale * update.norm
            yield Limited(round_index, turn.client_id, "update norm", update.norm, kept)
        if update.reported is not None:
            yield Limited(round_index, turn.client_id, "examples", update.reported, turn.metrics[NUM_EXAMPLES])


def is_done(folder: Path) -> bool:
    """Whether the job in `folder` was once finished."""
    return any(isinstance(event, Done) for event in read_events(folder / METRICS))


def _seen(events: list[Event]) -> dict[str, dict[str, int]]:
    """By client, {sha256 of an update: its round}, of the rounds that a log has."""
    seen: dict[str, dict[str, int]] = {}
    for event in events:
        if isinstance(event, Trained) and event.sha256:
            seen.setdefault(event.client_id, {})[event.sha256] = event.round
    return seen


def _place(event: Grafted) -> tuple[Any, ...]:
    return event.client_id, event.round, event.layer


def kept_shared(folder: Path, fingerprint: str, start: Arrays) -> tuple[int, Arrays]:
    """(round, shared state) of the round that a job keeps: its best by validation, or else its newest; (0, `start`)
    where it has not finished a round."""
    rounds = rounds_in(folder / "server")
    if not rounds:
        return 0, start
    best = best_of(read_events(folder / METRICS), rounds[-1]).round
    path = round_file(folder / "server", rounds[-1] if best is None else best)
    round_index, shared, _, header = load_server(path)
    check_header(path, header, {"base": fingerprint})
    return round_index, shared
