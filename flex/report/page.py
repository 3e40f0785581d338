"""The report as one HTML page: what its sections show, where that takes more than reading a number. The words and the
order of the page are in `report.html.j2`, which escapes whatever is put into it; only drawings enter as markup."""

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
from flex.report import figures, layers, numbers
from flex.report.findings import differences, findings, format_p
from flex.report.numbers import JobLog, Measure, Row
from flex.store.events import (
    BASE_ALONE,
    BEFORE,
    UPDATE_ALONE,
    Event,
    Grafted,
    RunStarted,
    Secured,
    Trained,
    Truncated,
)

FOLDER = Path(__file__).parent
STYLE = FOLDER / "report.css"
SENTENCES_IN_VERDICT = 4  # the others stand below the picture, so that table and picture are on the first screen
MAX_PANELS = 16  # small multiples beyond this are left out, and the page says how many
MAX_OPEN_CELLS = 80  # a longer table of choices is folded
WAYS = {"up": "from a client to the server", "down": "from the server to a client"}
OTHER_MARKS = 3  # the last colours, for methods that METHODS does not know
VARIANTS = [method for method, row in METHODS.items() if row.control_of or row.strategy]
TARGETS = {"output": "the layer's output", "correction": "the correction that the loss asks of the layer's output"}


@dataclass(frozen=True)
class Run:
    """What the sections are made from."""

    events: list[Event]
    config_text: str = ""

    @cached_property
    def summary(self) -> list[Row]:
        return numbers.summarise(self.events)

    @cached_property
    def rows(self) -> dict[str, Row]:
        return {row.method: row for row in self.summary}

    @property
    def main(self) -> Row | None:
        return self.rows.get(MAIN)

    @cached_property
    def jobs(self) -> list[JobLog]:
        return [job for row in self.summary for job in row.jobs]

    @cached_property
    def measures(self) -> list[Measure]:
        return numbers.measures(self.summary)

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


class Panel(NamedTuple):
    svg: Markup
    caption: str
    remark: str = ""


def environment() -> Environment:
    """How this folder's templates are read."""
    return Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def page(run: Run) -> str:
    """The whole document."""
    env = environment()
    env.filters |= {"size": numbers.format_bytes, "count": numbers.format_count, "prose": _prose}
    env.filters |= {
        "heading": heading,
        "round_heading": lambda at: f"round {at}",
        "labels": lambda methods: ", ".join(run.rows[m].label for m in methods),
    }
    env.tests |= {"worse_than_zero": numbers.worse_than_zero, "little_used": numbers.little_used}
    env.globals |= {
        "BEFORE": BEFORE,
        "averaged": METHODS[AVERAGED].label,
        "best_methods": numbers.best_methods,
        "best_of_clients": best_of_clients,
        "client_mean": client_mean,
        "dash": dash,
        "differences": differences,
        "format_p": format_p,
        "figures": figures,
    }
    said, primary = findings(run.summary), numbers.primary_measure(run.summary)
    sent = [row for row in run.summary if row.bytes_per_round]
    return env.get_template("report.html.j2").render(
        run=run,
        style=Markup(STYLE.read_text(encoding="utf-8")),
        verdict=said[:SENTENCES_IN_VERDICT],
        more=said[SENTENCES_IN_VERDICT:],
        strategy="" if run.strategy == AVERAGED else run.strategy,
        before=numbers.measures(run.summary, BEFORE),
        per_client=sorted((m for m in run.measures if m.split == "test"), key=lambda m: m != primary),
        compared=_compared(run),
        rates=_rates(run),
        bars=[_bars(run, measure) for measure in _compared(run)],
        clients=_clients(run),
        losses=_losses(run),
        neurons=[_neuron_job(run, job) for job in run.jobs if any(map(_mixed, job.grafts.values()))],
        choices=_choices(run),
        openings=_openings(run),
        routing=layers.routing(_main_first(run)),
        additions=_additions(run),
        costs=layers.costs(_main_first(run)),
        sent=[(row, _total_bytes(row)) for row in sent],
        took=[(row, own) for row in run.summary if (own := _rounds(row))],
        widest=max((max(row.bytes_per_round.values()) for row in sent), default=0) or 1,
        arrays=_arrays(run),
        byte_groups=_byte_groups(run),
        truncated=_truncated(run),
        updates=_updates(run),
        alone=_alone(run),
        secured=[(job, _over_masked(list(job.secured.values()))) for job in run.jobs if job.secured],
        excluded=[(job, event) for job in run.jobs for _, event in sorted(job.left_out.items())],
        limited=[(job, event) for job in run.jobs for _, event in sorted(job.limited.items())],
    )


def dash(method: str) -> int:
    """Line style, so that no reading depends on colour alone: 1, 2, 3 in turn for variants, 0 for the others."""
    return VARIANTS.index(method) % 3 + 1 if method in VARIANTS else 0


def _prose(text: str) -> str:
    """A number is not torn from its spread or its unit at the end of a line."""
    return text.replace(" ± ", "\u00a0±\u00a0").replace(" %", "\u00a0%")


def heading(measure: Measure) -> str:
    """The title of a column, the name of the measure on a line of its own."""
    return f"{measure.where}\n{measure.kind.title}"


def client_mean(row: Row, measure: Measure, client: str) -> float | None:
    """One client's score after aggregation, mean over seeds."""
    by_seed = [scores.get(measure, {}) for scores in row.by_client]
    values = [by_client[client][0] for by_client in by_seed if client in by_client]
    return statistics.fmean(values) if values else None


def best_of_clients(run: Run, measure: Measure) -> dict[str, set[str]]:
    """Client -> the methods that are best for it; several where they print alike."""
    return {
        client: numbers.best({row.method: client_mean(row, measure, client) for row in run.summary}, measure)
        for client in run.clients
    }


def _panels(clients: Sequence[str], draw: Callable[[str], str]) -> dict[str, Any]:
    """One picture per client, as many as are drawn."""
    return {
        "panels": [Panel(Markup(draw(client)), client) for client in clients[:MAX_PANELS]],
        "left_out": max(0, len(clients) - MAX_PANELS),
    }


def _compared(run: Run) -> list[Measure]:
    """The measures of the first table: one of forgetting is enough there."""
    forgetting = [m for m in run.measures if m.split == "general"]
    return [m for m in run.measures if m not in forgetting[1:]]


def _rates(run: Run) -> list[tuple[str, dict[str, float], str]]:
    """(label, learning rates, how they were chosen) of every method whose log says its rates."""
    try:
        settings = tomllib.loads(run.config_text)
        train, etas = settings.get("train", {}), settings.get("strategy", {}).get("etas", {})
        rates, by = train.get("rates", {}), str(train.get("tune_by", "loss")).replace("_", " ")
    except (tomllib.TOMLDecodeError, AttributeError):
        rates, etas, by = {}, {}, ""
    found = []
    for row in run.summary:
        chosen = [f"{rates[row.method]:.3g} times the configured rate"] if row.method in rates else []
        chosen += [f"a step of {etas[row.method]:.3g} on the server"] if row.method in etas else []
        if row.learning_rates:
            said = f"{', '.join(chosen)}, by the validation {by}" if chosen else "as configured"
            found.append((row.label, row.learning_rates, said))
    return found


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


def _clients(run: Run) -> list[dict[str, Any]]:
    """What the header says of each client; sizes by the events where it says none, as while a run goes on."""
    known = {str(client["client_id"]): client for client in run.header.clients}
    sizes: dict[str, dict[str, int | None]] = {client: {} for client in run.clients}
    for job in run.jobs:
        for (_, client), trained in job.trains.items():
            sizes[client]["num_train"] = trained.num_examples
        for (_, client, _, split), scored in job.evaluations.items():
            if split == "test":
                sizes[client]["num_test"] = scored.num_examples
    empty = {"num_train": None, "num_test": None, "description": ""}
    return [empty | sizes[client] | known.get(client, {}) | {"client_id": client} for client in run.clients]


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
    several = any(len(run.rows[method].jobs) > 1 for method in methods)
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
        "worse": sum(map(numbers.worse_than_zero, chosen)),
        "unused": sum(map(numbers.little_used, chosen)),
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


def _main_first(run: Run) -> list[Row]:
    """The others are folded where one table would be too long."""
    return sorted(run.summary, key=lambda row: row is not run.main)


def _additions(run: Run) -> list[dict[str, Any]]:
    """What grafts add; drawn, a line a layer, where it was measured in several rounds."""
    found = layers.additions(_main_first(run))
    for own in found:
        rounds, lines = own["rounds"], []
        for by_round in own["layers"].values():
            lines.append([by_round[at][0] if at in by_round else math.nan for at in rounds])
        highest = max((v for line in lines for v in line if math.isfinite(v)), default=0.0)
        alt = f"What the grafts of {own['row'].label} add, by layer and round"
        drawn = len(rounds) > 1 and all(math.isfinite(v) for line in lines for v in line)
        svg = Markup(figures.openness_panel(rounds, lines, highest * 1.25 or 1.0, alt)) if drawn else None
        own["panel"] = svg and Panel(svg, own["row"].label, "added, of the layer's output")
    return found


def _alone(run: Run) -> dict[str, Any] | None:
    """What a client's update knows without what is private, between the base and the client itself."""
    rows = [row for row in run.summary if row.scores[UPDATE_ALONE]]
    if not rows:
        return None
    asked = [m for m in numbers.measures(rows, UPDATE_ALONE) if m.split == "test" and m.kind.is_share]
    lines = [(None, "the base as it came", rows[0].scores[BASE_ALONE])]
    for row in rows:
        lines += [(row, "update alone", row.scores[UPDATE_ALONE]), (row, "the client itself", row.before)]
    return {"measures": asked, "lines": lines}


def _updates(run: Run) -> list[dict[str, Any]]:
    """The lengths of the clients' updates, method by method and seed by seed: over the rounds, and every round."""
    found = []
    for job in run.jobs:
        by_client: dict[str, list[Trained]] = {}
        for _, event in sorted(job.trains.items()):
            if event.update_norm is not None:
                by_client.setdefault(event.client_id, []).append(event)
        if by_client:
            clients = [client for client in run.clients if client in by_client]
            found.append(
                {
                    "title": _title(run, job),
                    "rounds": sorted({event.round for events in by_client.values() for event in events}),
                    "clients": {client: _over_rounds(by_client[client]) for client in clients},
                    "events": {(e.round, client): e for client, events in by_client.items() for e in events},
                }
            )
    return found


def _over_masked(rounds: list[Secured]) -> dict[str, Any]:
    errors = [event.error for event in rounds if event.error is not None]
    seconds = [event.seconds for event in rounds if event.seconds is not None]
    return {
        "rounds": len(rounds),
        "sites": f"{min(event.sites for event in rounds)} to {max(event.sites for event in rounds)}",
        "dropped": sum(len(event.dropped) for event in rounds),
        "error": max(errors, default=None),
        "seconds": statistics.fmean(seconds) if seconds else None,
    }


def _rounds(row: Row) -> dict[str, float | None]:
    """What a round took: seconds by their medians over rounds and seeds, bytes of memory at most; empty where no log
    says it."""
    found = [event for job in row.jobs for event in job.exchanged.values()]
    if not found:
        return {}
    peaks = [event.peak_bytes for job in row.jobs for event in job.trains.values() if event.peak_bytes]
    return {
        "seconds": statistics.median(event.seconds for event in found),
        "turns": statistics.median(event.turn_seconds for event in found),
        "beyond": statistics.median(event.seconds - event.turn_seconds for event in found),
        "server": max(event.peak_bytes for event in found),
        "client": max(peaks, default=None),
    }


def _over_rounds(events: list[Trained]) -> dict[str, float | None]:
    norms = [event.update_norm for event in events]
    cosines = [event.update_cosine for event in events if event.update_cosine is not None]
    cosine = statistics.median(cosines) if cosines else None
    return {"median": statistics.median(norms), "low": min(norms), "high": max(norms), "cosine": cosine}


def _total_bytes(row: Row) -> float:
    """Both ways in a whole run, mean over seeds."""
    trains = [event for job in row.jobs for event in job.trains.values()]
    return sum((event.bytes_up or 0) + (event.bytes_down or 0) for event in trains) / len(row.jobs)


def _arrays(run: Run) -> dict[str, Any]:
    """The arrays of the messages by name, each listed once however many methods, seeds or directions send it.

    Beside them: methods of whose messages the arrays do not come to the bytes counted, and those that send none.
    """
    ways_of: dict[str, dict[str, set[str]]] = {}  # array -> method -> directions
    totals: dict[tuple[str, str, int], int] = {}  # method, direction, seed -> bytes of a message
    silent: dict[str, set[str]] = {}
    for method, row in run.rows.items():
        for job in row.jobs:
            for way, tensors in job.sent.items():
                totals[method, way, job.seed] = sum(tensor.get("bytes") or 0 for tensor in tensors)
                if not tensors:
                    silent.setdefault(method, set()).add(way)
                for tensor in tensors:
                    ways_of.setdefault(json.dumps(tensor), {}).setdefault(method, set()).add(way)
    lists: dict[tuple, list[dict[str, Any]]] = {}
    for content, by_method in ways_of.items():
        lists.setdefault(_senders(by_method, "in both directions"), []).append(json.loads(content))
    wrong: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for (method, way, seed), total in totals.items():
        trains = next(job for job in run.rows[method].jobs if job.seed == seed).trains.values()
        counted = {event.bytes_up if way == "up" else event.bytes_down for event in trains}
        if other := tuple(sorted(counted - {None, total})):
            wrong.setdefault((total, other), []).append(method)
    return {
        "lists": [
            {"senders": senders, "tensors": tensors, "total": sum(tensor.get("bytes") or 0 for tensor in tensors)}
            for senders, tensors in lists.items()
        ],
        "wrong": [
            {"methods": list(dict.fromkeys(methods)), "total": total, "counted": counted}
            for (total, counted), methods in wrong.items()
        ],
        "silent": _senders(silent, "in neither direction"),
    }


def _senders(ways: dict[str, set[str]], both: str) -> tuple[tuple[tuple[str, ...], str], ...]:
    """Methods by the directions in which they do it, in words."""
    by_words: dict[str, list[str]] = {}
    for method, directions in ways.items():
        by_words.setdefault(both if len(directions) == 2 else WAYS[min(directions)], []).append(method)
    return tuple((tuple(methods), words) for words, methods in by_words.items())


def _byte_groups(run: Run) -> list[tuple[str, str, str, int, int]]:
    """(method, direction, group, how many tensors, their bytes) of one client's message."""
    lines = []
    for row in run.summary:
        sent = next((job.sent for job in row.jobs if job.sent), {})
        for direction, tensors in sorted(sent.items(), reverse=True):
            lines += [(row.label, direction, name, *own) for name, own in numbers.byte_groups(tensors).items()]
    return lines


def _truncated(run: Run) -> list[Truncated]:
    most: dict[tuple[str, str], Truncated] = {}
    for event in run.events:  # counted once for the whole run, or once per seed
        if isinstance(event, Truncated) and event.count:
            key = (event.client_id, event.part)
            most[key] = max(event, most.get(key, event), key=lambda e: e.count)
    return [event for _, event in sorted(most.items())]
