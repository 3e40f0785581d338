"""One job: a method and a seed on the same data as every other, resumable at any moment.

JOB/metrics.jsonl                       its events
JOB/server/round-0003.safetensors       shared state and the strategy's moments after round 3
JOB/clients/<folder_name(client_id)>/   that client's personal files, for nobody else
"""

import hashlib
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from flex.config import RunConfig
from flex.data.examples import ClientData, Encoder, Example
from flex.federation.checkpoint import load_server, save_server
from flex.federation.client import ClientRuntime
from flex.federation.client_app import make_client_app
from flex.federation.flower import Message, MessageType
from flex.federation.local import InProcessGrid
from flex.federation.messages import NUM_EXAMPLES, Arrays, sent_tensors
from flex.federation.rounds import RoundReport, run_rounds
from flex.federation.strategy import FedAvg, load_strategy_state, make_strategy
from flex.model.base import Base
from flex.store.events import METRICS, EventLog, read_events
from flex.store.files import check_header, round_file, rounds_in
from flex.store.personal import KEPT_ROUNDS


@dataclass(frozen=True)
class Setting:
    """What all jobs of one seed have in common."""

    base: Base
    encoder: Encoder
    clients: list[ClientData]
    general: list[Example]

    @cached_property
    def data_fingerprint(self) -> str:
        """A name for the examples, in their order: whoever resumes on others would train on what was held out."""
        digest = hashlib.sha256()
        for client in self.clients:
            for part in (client.train, client.test):
                digest.update(f"{client.client_id}/{len(part)}".encode())
                for example in part:
                    digest.update(f"{example.input_ids}{example.prompt_length}{example.response}".encode())
        return digest.hexdigest()[:16]


class Bar(Protocol):
    """Where a job shows its progress."""

    def begin(self, total: int) -> None: ...
    def step(self, steps: int = 1) -> None: ...
    def say(self, what: str) -> None: ...
    def end(self) -> None: ...


def run_job(setting: Setting, config: RunConfig, method: str, seed: int, folder: Path, bar: Bar) -> None:
    """Does what is left of a job: nothing where it is finished, all of it where it is new."""
    rounds = 0 if method == "base" else config.train.rounds
    steps_per_round = (config.train.clients_per_round or len(setting.clients)) * config.train.steps
    total = max(1, rounds * steps_per_round)
    bar.begin(total)
    log = EventLog(folder / METRICS, method=method, seed=seed)
    if any(event["event"] == "done" for event in read_events(log.path)):
        bar.step(total)
        bar.say("done before")
    else:
        job = Job(setting, config, method, seed, folder, log, bar, steps_per_round)
        job.run()
        bar.say(f"done, {job.verdict}")
    bar.end()


class Job:
    """One method and one seed: sets up, goes on where it was stopped, runs the rounds, keeps what they give."""

    def __init__(
        self,
        setting: Setting,
        config: RunConfig,
        method: str,
        seed: int,
        folder: Path,
        log: EventLog,
        bar: Bar,
        steps_per_round: int,
    ):
        self.steps_per_round, self.told = steps_per_round, bool(rounds_in(folder / "server"))
        self.setting, self.config, self.folder, self.log, self.bar = setting, config, folder, log, bar
        self.method, self.seed, self.started = method, seed, time.perf_counter()
        self.header = {
            "base": setting.base.fingerprint,
            "method": method,
            "seed": seed,
            "strategy": config.train.strategy,
            "data": setting.data_fingerprint,
        }
        self.exact: dict[str, float] = {}
        self.runtime = ClientRuntime(
            setting.base,
            setting.encoder,
            setting.clients,
            setting.general,
            config,
            method,
            seed,
            folder,
            on_event=self._on_event,
            on_step=bar.step,
            on_calibration=lambda what, done, total: bar.say(f"{self.runtime.current}: {what}, {done}/{total}"),
        )

    @property
    def verdict(self) -> str:
        mean = sum(self.exact.values()) / max(1, len(self.exact))
        return f"exact match {mean:.3f}"

    def run(self) -> None:
        train = self.config.train
        clients = [client.client_id for client in self.setting.clients]
        settings = {"proximal_mu": train.proximal_mu} if train.strategy == "fedprox" else {}
        strategy = make_strategy(train.strategy, len(clients), clients_per_round=train.clients_per_round, **settings)
        shared, done = self._resume(strategy)
        if self.method == "base":
            for client_id in clients:
                self.bar.say(f"scoring {client_id}")
                self.runtime.evaluate(client_id, 0, shared, "after_aggregation")
            self.bar.step()
        else:
            grid = InProcessGrid(make_client_app(self.runtime), clients, on_message=self._on_message)
            run_rounds(
                strategy,
                grid,
                shared,
                train.rounds,
                start_round=done + 1,
                evaluate_every=self.config.evaluate.every,
                on_round=lambda index, arrays, report: self._save(index, arrays, strategy, report),
            )
        seconds = time.perf_counter() - self.started
        self.log.write({"event": "done", "round": train.rounds, "seconds": seconds, "tokens": self.runtime.tokens})

    def _resume(self, strategy: FedAvg) -> tuple[Arrays, int]:
        """(shared state, rounds done): from the newest server file, or the start. What came after it is forgotten."""
        server = self.folder / "server"
        rounds = rounds_in(server)
        if not rounds:
            self.log.path.unlink(missing_ok=True)
            for store in self.runtime.stores.values():
                store.forget(after=-1)
            self.log.write(self._job_event())
            return self.runtime.shared_arrays(), 0
        path = round_file(server, rounds[-1])
        done, shared, moments, header = load_server(path)
        check_header(path, header, self.header)
        load_strategy_state(strategy, moments)
        self.log.rewind(done)
        for store in self.runtime.stores.values():
            store.forget(after=done)
        self.bar.step(done * self.steps_per_round)
        return shared, done

    def _save(self, round_index: int, shared: Arrays, strategy: FedAvg, report: RoundReport) -> None:
        for turn in report.train:
            self.log.write(
                {
                    "event": "train",
                    "round": round_index,
                    "client_id": turn.client_id,
                    "num_examples": turn.metrics[NUM_EXAMPLES],
                    "loss": turn.metrics["loss"],
                    "opening": turn.metrics["opening"] or None,
                    "seconds": turn.metrics["seconds"],
                    "bytes_down": turn.bytes_down,
                    "bytes_up": turn.bytes_up,
                }
            )
        server = self.folder / "server"
        save_server(round_file(server, round_index), round_index, shared, strategy, self.header)
        for old in rounds_in(server)[:-KEPT_ROUNDS]:
            round_file(server, old).unlink(missing_ok=True)

    def _job_event(self) -> dict[str, Any]:
        counts = self.runtime.parts.counts()
        return {
            "event": "job",
            "num_rounds": 0 if self.method == "base" else self.config.train.rounds,
            "num_clients": len(self.setting.clients),
            "trained_parameters": {role: counts[role] for role in ("shared", "personal")},
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _on_event(self, event: dict[str, Any]) -> None:
        if event["event"] == "evaluate" and event["split"] == "test" and event["when"] == "after_aggregation":
            self.exact[event["client_id"]] = event["exact_match"]
        self.log.write(event)

    def _on_message(self, message: Message, reply: Message, seconds: float) -> None:
        """Keeps, once, what exactly travelled in each direction; says who is at work."""
        doing, client = message.metadata.message_type, self.runtime.current
        self.bar.say(f"{client}: {doing}")
        if doing == MessageType.TRAIN and reply.has_content() and not self.told:
            self.told = True
            for direction, content in (("down", message.content), ("up", reply.content)):
                self.log.write({"event": "sent", "direction": direction, "tensors": sent_tensors(content)})


def latest_shared(folder: Path, fingerprint: str, start: Arrays) -> tuple[int, Arrays]:
    """(round, shared state) of a job's newest server file; (0, `start`) where it has not finished a round."""
    rounds = rounds_in(folder / "server")
    if not rounds:
        return 0, start
    path = round_file(folder / "server", rounds[-1])
    round_index, shared, _, header = load_server(path)
    check_header(path, header, {"base": fingerprint})
    return round_index, shared
