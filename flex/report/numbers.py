"""From the events of a run to numbers: read `metrics.jsonl`, group by job, average over clients, then over seeds.

A *job* is one (method, seed). Within a job every client counts the same (a plain mean over clients); over the seeds of
a method the mean and the standard deviation (`ddof=1`) are kept, and every seed's own value, so that methods can be
compared seed by seed. The scores of a job are those of its last completely evaluated round.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from flex.errors import FlexError
from flex.store import events
from flex.store.events import METRICS, Event

AFTER, BEFORE = "after_aggregation", "before_aggregation"

# Order of the rows everywhere, with the name and the explanation a reader sees.
METHODS: dict[str, tuple[str, str]] = {
    "base": ("Base model", "as it came, not trained here"),
    "local": ("Local", "each client alone, nothing is sent"),
    "fedavg": ("FedAvg", "one averaged LoRA for all, nothing private"),
    "flex": ("FLEx", "averaged LoRA + a private module of pretrained neurons, fitted to what the loss asks for"),
    "flex-paper": ("Paper's rule", "FLEx, but the private expert is the one that reconstructs best"),
    "flex-random": ("Random expert", "control: FLEx, but the expert is drawn at random"),
    "flex-fresh": ("Fresh module", "control: FLEx, but the private module is newly initialised"),
    "flex-private-lora": ("Private LoRA", "control: a second, private LoRA in place of the private module"),
    "flex-adapt": ("Adapted expert", "control: one pretrained expert adapted in place of the private module"),
}
# What has something else in place of FLEx's graft, so that one sees what the graft is good for.
CONTROLS = ("flex-paper", "flex-random", "flex-fresh", "flex-private-lora", "flex-adapt")
USUAL_GRAFT = ("neurons", "correction", True)  # criterion, target and refit of the FLEx that METHODS describes

# A chosen expert with less than this part of an even share (1/E) of the routing weight is one the client hardly uses.
LITTLE_USED_SHARE = 0.25


class Measure(NamedTuple):
    """What was scored: ("test" or "general", group name or "" for all, "loss" | "exact_match" | "rouge_l")."""

    split: str
    group: str
    name: str

    @property
    def title(self) -> str:
        kind = {"loss": "loss", "exact_match": "EM %", "rouge_l": "ROUGE-L"}[self.name]
        return " ".join(part for part in (self.split if not self.group else "", self._group_title, kind) if part)

    @property
    def _group_title(self) -> str:
        return f"general: {self.group}" if self.group and self.split == "general" else self.group

    @property
    def higher_is_better(self) -> bool:
        return self.name != "loss"

    def format(self, value: float | None, spread: float | None = None) -> str:
        """Percent with one decimal (EM, ROUGE-L) or three decimals (loss), as "57.9 ± 2.5"; a dash for nothing."""
        if value is None:
            return "–"
        if not math.isfinite(value):
            return "diverged"
        scale, digits = (1, 3) if self.name == "loss" else (100, 1)
        text = f"{scale * value:.{digits}f}"
        return text if spread is None else f"{text} ± {scale * spread:.{digits}f}"

    def format_signed(self, value: float, spread: float | None = None) -> str:
        """A difference, always with its sign: "+19.8 ± 2.3"."""
        return ("+" if value >= 0 else "−") + self.format(abs(value), spread)


@dataclass
class Job:
    """Everything one (method, seed) wrote. Where an event was written twice (a resumed run), the last one counts."""

    method: str
    seed: int
    info: Event | None = None
    done: Event | None = None
    evaluations: dict[tuple[int, str, str, str], Event] = field(default_factory=dict)  # round, client, when, split
    trains: dict[tuple[int, str], Event] = field(default_factory=dict)  # round, client
    grafts: dict[tuple[str, int], Event] = field(default_factory=dict)  # client, layer
    sent: dict[str, list[Event]] = field(default_factory=dict)  # direction -> tensors

    def add(self, event: Event) -> None:
        match event["event"]:
            case "job":
                self.info = event
            case "done":
                self.done = event
            case "evaluate":
                self.evaluations[event["round"], str(event["client_id"]), event["when"], event["split"]] = event
            case "train":
                self.trains[event["round"], str(event["client_id"])] = event
            case "graft":
                self.grafts[str(event["client_id"]), event["layer"]] = event
            case "sent":
                self.sent[event["direction"]] = event["tensors"]

    @property
    def last_round(self) -> int | None:
        """The last round in which every client was evaluated (the last with any evaluation if there is none such)."""
        tests = [key for key in self.evaluations if key[3] == "test"]
        whens = {when for _, _, when, _ in tests}
        counts = Counter(key[0] for key in tests if key[2] == (AFTER if AFTER in whens else BEFORE))
        if not counts:
            return None
        expected = (self.info or {}).get("num_clients") or max(counts.values())
        return max([r for r, count in counts.items() if count >= expected] or counts)

    @property
    def num_rounds(self) -> int | None:
        return (self.info or {}).get("num_rounds")

    @property
    def finished(self) -> bool:
        if self.last_round is None:
            return False
        return self.done is not None or self.num_rounds is None or self.last_round >= self.num_rounds

    def scores(self, when: str) -> dict[Measure, dict[str, tuple[float, int]]]:
        """{measure: {client: (value, number of examples)}} of the last round, for every measure that occurs."""
        whens = {key[2] for key in self.evaluations}
        if self.method in ("base", "local") and len(whens) == 1:
            when = next(iter(whens))  # nothing is aggregated: before and after are the same weights
        scores: dict[Measure, dict[str, tuple[float, int]]] = {}
        for (round_index, client, event_when, split), event in sorted(self.evaluations.items()):
            if round_index != self.last_round or event_when != when:
                continue
            for group, part in {"": event, **(event.get("groups") or {})}.items():
                for name in ("loss", "exact_match", "rouge_l"):
                    if part.get(name) is not None:
                        value = (float(part[name]), int(part.get("num_examples") or 0))
                        scores.setdefault(Measure(split, group, name), {})[client] = value
        return scores


def read_events(run_dir: Path | str) -> list[Event]:
    """All events of a run: RUN/metrics.jsonl, or, where that is not written yet, the files of the jobs in RUN.

    A last line cut off by a killed run is left out.

    Raises:
        FlexError: there is no such file in `run_dir`.
    """
    run_dir = Path(run_dir)
    path = run_dir / METRICS
    paths = [path] if path.is_file() else sorted(run_dir.glob(f"*/{METRICS}"))
    if not paths:
        raise FlexError(f"no {METRICS} in {str(run_dir)!r}; wanted the folder of a run of `flex train`")
    return [event for path in paths for event in events.read_events(path)]


def collect_jobs(all_events: Iterable[Event]) -> list[Job]:
    """The events by job, methods in the order of the tables, seeds ascending. Events without a method are left out."""
    jobs: dict[tuple[str, int], Job] = {}
    for event in all_events:
        if event["event"] != "run" and "method" in event:
            key = (str(event["method"]), int(event.get("seed") or 0))
            jobs.setdefault(key, Job(*key)).add(event)
    known = list(METHODS)
    return sorted(jobs.values(), key=lambda job: (_rank(job.method, known), job.method, job.seed))


def _rank(method: str, known: list[str]) -> float:
    """Methods that METHODS does not know (other strategies) stand after FedAvg."""
    return known.index(method) if method in known else known.index("fedavg") + 0.5


def summarise(all_events: Iterable[Event]) -> list[dict[str, Any]]:
    """One dict per method, in the order of the tables:

    method, label, about      its key, its name and what it is, in words
    seeds                     the seeds counted: the finished ones, or all of them while none is finished
    finished, rounds          whether every seed is finished; {seed: (last evaluated round, rounds planned or None)}
    after_aggregation         {Measure: {"mean", "spread" (None with one seed), "values": {seed: mean over clients},
    before_aggregation            "num_examples": test examples of one seed, all clients}}
    bytes_per_round           {"up", "down"}: all clients together, mean over rounds and seeds; None without training
    trained_parameters        {"shared", "personal"} or None
    grafts                    {"choices", "worse_than_zero", "little_used"} or None where no expert was chosen
    seconds                   mean over seeds, or None
    """
    jobs = collect_jobs(all_events)
    return [_summarise_method([job for job in jobs if job.method == m]) for m in dict.fromkeys(j.method for j in jobs)]


def _summarise_method(jobs: list[Job]) -> dict[str, Any]:
    method = jobs[0].method
    label, about = METHODS.get(method, (method, ""))
    if method == "flex":
        about = _flex_about(jobs) or about
    counted = [job for job in jobs if job.finished] or jobs
    infos = [job.info["trained_parameters"] for job in jobs if job.info and job.info.get("trained_parameters")]
    seconds = [job.done["seconds"] for job in jobs if job.done and job.done.get("seconds") is not None]
    return {
        "method": method,
        "label": label,
        "about": about,
        "seeds": [job.seed for job in counted],
        "finished": all(job.finished for job in jobs),
        "rounds": {job.seed: (job.last_round, job.num_rounds) for job in jobs},
        AFTER: _over_seeds(counted, AFTER),
        BEFORE: _over_seeds(counted, BEFORE),
        "bytes_per_round": _bytes_per_round(jobs),
        "trained_parameters": infos[-1] if infos else None,
        "grafts": _graft_counts(jobs),
        "seconds": statistics.fmean(seconds) if seconds else None,
    }


def _over_seeds(jobs: list[Job], when: str) -> dict[Measure, dict[str, Any]]:
    values: dict[Measure, dict[int, float]] = {}
    examples: dict[Measure, int] = {}
    for job in jobs:
        for measure, scores in job.scores(when).items():
            values.setdefault(measure, {})[job.seed] = statistics.fmean(value for value, _ in scores.values())
            examples[measure] = sum(count for _, count in scores.values())
    return {
        measure: {
            "mean": statistics.fmean(by_seed.values()),
            "spread": spread(by_seed.values()),
            "values": by_seed,
            "num_examples": examples[measure],
        }
        for measure, by_seed in values.items()
    }


def spread(values: Iterable[float]) -> float | None:
    """Standard deviation of a sample; None for fewer than two values or where one is not finite."""
    values = list(values)
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return statistics.stdev(values)


def _bytes_per_round(jobs: list[Job]) -> dict[str, float] | None:
    rounds = {(job.seed, round_index) for job in jobs for round_index, _ in job.trains}
    if not rounds:
        return None
    trains = [event for job in jobs for event in job.trains.values()]
    return {way: sum(event.get(f"bytes_{way}") or 0 for event in trains) / len(rounds) for way in ("up", "down")}


def _flex_about(jobs: list[Job]) -> str:
    """What FLEx's private module is where the run was configured otherwise; by the events, which say what was done."""
    for event in (event for job in jobs for event in job.grafts.values() if event.get("criterion")):
        refitted = (event.get("unexplained") or {}).get("after") is not None
        found = (event["criterion"], event.get("target", "output"), refitted)
        if found != USUAL_GRAFT:
            fit = "refitted" if refitted else "not refitted"
            return f"averaged LoRA + a private module, chosen by “{found[0]}” for the {found[1]}, {fit}"
    return ""


def _graft_counts(jobs: list[Job]) -> dict[str, int] | None:
    grafts = [event for job in jobs for event in job.grafts.values() if event.get("chosen") is not None]
    if not grafts:
        return None
    return {
        "choices": len(grafts),
        "worse_than_zero": sum(worse_than_zero(event) for event in grafts),
        "little_used": sum(little_used(event) for event in grafts),
    }


def worse_than_zero(graft: Event) -> bool:
    """The chosen expert reconstructs the layer's output worse than no expert at all (relative residual >= 1)."""
    return graft.get("residual") is not None and graft["residual"] >= 1


def little_used(graft: Event) -> bool:
    """The client's router gives the chosen expert next to nothing."""
    mass, num_experts = graft.get("routed_mass"), len(graft.get("candidates") or ())
    return mass is not None and num_experts > 0 and mass < LITTLE_USED_SHARE / num_experts


def measures(summary: list[dict[str, Any]], when: str = AFTER) -> list[Measure]:
    """The measures that occur, in the order of the tables: shares before losses, test before general, then groups.

    Groups are shown by exact match alone.
    """
    found = dict.fromkeys(measure for row in summary for measure in row[when])
    names = ("rouge_l", "exact_match", "loss")
    shown = [m for m in found if not m.group or m.name == "exact_match"]
    return sorted(shown, key=lambda m: (m.name == "loss", m.split != "test", bool(m.group), names.index(m.name)))


def primary_measure(summary: list[dict[str, Any]]) -> Measure | None:
    """What the verdict goes by: ROUGE-L where it was taken, else exact match, else loss."""
    found = measures(summary)
    wanted = [Measure("test", "", name) for name in ("rouge_l", "exact_match", "loss")]
    return next((measure for measure in wanted if measure in found), None)


def format_bytes(count: float | None) -> str:
    """Three significant digits and a decimal unit: "131 kB"."""
    return "–" if count is None else _scaled(count, 1000, ("B", "kB", "MB", "GB", "TB"))


def format_count(count: float | None) -> str:
    """Three significant digits: "148 k"."""
    return "–" if count is None else _scaled(count, 1000, ("", "k", "M", "G", "T"))


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= base * 0.9995 and power < len(units) - 1:
        value, power = value / base, power + 1
    digits = 0 if power == 0 or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {units[power]}".strip()
