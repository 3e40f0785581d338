"""From the events of a run to numbers: group by job, average over clients, then over seeds.

A *job* is one (method, seed). Within a job every client counts the same (a plain mean over clients); over the seeds of
a method the mean and the standard deviation (`ddof=1`) are kept, and every seed's own value, so that methods can be
compared seed by seed. The scores of a job are those of its last completely evaluated round.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from flex.errors import FlexError
from flex.evaluation.measures import KINDS, Kind
from flex.evaluation.paired import Pair
from flex.methods import AVERAGED, MAIN, METHODS, GraftSettings, Method
from flex.store import events
from flex.store.events import (
    AFTER,
    BASE_ALONE,
    BEFORE,
    METRICS,
    UPDATE_ALONE,
    Event,
    Grafted,
    RunStarted,
)

# A chosen expert with less than this part of an even share (1/E) of the routing weight is one the client hardly uses.
LITTLE_USED_SHARE = 0.25


class Measure(NamedTuple):
    """What was scored: ("test" or "general", group name or "" for all, key of `KINDS`)."""

    split: str
    group: str
    name: str

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    @property
    def where(self) -> str:
        """Which questions, as in the head of a table."""
        if self.group and self.split != "test":
            return f"{self.split}: {self.group}"
        return self.group or self.split

    @property
    def title(self) -> str:
        return f"{self.where} {self.kind.title}"

    @property
    def higher_is_better(self) -> bool:
        return self.kind.higher_is_better

    def format(self, value: float | None, spread: float | None = None) -> str:
        return self.kind.format(value, spread)

    def format_signed(self, value: float, spread: float | None = None) -> str:
        """A difference, always with its sign: "+19.8 ± 2.3"."""
        return ("+" if value >= 0 else "−") + self.format(abs(value), spread)


def declared(method: str) -> Method:
    """The row of a method. One that the table does not know (another version's) goes by its key and averages."""
    return METHODS.get(method) or Method(method, "")


@dataclass
class JobLog:
    """Everything one (method, seed) wrote. Where an event was written twice (a resumed run), the last one counts."""

    method: str
    seed: int
    info: events.JobStarted = field(default_factory=events.JobStarted)
    done: events.Done | None = None
    extended: list[events.Extended] = field(default_factory=list)
    evaluations: dict[tuple[int, str, str, str], events.Evaluated] = field(
        default_factory=dict
    )  # round, client, when, split
    trains: dict[tuple[int, str], events.Trained] = field(default_factory=dict)  # round, client
    grafts: dict[tuple[str, int], Grafted] = field(default_factory=dict)  # client, layer
    sent: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # direction -> tensors
    left_out: dict[tuple[int, str, str], events.LeftOut] = field(default_factory=dict)  # round, client, doing
    secured: dict[int, events.Secured] = field(default_factory=dict)  # round
    exchanged: dict[int, events.Exchanged] = field(default_factory=dict)  # round
    routed: dict[tuple[int, str], events.Routed] = field(default_factory=dict)  # round, client
    added: dict[tuple[int, str], events.Added] = field(default_factory=dict)  # round, client
    costs: dict[tuple[int, str], events.Cost] = field(default_factory=dict)  # round, client
    limited: dict[tuple[int, str, str], events.Limited] = field(default_factory=dict)  # round, client, what

    def add(self, event: Event) -> None:
        match event:
            case events.JobStarted():
                self.info = event
            case events.Extended():
                self.extended.append(event)
                self.info = replace(self.info, num_rounds=event.num_rounds, num_clients=event.num_clients)
            case events.Done():
                self.done = event
            case events.Evaluated() if event.split != events.VALIDATION:
                self.evaluations[event.round, event.client_id, event.when, event.split] = event
            case events.Trained():
                self.trains[event.round, event.client_id] = event
            case Grafted():
                self.grafts[event.client_id, event.layer] = event
            case events.LeftOut():
                self.left_out[event.round, event.client_id, event.doing] = event
            case events.Limited():
                self.limited[event.round, event.client_id, event.what] = event
            case events.Secured():
                self.secured[event.round] = event
            case events.Exchanged():
                self.exchanged[event.round] = event
            case events.Routed():
                self.routed[event.round, event.client_id] = event
            case events.Added():
                self.added[event.round, event.client_id] = event
            case events.Cost():
                self.costs[event.round, event.client_id] = event
            case events.Sent():
                self.sent[event.direction] = event.tensors

    @property
    def last_round(self) -> int | None:
        """The round that a finished job keeps, or else the last in which every client was evaluated (the last with any
        evaluation if there is none such)."""
        if self.done is not None and self.done.kept is not None:
            return self.done.kept
        tests = [key for key in self.evaluations if key[3] == "test"]
        whens = {when for _, _, when, _ in tests}
        counts = Counter(key[0] for key in tests if key[2] == (AFTER if AFTER in whens else BEFORE))
        if not counts:
            return None
        expected = self.info.num_clients or max(counts.values())
        return max([r for r, count in counts.items() if count >= expected] or counts)

    @property
    def finished(self) -> bool:
        if self.last_round is None:
            return False
        planned = self.info.num_rounds
        return self.done is not None or planned is None or self.last_round >= planned

    def scores(self, when: str) -> dict[Measure, dict[str, tuple[float, int]]]:
        """{measure: {client: (value, number of examples)}} of the last round, for every measure that occurs."""
        whens = {key[2] for key in self.evaluations}
        if not declared(self.method).averages and len(whens) == 1 and when in (AFTER, BEFORE):
            when = next(iter(whens))  # before and after aggregation are the same weights
        scores: dict[Measure, dict[str, tuple[float, int]]] = {}
        last = self.last_round  # counted anew each time
        for (round_index, client, event_when, split), event in sorted(self.evaluations.items()):
            if round_index != last or event_when != when:
                continue
            for group, part in {"": vars(event), **event.groups}.items():
                for name in KINDS:
                    if part.get(name) is not None:
                        value = (float(part[name]), int(part.get("num_examples") or 0))
                        scores.setdefault(Measure(split, group, name), {})[client] = value
        return scores


@dataclass(frozen=True)
class Stat:
    """`spread`: over seeds, None with one; `values`: {seed: mean over clients}; `num_examples`: of one seed."""

    mean: float
    spread: float | None
    values: dict[int, float]
    num_examples: int


@dataclass(frozen=True)
class Row:
    """One method of a run: its jobs by seed, and what they come to."""

    method: str
    jobs: list[JobLog]

    @property
    def declared(self) -> Method:
        return declared(self.method)

    @property
    def label(self) -> str:
        return self.declared.label

    @property
    def about(self) -> str:
        """What it is in words, as this run was configured."""
        return (_configured_otherwise(self.jobs) if self.method == MAIN else "") or self.declared.about

    @property
    def finished(self) -> bool:
        return all(job.finished for job in self.jobs)

    @property
    def counted(self) -> list[JobLog]:
        """The finished jobs, or all of them while none is finished."""
        return [job for job in self.jobs if job.finished] or self.jobs

    @property
    def seeds(self) -> list[int]:
        return [job.seed for job in self.counted]

    @cached_property
    def scores(self) -> dict[str, dict[Measure, Stat]]:
        """{what was scored (`Evaluated.when`): {measure: over the counted seeds}}."""
        return {when: _over_seeds(self.counted, when) for when in (AFTER, BEFORE, UPDATE_ALONE, BASE_ALONE)}

    @cached_property
    def by_client(self) -> list[dict[Measure, dict[str, tuple[float, int]]]]:
        """After aggregation, every client's (value, number of examples), job by job."""
        return [job.scores(AFTER) for job in self.counted]

    def pairs(self, measure: Measure, when: str = AFTER) -> dict[Pair, float]:
        """Every score by (seed, client)."""
        return {
            (job.seed, client): value
            for job in self.counted
            for client, (value, _) in job.scores(when).get(measure, {}).items()
        }

    @property
    def before(self) -> dict[Measure, Stat]:
        return self.scores[BEFORE]

    @property
    def after(self) -> dict[Measure, Stat]:
        return self.scores[AFTER]

    @property
    def bytes_per_round(self) -> dict[str, float] | None:
        """{"up", "down"}: all clients together, mean over rounds and seeds; None without training."""
        rounds = {(job.seed, at) for job in self.jobs for at, _ in job.trains}
        trains = [event for job in self.jobs for event in job.trains.values()]
        up, down = sum(event.bytes_up or 0 for event in trains), sum(event.bytes_down or 0 for event in trains)
        return {"up": up / len(rounds), "down": down / len(rounds)} if rounds else None

    @property
    def trained_parameters(self) -> dict[str, int] | None:
        """{"shared", "personal"}."""
        return next((job.info.trained_parameters for job in self.jobs if job.info.trained_parameters), None)

    @property
    def learning_rates(self) -> dict[str, float] | None:
        """Of the LoRA and of the private module; None where the log does not say."""
        return next((job.info.learning_rates for job in self.jobs if job.info.learning_rates), None)

    @property
    def grafts(self) -> list[Grafted]:
        """The choices of one expert as a whole."""
        return [event for job in self.jobs for event in job.grafts.values() if event.chosen is not None]

    def mean_cost(self, name: str) -> float | None:
        """ "seconds" or "tokens" of one seed, mean over seeds."""
        found = [value for job in self.jobs if job.done and (value := getattr(job.done, name)) is not None]
        return statistics.fmean(found) if found else None


def read_events(run_dir: Path | str) -> list[Event]:
    """All events of a run: RUN/metrics.jsonl, or, where that is not written yet, the files of the jobs in RUN.

    A last line cut off by a killed run is left out.

    Raises:
        FlexError: there is no such file in `run_dir`.
    """
    run_dir = Path(run_dir)
    path = run_dir / METRICS
    paths = [path] if path.is_file() else _of_jobs(run_dir)
    if not paths:
        raise FlexError(f"no {METRICS} in {str(run_dir)!r}; expected the folder of a run of `flex train`")
    return [event for path in paths for event in events.read_events(path)]


def _of_jobs(run_dir: Path) -> list[Path]:
    """The logs of the jobs in a run's folder; a copy beside a job (`flex-seed0.bak`) is none."""
    return sorted(path for path in run_dir.glob(f"*/{METRICS}") if re.fullmatch(r".+-seed\d+", path.parent.name))


def collect_jobs(all_events: Iterable[Event]) -> list[JobLog]:
    """The events by job, methods in the order of the tables, seeds ascending. Events without a method are left out."""
    jobs: dict[tuple[str, int], JobLog] = {}
    for event in all_events:
        if event.method is not None and not isinstance(event, RunStarted):
            key = (event.method, event.seed or 0)
            jobs.setdefault(key, JobLog(*key)).add(event)
    known = list(METHODS)

    def rank(job: JobLog) -> tuple[float, str, int]:
        after_averaged = known.index(AVERAGED) + 0.5  # where methods stand that the table does not know
        return (known.index(job.method) if job.method in METHODS else after_averaged, job.method, job.seed)

    return sorted(jobs.values(), key=rank)


def summarise(all_events: Iterable[Event]) -> list[Row]:
    """One row per method, in the order of the tables."""
    by_method: dict[str, list[JobLog]] = {}
    for job in collect_jobs(all_events):
        by_method.setdefault(job.method, []).append(job)
    return [Row(method, jobs) for method, jobs in by_method.items()]


def _over_seeds(jobs: list[JobLog], when: str) -> dict[Measure, Stat]:
    values: dict[Measure, dict[int, float]] = {}
    examples: dict[Measure, int] = {}
    for job in jobs:
        for measure, scores in job.scores(when).items():
            values.setdefault(measure, {})[job.seed] = statistics.fmean(value for value, _ in scores.values())
            examples[measure] = sum(count for _, count in scores.values())
    return {
        measure: Stat(statistics.fmean(by_seed.values()), spread(by_seed.values()), by_seed, examples[measure])
        for measure, by_seed in values.items()
    }


def spread(values: Iterable[float]) -> float | None:
    """Standard deviation of a sample; None for fewer than two values or where one is not finite."""
    values = list(values)
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


def _configured_otherwise(jobs: list[JobLog]) -> str:
    """What the private module is where the graft is not the default one; by the events, which say what was done."""
    usual = GraftSettings()
    for event in (event for job in jobs for event in job.grafts.values() if event.criterion):
        refitted = event.unexplained.get("after") is not None
        if (event.criterion, event.target, refitted) != (usual.criterion, usual.target, usual.refit):
            fit = "refitted" if refitted else "not refitted"
            return f"averaged LoRA + a private module, chosen by “{event.criterion}” for the {event.target}, {fit}"
    return ""


def worse_than_zero(graft: Grafted) -> bool:
    """The chosen expert reconstructs the layer's output worse than no expert at all (relative residual >= 1)."""
    return graft.residual is not None and graft.residual >= 1


def little_used(graft: Grafted) -> bool:
    """The client's router gives the chosen expert next to nothing."""
    num_experts = len(graft.candidates)
    return graft.routed_mass is not None and num_experts > 0 and graft.routed_mass < LITTLE_USED_SHARE / num_experts


def measures(summary: list[Row], when: str = AFTER) -> list[Measure]:
    """The measures that occur, in the order of the tables: shares before losses, test before general, then groups."""
    found = dict.fromkeys(measure for row in summary for measure in row.scores[when])
    order = list(KINDS)
    shown = [m for m in found if not m.group or m.kind.of_groups]
    return sorted(shown, key=lambda m: (not m.kind.is_share, m.split != "test", bool(m.group), order.index(m.name)))


def primary_measure(summary: list[Row]) -> Measure | None:
    """What the verdict goes by: the first of KINDS that the clients' own test sets were scored by."""
    found = measures(summary)
    return next((m for name in KINDS if (m := Measure("test", "", name)) in found), None)


def best_methods(summary: list[Row], measure: Measure, when: str = AFTER) -> set[str]:
    """The methods with the best mean, of one column of a table."""
    return best({row.method: row.scores[when][measure].mean for row in summary if measure in row.scores[when]}, measure)


def best(values: dict[str, float | None], measure: Measure) -> set[str]:
    """The keys of the best value as it is printed: several that print alike are all best."""
    printed = {key: measure.kind.printed(value) for key, value in values.items() if value is not None}
    finite = [value for value in printed.values() if math.isfinite(value)]
    most = (max if measure.higher_is_better else min)(finite, default=None)
    return {key for key, value in printed.items() if value == most}


def byte_groups(tensors: Iterable[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """{group: (how many tensors, their bytes)} of a message: tensors that differ in the number of their layer alone are
    one group."""
    groups: dict[str, list[int]] = {}
    for tensor in tensors:
        name = re.sub(r"\.\d+\.", ".*.", str(tensor.get("name", "")))
        groups.setdefault(name, []).append(tensor.get("bytes") or 0)
    return {name: (len(sizes), sum(sizes)) for name, sizes in groups.items()}


def format_bytes(count: float | None) -> str:
    """Three significant digits and a decimal unit: "131 kB"."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def format_count(count: float | None) -> str:
    """Three significant digits: "148 k"."""
    return _scaled(count, ("", "k", "M", "G", "T"))


def _scaled(value: float | None, units: tuple[str, ...]) -> str:
    if value is None:
        return "–"
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    digits = 0 if power == 0 or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {units[power]}".strip()
