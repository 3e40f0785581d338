"""The report as one HTML page: what its sections show, section by section. The words and the order of the page are in
`report.html.j2`, which escapes whatever is put into it; only the drawings of `figures.py` enter as markup."""

from __future__ import annotations

import json
import math
import statistics
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from flex.methods import AVERAGED, MAIN, METHODS
from flex.report import figures
from flex.report.findings import Difference, difference, findings
from flex.report.numbers import (
    AFTER,
    BEFORE,
    JobLog,
    Measure,
    Row,
    best_methods,
    collect_jobs,
    format_bytes,
    format_count,
    little_used,
    measures,
    primary_measure,
    summarise,
    worse_than_zero,
)
from flex.store.events import Event, Grafted, RunStarted, Truncated

FOLDER = Path(__file__).parent
STYLE = FOLDER / "report.css"
SENTENCES_IN_VERDICT = 4  # the others stand below the picture, so that table and picture are on the first screen
MAX_PANELS = 16  # small multiples beyond this are left out, and the page says how many
MAX_OPEN_CELLS = 80  # a longer table of choices is folded
OTHER_MARKS = 3  # the last colours, for methods that METHODS does not know
VARIANTS = [method for method, row in METHODS.items() if row.control_of or row.strategy]
TARGETS = {"output": "the layer's output", "correction": "the correction that the loss asks of the layer's output"}
VERDICT_WORDS = {
    "better": "better",
    "ahead": "not settled",
    "level": "level",
    "behind": "not settled",
    "worse": "worse",
    "open": "not judged",
}


@dataclass(frozen=True)
class Run:
    """What the sections are made from."""

    events: list[Event]
    config_text: str = ""

    @cached_property
    def summary(self) -> list[Row]:
        return summarise(self.events)

    @cached_property
    def jobs(self) -> list[JobLog]:
        return collect_jobs(self.events)

    @cached_property
    def rows(self) -> dict[str, Row]:
        return {row.method: row for row in self.summary}

    @cached_property
    def header(self) -> RunStarted:
        """What the trainer wrote first (the last such event, if it was resumed)."""
        return next((event for event in reversed(self.events) if isinstance(event, RunStarted)), RunStarted())

    @cached_property
    def clients(self) -> list[str]:
        """In the order of the `run` event, then those that occur only in the events of the jobs."""
        known = [str(client["client_id"]) for client in self.header.clients]
        seen = sorted({client for event in self.events if (client := getattr(event, "client_id", None)) is not None})
        return list(dict.fromkeys(known + seen))

    @cached_property
    def strategy(self) -> str:
        """How the server aggregates, by the configuration; empty if that is not known."""
        try:
            config = tomllib.loads(self.config_text)
            return str(config.get("strategy", {}).get("name") or config.get("train", {}).get("strategy", ""))
        except (tomllib.TOMLDecodeError, AttributeError):
            return ""

    @cached_property
    def marks(self) -> dict[str, int]:
        """The colour of every method, the same in every run."""
        known, own = list(METHODS), figures.MARKS - OTHER_MARKS
        others = [method for method in self.rows if method not in METHODS]
        return {m: known.index(m) % own if m in METHODS else own + others.index(m) % OTHER_MARKS for m in self.rows}

    @property
    def several_seeds(self) -> bool:
        return any(len(row.seeds) > 1 for row in self.summary)

    def jobs_of(self, method: str) -> list[JobLog]:
        return [job for job in self.jobs if job.method == method]


class Panel(NamedTuple):
    svg: Markup
    caption: str
    remark: str = ""


def page(run: Run) -> str:
    """The whole document."""
    env = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"size": format_bytes, "count": format_count, "prose": _prose}
    env.tests |= {"worse_than_zero": worse_than_zero, "little_used": little_used}
    said = findings(run.summary)
    context = {
        "run": run,
        "style": Markup(STYLE.read_text(encoding="utf-8")),
        "main": MAIN,
        "subtitle": _subtitle(run),
        "verdict": said[:SENTENCES_IN_VERDICT],
        "more": said[SENTENCES_IN_VERDICT:],
        "comparison": _comparison(run),
        "differences": _differences(run),
        "before_and_after": _before_and_after(run),
        "facts": _facts(run),
        "clients": _clients(run),
        "per_client": _per_client(run),
        "losses": _losses(run),
        "neurons": [_neuron_job(run, job) for job in run.jobs if any(map(_mixed, job.grafts.values()))],
        "choices": _choices(run),
        "openings": _openings(run),
        "sent": _sent(run),
        "arrays": _arrays(run),
        "truncated": _truncated(run),
    }
    return env.get_template("report.html.j2").render(
        context,
        dash=dash,
        stops={
            "residual": figures.residual_stops(),
            "count": figures.stops(figures.COUNT_COLOURS),
            "lowest": figures.RESIDUAL_MIN,
            "highest": figures.RESIDUAL_MAX,
        },
    )


def dash(method: str) -> int:
    """Line style, so that no reading depends on colour alone: 1, 2, 3 in turn for variants, 0 for the others."""
    return VARIANTS.index(method) % 3 + 1 if method in VARIANTS else 0


def _prose(text: str) -> str:
    """A number is not torn from its spread or its unit at the end of a line."""
    return text.replace(" ± ", "\u00a0±\u00a0").replace(" %", "\u00a0%")


def _panels(clients: Sequence[str], draw: Callable[[str], str]) -> dict[str, Any]:
    """One picture per client, as many as are drawn."""
    return {
        "panels": [Panel(Markup(draw(client)), client) for client in clients[:MAX_PANELS]],
        "left_out": max(0, len(clients) - MAX_PANELS),
    }


def _subtitle(run: Run) -> str:
    rounds = max((job.info.num_rounds or 0 for job in run.jobs), default=0)
    counts = ((len(run.clients), "client"), (rounds, "round"), (len({job.seed for job in run.jobs}), "seed"))
    parts = [f"{number} {noun}{'' if number == 1 else 's'}" for number, noun in counts if number or noun != "round"]
    if run.strategy not in ("", AVERAGED):
        parts.append(f"aggregated by {run.strategy} wherever {METHODS[AVERAGED].label} is named")
    if not all(row.finished for row in run.summary):
        parts.append("not finished")
    return " · ".join(parts)


def _comparison(run: Run) -> dict[str, Any]:
    found = measures(run.summary)
    forgetting = [m for m in found if m.split == "general"]
    found = [m for m in found if m not in forgetting[1:]]  # one measure of forgetting is enough here
    return {
        "measures": found,
        "best": {measure: best_methods(run.summary, measure) for measure in found},
        "bars": [_bars(run, measure) for measure in found],
        "meanings": list(dict.fromkeys(m.kind.meaning for m in found if m.kind.meaning)),
    }


def _bars(run: Run, measure: Measure) -> Panel:
    rows = [row for row in run.summary if measure in row.after]
    stats = [row.after[measure] for row in rows]
    values = [[measure.kind.scale * value for value in stat.values.values()] for stat in stats]
    finite = [value for seeds in values for value in seeds if math.isfinite(value)]
    longest = sorted((max(seeds, default=0.0) for seeds in values if all(map(math.isfinite, seeds))), reverse=True)
    limit = max(finite, default=0.0) or 1.0
    # The loss of one method, mostly the base, would make the others' bars too short to compare.
    cut = not measure.kind.is_share and len(longest) > 2 and longest[0] > 3 * longest[1] > 0
    if cut:
        limit = 1.3 * longest[1]
    labels, texts = [row.label for row in rows], [measure.format(stat.mean) for stat in stats]
    named = ", ".join(f"{label} {text}" for label, text in zip(labels, texts, strict=True))
    marks = [run.marks[row.method] for row in rows]
    svg = figures.comparison_panel(labels, marks, values, texts, limit, f"{measure.title} by method: {named}")
    dots = ", a dot is a seed" if any(len(seeds) > 1 for seeds in values) else ""
    direction = "higher is better" if measure.higher_is_better else "lower is better"
    return Panel(Markup(svg), measure.title, direction + (", longest bar cut" if cut else dots))


class Table(NamedTuple):
    """`rows`: (method's row, a word or two on it, one cell per measure)."""

    measures: list[Measure]
    rows: list[tuple[Row, str, list[Any]]]


def _differences(run: Run) -> Table:
    """FLEx minus every other method, seed by seed."""
    main = run.rows.get(MAIN)
    found = [measure for measure in measures(run.summary) if main and measure in main.after]

    def cell(row: Row, measure: Measure) -> tuple[Difference, str] | None:
        diff = difference(main, row, measure)
        return diff and (diff, VERDICT_WORDS[diff.verdict])

    others = [row for row in run.summary if main and row is not main]
    return Table(found, [(row, "", [cell(row, m) for m in found]) for row in others])


def _before_and_after(run: Run) -> Table:
    """Both sets of weights that a client can be scored with, for the methods that were scored with both."""
    found = [m for m in measures(run.summary) if any(m in row.scores[BEFORE] for row in run.summary)]
    both = [row for row in run.summary if row.declared.trains and all(row.scores.values())]
    words = {BEFORE: "before", AFTER: "after"}
    return Table(
        found, [(row, words[when], [row.scores[when].get(m) for m in found]) for row in both for when in words]
    )


def _facts(run: Run) -> dict[str, Any]:
    header = run.header
    facts = {
        "Base model": header.base_model,
        "Prompt template": header.template,
        "Aggregation": run.strategy,
        "Rounds": ", ".join(str(n) for n in sorted({job.info.num_rounds for job in run.jobs if job.info.num_rounds})),
        "Seeds": ", ".join(map(str, sorted({job.seed for job in run.jobs}))),
        "Started": min((job.info.started for job in run.jobs if job.info.started), default=""),
        "Threads": header.threads,
        "Versions": ", ".join(f"{name} {version}" for name, version in header.versions.items()),
    }
    return {name: value for name, value in facts.items() if value}


def _clients(run: Run) -> list[tuple[str, list[str], str]]:
    """(client, sizes of its training and test part, what it holds)."""
    known = {str(client["client_id"]): client for client in run.header.clients}
    trained = {client: event.num_examples for job in run.jobs for (_, client), event in job.trains.items()}
    tested = {
        client: event.num_examples
        for job in run.jobs
        for (_, client, _, split), event in job.evaluations.items()
        if split == "test"
    }
    rows = []
    for client in run.clients:
        own = known.get(client, {})
        sizes = (own.get("num_train", trained.get(client)), own.get("num_test", tested.get(client)))
        texts = ["–" if size is None else f"{size:,}".replace(",", " ") for size in sizes]
        rows.append((client, texts, own.get("description") or ""))
    return rows


def _per_client(run: Run) -> list[tuple[Measure, list[tuple[Row, list[str]]]]]:
    """For each measure of the test sets, the verdict's first, every client's mean over seeds by method."""
    primary = primary_measure(run.summary)
    scores = {(job.method, job.seed): job.scores(AFTER) for job in run.jobs}

    def cell(row: Row, measure: Measure, client: str) -> str:
        by_seed = [scores[row.method, seed].get(measure, {}) for seed in row.seeds]
        values = [by_client[client][0] for by_client in by_seed if client in by_client]
        return measure.format(statistics.fmean(values) if values else None)

    found = sorted((m for m in measures(run.summary) if m.split == "test"), key=lambda m: m != primary)
    return [(m, [(row, [cell(row, m, client) for client in run.clients]) for row in run.summary]) for m in found]


def _losses(run: Run) -> dict[str, Any] | None:
    """One panel per client, one colour per method."""
    by_client: dict[str, dict[str, list[list[tuple[int, float]]]]] = {}
    for job in run.jobs:
        for client in run.clients:
            line = [(at, e.loss) for (at, owner), e in sorted(job.trains.items()) if owner == client]
            line = [(at, loss) for at, loss in line if loss is not None and math.isfinite(loss)]
            if line:
                by_client.setdefault(client, {}).setdefault(job.method, []).append(line)
    losses = [loss for lines in by_client.values() for seeds in lines.values() for line in seeds for _, loss in line]
    if not losses:
        return None
    low, high = min(losses), max(losses)
    log = low > 0 and high / low > 12
    limits = (low / 1.15, high * 1.15) if log else (0.0, high * 1.06 or 1.0)

    def draw(client: str) -> str:
        series = [(run.marks[method], dash(method), seeds) for method, seeds in by_client[client].items()]
        return figures.loss_panel(series, limits, log, f"Training loss per round of client {client}")

    methods = [method for method in run.rows if any(method in lines for lines in by_client.values())]
    several = any(len(run.jobs_of(method)) > 1 for method in methods)
    drawn = _panels([client for client in run.clients if client in by_client], draw)
    return drawn | {"methods": methods, "several": several, "log": log}


def _mixed(event: Grafted) -> bool:
    """Whether a graft is made of neurons of several experts (or of several whole ones)."""
    return event.chosen is None and any(event.neurons)


def _title(run: Run, job: JobLog) -> str:
    return f"{run.rows[job.method].label}, seed {job.seed}"


def _owners(run: Run, events: Iterable[Grafted]) -> list[str]:
    having = {event.client_id for event in events}
    return [client for client in run.clients if client in having]


def _neuron_job(run: Run, job: JobLog) -> dict[str, Any]:
    """What is left of the target, and a heat map of neuron counts per client on one scale."""
    events = [event for _, event in sorted(job.grafts.items()) if _mixed(event)]
    most = max(max(event.neurons) for event in events)
    widths = sorted({event.width for event in events if event.width})

    def draw(client: str) -> str:
        own = [event for event in events if event.client_id == client]
        alt = f"Neurons taken from every expert for client {client}, by layer"
        return figures.count_panel([e.neurons for e in own], most, [e.layer for e in own], alt)

    return {
        "title": _title(run, job),
        "target": TARGETS.get(events[0].target, "the target"),
        "criterion": events[0].criterion,
        "is_correction": events[0].target == "correction",
        "left": _left_of_target(events),
        "most": most,
        "widths": " or ".join(map(str, widths)) if len(widths) < 3 else "",
        **_panels(_owners(run, events), draw),
    }


def _left_of_target(events: list[Grafted]) -> dict[str, str]:
    """Before and after the refit, on sequences that nothing was fitted to if some were held out."""
    held_out = any(event.unexplained.get("held_out_before") is not None for event in events)
    left = {"where": "nothing was fitted to" if held_out else "the graft was fitted to"}
    for when in ("before", "after"):
        found = (event.unexplained.get(f"held_out_{when}" if held_out else when) for event in events)
        shares = sorted(100 * value for value in found if value is not None)
        some = f"{statistics.median(shares):.1f} % ({shares[0]:.1f} to {shares[-1]:.1f})" if shares else ""
        left[when] = some
    return left


def _choices(run: Run) -> dict[str, Any] | None:
    """Grafts that are one expert as a whole. Only the first method is drawn: a control measured the same."""
    jobs = [
        job
        for job in run.jobs
        if any(event.candidates for event in job.grafts.values())
        and any(event.chosen is not None for event in job.grafts.values())
    ]
    if not jobs:
        return None
    first = list(jobs[0].grafts.values())
    chosen = [event for event in first if event.chosen is not None]
    return {
        "target": TARGETS.get(first[0].target, "the target"),
        "criteria": ", ".join(sorted({event.criterion for event in first if event.criterion})),
        "count": len(chosen),
        "worse": sum(map(worse_than_zero, chosen)),
        "unused": sum(map(little_used, chosen)),
        "jobs": [_choice_job(run, job, drawn=job.method == jobs[0].method) for job in jobs],
    }


def _choice_job(run: Run, job: JobLog, drawn: bool) -> dict[str, Any]:
    layers = sorted({layer for _, layer in job.grafts})
    clients = _owners(run, job.grafts.values())

    def measured(client: str) -> list[Grafted]:
        events = (job.grafts.get((client, layer)) for layer in layers)
        return [event for event in events if event and event.candidates]

    def draw(client: str) -> str:
        own = measured(client)
        alt = f"Residual of every expert for client {client}, by layer"
        return figures.heat_panel([e.candidates for e in own], [e.chosen for e in own], [e.layer for e in own], alt)

    return {
        "title": _title(run, job),
        "clients": clients,
        "rows": [(layer, [job.grafts.get((client, layer)) for client in clients]) for layer in layers],
        "folded": len(layers) * len(clients) > MAX_OPEN_CELLS,
        **_panels([client for client in clients if drawn and measured(client)], draw),
    }


def _openings(run: Run) -> list[Panel]:
    """One panel per method with a gate: mean opening over clients and seeds, a line per layer."""
    series: dict[str, dict[int, list[list[float]]]] = {}
    for job in run.jobs:
        for (at, _), event in job.trains.items():
            if event.opening:
                series.setdefault(job.method, {}).setdefault(at, []).append(event.opening)
    means: dict[str, list[list[float]]] = {}
    for method, by_round in series.items():
        layers = range(min(len(values) for lists in by_round.values() for values in lists))
        means[method] = [[statistics.fmean(v[i] for v in by_round[at]) for at in sorted(by_round)] for i in layers]
    highest = max((v for lines in means.values() for line in lines for v in line if math.isfinite(v)), default=0.0)
    panels = []
    for method, lines in means.items():
        label = run.rows[method].label
        alt = f"Mean opening of the gates of {label}, by layer and round"
        svg = figures.openness_panel(sorted(series[method]), lines, min(1.0, highest * 1.25) or 1.0, alt)
        panels.append(Panel(Markup(svg), label))
    return panels


def _sent(run: Run) -> dict[str, Any]:
    """The methods that sent or trained anything, with the bytes of a whole run and the tokens of one seed."""
    rows = []
    for row in run.summary:
        if row.bytes_per_round is None:
            continue
        jobs = run.jobs_of(row.method)
        totals = [sum((e.bytes_up or 0) + (e.bytes_down or 0) for e in job.trains.values()) for job in jobs]
        tokens = [job.done.tokens for job in jobs if job.done and job.done.tokens]
        rows.append((row, statistics.fmean(totals), statistics.fmean(tokens) if tokens else None))
    widest = max((max(row.bytes_per_round.values()) for row, _, _ in rows), default=0) or 1
    return {"rows": rows, "widest": widest}


def _arrays(run: Run) -> list[dict[str, Any]]:
    """The arrays of the messages by name. What is the same for several methods, seeds or directions is listed once."""
    words = {"up": "from a client to the server", "down": "from the server to a client"}
    by_content: dict[tuple[str, str], list[str]] = {}
    for method in run.rows:
        directions: dict[str, set[str]] = {}
        for job in run.jobs_of(method):
            for direction, tensors in job.sent.items():
                directions.setdefault(json.dumps(tensors), set()).add(direction)
        for content, ways in directions.items():
            where = "in both directions" if len(ways) == 2 else words[next(iter(ways))]
            by_content.setdefault((content, where), []).append(method)
    lists = []
    for (content, where), methods in by_content.items():
        tensors = json.loads(content)
        total = sum(tensor.get("bytes") or 0 for tensor in tensors)
        counted = {
            event.bytes_up if direction == "up" else event.bytes_down
            for method in methods
            for job in run.jobs_of(method)
            for direction, sent in job.sent.items()
            if json.dumps(sent) == content
            for event in job.trains.values()
        }
        other = sorted(counted - {None, total})
        lists.append({"methods": methods, "where": where, "tensors": tensors, "total": total, "counted": other})
    return lists


def _truncated(run: Run) -> list[Truncated]:
    most: dict[tuple[str, str], Truncated] = {}
    for event in run.events:  # counted once for the whole run, or once per seed
        if isinstance(event, Truncated) and event.count:
            key = (event.client_id, event.part)
            most[key] = max(event, most.get(key, event), key=lambda e: e.count)
    return [event for _, event in sorted(most.items())]
