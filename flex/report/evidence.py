"""The evidence behind the numbers, section by section: clients, loss, grafts, gates, what was sent, what was cut."""

from __future__ import annotations

import json
import math
import statistics
from html import escape

from flex.report import figures
from flex.report.grafts import grafts
from flex.report.html import (
    MAX_PANELS,
    Run,
    cell,
    chip,
    dash,
    figure,
    folded,
    left_out,
    legend,
    method_cell,
    panels,
    section,
    table,
    table_row,
)
from flex.report.numbers import AFTER, Event, Job, format_bytes, format_count, measures, primary_measure

_DIRECTIONS = {"up": "from a client to the server", "down": "from the server to a client"}


def evidence(run: Run) -> list[str]:
    return [_per_client(run), _losses(run), *grafts(run), _openness(run), _sent(run), _truncated(run)]


def _per_client(run: Run) -> str:
    measure = primary_measure(run.summary)
    if measure is None or not run.clients:
        return ""
    blocks = []
    found = [m for m in measures(run.summary) if m.split == "test"]
    scores = {(job.method, job.seed): job.scores(AFTER) for job in run.jobs}
    for shown in sorted(found, key=lambda m: m != measure):
        rows = []
        for row in run.summary:
            by_seed = [scores[row["method"], seed].get(shown, {}) for seed in row["seeds"]]
            cells = [method_cell(run, row)]
            for client in run.clients:
                values = [by_client[client][0] for by_client in by_seed if client in by_client]
                cells.append(cell(shown.format(statistics.fmean(values)) if values else "–"))
            rows.append(table_row(cells, emphasised=row["method"] == "flex"))
        body = table([escape(shown.title), *map(escape, run.clients)], rows)
        blocks.append(body if shown == measure else folded(f"The same for {shown.title}", body))
    return section("Every client", "After aggregation, mean over seeds.", *blocks)


def _losses(run: Run) -> str:
    """One panel per client, one colour per method."""
    by_client: dict[str, dict[str, list[list[tuple[int, float]]]]] = {}
    for job in run.jobs:
        points: dict[str, list[tuple[int, float]]] = {}
        for (round_index, client), event in sorted(job.trains.items()):
            if event.get("loss") is not None and math.isfinite(event["loss"]):
                points.setdefault(client, []).append((round_index, event["loss"]))
        for client, line in points.items():
            by_client.setdefault(client, {}).setdefault(job.method, []).append(line)
    losses = [loss for lines in by_client.values() for seeds in lines.values() for line in seeds for _, loss in line]
    if not losses:
        return ""
    low, high = min(losses), max(losses)
    log = low > 0 and high / low > 12
    limits = (low / 1.15, high * 1.15) if log else (0.0, high * 1.06 or 1.0)
    shown = [client for client in run.clients if client in by_client]
    pictures = []
    for client in shown[:MAX_PANELS]:
        lines = [(run.marks[m], dash(m), seeds) for m, seeds in by_client[client].items()]
        alt = f"Training loss per round of client {client}"
        pictures.append(figure(figures.loss_panel(lines, limits, log, alt), client))
    methods = [method for method in run.rows if any(method in lines for lines in by_client.values())]
    intro = "Loss on a client's own training batches, mean over the local steps of a round." + (
        " Thin lines are seeds, the thick one is their mean." if any(len(run.jobs_of(m)) > 1 for m in methods) else ""
    )
    return section(
        "Training loss, round by round",
        intro + (" The axis is logarithmic." if log else ""),
        legend(run, methods),
        panels(pictures),
        left_out(len(shown)),
    )


def _openness(run: Run) -> str:
    """One panel per method with a gate: mean opening over clients and seeds, a line per layer."""
    series: dict[str, dict[int, list[list[float]]]] = {}
    for job in run.jobs:
        for (round_index, _), event in job.trains.items():
            if event.get("opening"):
                series.setdefault(job.method, {}).setdefault(round_index, []).append(event["opening"])
    if not series:
        return ""
    pictures, means = [], {}
    for method, by_round in series.items():
        num_layers = min(len(values) for lists in by_round.values() for values in lists)
        rounds = sorted(by_round)
        means[method] = (
            rounds,
            [[statistics.fmean(v[layer] for v in by_round[r]) for r in rounds] for layer in range(num_layers)],
        )
    openings = [value for _, layers in means.values() for line in layers for value in line if math.isfinite(value)]
    highest = max(openings, default=0.0)
    limit = min(1.0, highest * 1.25) or 1.0
    for method, (rounds, layers) in means.items():
        label = run.rows[method]["label"]
        svg = figures.openness_panel(rounds, layers, limit, f"Mean opening of the gates of {label}, by layer and round")
        pictures.append(figure(svg, label))
    intro = (
        "Every token passes a gate that says how much of the private module is added, from 0 % (shut: the pretrained "
        "model) to 100 %. Mean over the training tokens of a round, over clients and seeds. A line is a layer; its "
        "number stands at the end."
    )
    return section("How far the gates open", intro, panels(pictures, wide=True))


def _sent(run: Run) -> str:
    rows, lists = [], []
    widest = (
        max((max(row["bytes_per_round"].values()) for row in run.summary if row["bytes_per_round"]), default=0) or 1
    )
    for row in run.summary:
        method, per_round = row["method"], row["bytes_per_round"]
        if per_round is None:
            continue
        jobs = run.jobs_of(method)
        totals = [
            sum((e.get("bytes_up") or 0) + (e.get("bytes_down") or 0) for e in job.trains.values()) for job in jobs
        ]
        cells = [method_cell(run, row)]
        for way in ("up", "down"):
            width = 100 * per_round[way] / widest
            bar = f'<span class="bar" style="width:{width:.1f}%;background:var(--mark-{run.marks[method]})"></span>'
            cells.append(f"<td class=text>{format_bytes(per_round[way])}{bar}</td>")
        cells.append(cell(format_bytes(statistics.fmean(totals))))
        cells.append(cell("–" if row["seconds"] is None else f"{row['seconds']:.0f} s"))
        tokens = [job.done["tokens"] for job in jobs if job.done and job.done.get("tokens")]
        cells.append(cell(format_count(statistics.fmean(tokens)) if tokens else "–"))
        rows.append(table_row(cells))
        lists.append(_tensor_lists(run, method, jobs))
    if not rows:
        return ""
    head = ["Method", "clients → server,<br>per round", "server → clients,<br>per round", "both ways,<br>whole run"]
    head += ["time<br>of one seed", "tokens<br>of one seed"]
    intro = (
        "All clients together, counted on the arrays of the messages. Beside the arrays listed below, an answer of a "
        "client carries only a few numbers about its turn: how many examples it has, its scores, how far its gates "
        "opened, its time. Nothing else left a client: no example, no private expert, no weight of a gate."
    )
    return section("What was sent", intro, table(head, rows, text_columns=(1, 2)), *lists)


def _tensor_lists(run: Run, method: str, jobs: list[Job]) -> str:
    """The arrays of a message by name, one list for all seeds where they are the same."""
    label = run.rows[method]["label"]
    if jobs and all(job.sent and not any(job.sent.values()) for job in jobs):
        return f'<p class="note">{chip(run, method)}{escape(label)}: no array, in neither direction.</p>'
    lists: dict[str, set[str]] = {}  # the same list for several seeds, or for both directions, is shown once
    for job in jobs:
        for direction, tensors in job.sent.items():
            lists.setdefault(json.dumps(tensors), set()).add(direction)
    blocks = []
    for text, directions in lists.items():
        tensors = json.loads(text)
        total = sum(tensor.get("bytes") or 0 for tensor in tensors)
        words = "in both directions" if len(directions) == 2 else _DIRECTIONS[next(iter(directions))]
        title = f"{label}, {words}: {len(tensors)} arrays, {format_bytes(total)} a message"
        rows = [
            table_row(
                [
                    f"<td class=text><code>{escape(str(tensor['name']))}</code></td>",
                    cell(" × ".join(map(str, tensor.get("shape") or ())) or "one number"),
                    cell(tensor.get("dtype") or ""),
                    cell(format_bytes(tensor.get("bytes"))),
                ]
            )
            for tensor in tensors
        ]
        warnings = "".join(_mismatch(jobs, direction, total) for direction in sorted(directions))
        blocks.append(warnings + folded(title, table(["Name", "shape", "dtype", "size"], rows)))
    return "".join(blocks)


def _mismatch(jobs: list[Job], direction: str, total: int) -> str:
    """The list and the counters come from different places; a reader is told if they do not agree."""
    counted = {e.get(f"bytes_{direction}") for job in jobs if direction in job.sent for e in job.trains.values()} - {
        None
    }
    if counted <= {total}:
        return ""
    seen = ", ".join(format_bytes(count) for count in sorted(counted)[:4])
    return f'<p class="warn">The list below sums to {format_bytes(total)}, but messages of {seen} were counted.</p>'


def _truncated(run: Run) -> str:
    most: dict[tuple[str, str], Event] = {}
    for event in run.events:  # counted once for the whole run, or once a seed
        if event["event"] == "truncated":
            key = (str(event["client_id"]), str(event["part"]))
            most[key] = max(event, most.get(key, event), key=lambda e: e["count"])
    rows = [
        table_row(
            [
                f"<th scope=row>{escape(client)}</th>",
                cell(part, "text"),
                cell(event["count"]),
                cell(event.get("max_length") or "–"),
            ]
        )
        for (client, part), event in sorted(most.items())
        if event["count"]
    ]
    if not rows:
        return section("Examples cut for length", "", "<p>None, as far as this run reports.</p>")
    intro = (
        "Longer than the limit, so part of the example was left out. The answer to a cut test question cannot be exact."
    )
    return section(
        "Examples cut for length", intro, table(["Client", "part", "examples", "limit (tokens)"], rows, (1,))
    )
