"""What the grafts of a run are made of: the neurons taken from each expert, or the one expert that was copied."""

from __future__ import annotations

import statistics
from html import escape

from flex.report import figures
from flex.report.html import MAX_PANELS, Run, figure, folded, left_out, panels, section, table, table_row
from flex.report.numbers import Event, Job, little_used, worse_than_zero

TARGETS = {"output": "the layer's output", "correction": "the correction that the loss asks of the layer's output"}


def grafts(run: Run) -> list[str]:
    return [_of_neurons(run), _of_one_expert(run)]


def _of_neurons(run: Run) -> str:
    """Grafts of neurons of several experts (or of several whole ones)."""
    jobs = [job for job in run.jobs if any(map(_mixed, job.grafts.values()))]
    if not jobs:
        return ""
    first = next(filter(_mixed, jobs[0].grafts.values()))
    target = TARGETS.get(str(first.get("target")), "the target")
    intro = (
        f"Each client looks on its own data for what of all the layer's pretrained experts comes nearest to {target} "
        f"(criterion: {escape(str(first.get('criterion')))}); that is what its graft is made of. A cell is an expert: "
        "the darker, the more of its neurons are in the graft."
    )
    titles = [f"{run.rows[job.method]['label']}, seed {job.seed}" for job in jobs]
    blocks = [_neuron_job(run, job) for job in jobs]
    rest = "".join(folded(title, block) for title, block in zip(titles[1:], blocks[1:], strict=True))
    return section("What each layer's graft is made of", intro, f"<h3>{escape(titles[0])}</h3>{blocks[0]}", rest)


def _mixed(event: Event) -> bool:
    return event.get("chosen") is None and any(event.get("neurons") or ())


def _neuron_job(run: Run, job: Job) -> str:
    """What is left of the target, and a heat map of neuron counts per client on one scale."""
    events = {key: event for key, event in sorted(job.grafts.items()) if _mixed(event)}
    most = max(max(event["neurons"]) for event in events.values())
    widths = sorted({int(event["width"]) for event in events.values() if event.get("width")})
    colours = ",".join(figures.count_stops())
    of = f" of the {' or '.join(map(str, widths))} in a graft" if 0 < len(widths) < 3 else ""
    scale = (
        f'<div class="scale"><span>none</span><i style="background:linear-gradient(90deg,{colours})"></i>'
        f"<span>{most} neurons{of}</span></div>"
    )
    clients = [client for client in run.clients if any(client == owner for owner, _ in events)]
    pictures = []
    for client in clients[:MAX_PANELS]:
        own = [event for (owner, _), event in events.items() if owner == client]
        alt = f"Neurons taken from every expert for client {client}, by layer"
        svg = figures.count_panel([e["neurons"] for e in own], most, [e["layer"] for e in own], alt)
        pictures.append(figure(svg, client))
    return _left_of_target(list(events.values())) + scale + panels(pictures) + left_out(len(clients))


def _left_of_target(events: list[Event]) -> str:
    """Before and after the refit, on sequences that nothing was fitted to where some were held out."""
    held_out = any((event.get("unexplained") or {}).get("held_out_before") is not None for event in events)
    prefix, where = ("held_out_", "nothing was fitted to") if held_out else ("", "the graft was fitted to")
    shares = {}
    for when in ("before", "after"):
        found = [(event.get("unexplained") or {}).get(prefix + when) for event in events]
        shares[when] = sorted(value for value in found if value is not None)
    if not shares["before"]:
        return ""
    text = f"On sequences that {where}, the chosen parts as they are leave {_range(shares['before'])} of the target"
    if shares["after"]:
        text += f" unexplained, and {_range(shares['after'])} with their down projection refitted (before refit_scale)"
    else:
        text += " unexplained"
    text += "; median and range over clients and layers, 100 % is no better than nothing."
    if events[0].get("target") == "correction":
        text += (
            " A correction differs from token to token, so most of it stays; on a few held-out sequences the share can "
            "come out above 100 %."
        )
    return f'<p class="note">{escape(text)}</p>'


def _range(shares: list[float]) -> str:
    low, middle, high = (f"{100 * value:.1f}" for value in (shares[0], statistics.median(shares), shares[-1]))
    return f"{middle} % ({low} to {high})"


def _of_one_expert(run: Run) -> str:
    jobs = [job for job in run.jobs if any(event.get("candidates") for event in job.grafts.values())]
    jobs = [job for job in jobs if any(event.get("chosen") is not None for event in job.grafts.values())]
    if not jobs:
        return ""
    blocks = [_graft_job(run, job, drawn=job.method == jobs[0].method) for job in jobs]
    titles = [f"{run.rows[job.method]['label']}, seed {job.seed}" for job in jobs]
    criteria = sorted({str(event["criterion"]) for event in jobs[0].grafts.values() if event.get("criterion")})
    target = TARGETS.get(str(next(iter(jobs[0].grafts.values())).get("target", "output")), "the target")
    intro = (
        f"Each client measures on its own data how near each pretrained expert alone comes to {target}; it copies one "
        f"(criterion: {escape(', '.join(criteria))}) and trains the copy. The residual is the length of the error over "
        "the length of what is aimed at: 0 is a perfect stand-in, 1 is as bad as no expert at all, above 1 is worse. "
        "The share is the part of the layer's routing weight that the expert gets."
    )
    colours = ",".join(figures.residual_stops())
    scale = (
        f'<div class="scale"><span>≤ {figures.RESIDUAL_MIN} explains much</span>'
        f'<i style="background:linear-gradient(90deg,{colours})"></i>'
        f"<span>≥ {figures.RESIDUAL_MAX:.0f} (1, in the middle, is no better than nothing)</span>"
        f'<span><span class="ring"></span> the chosen one</span></div>'
    )
    first = f"<h3>{escape(titles[0])}</h3>{_choice_warning(run, jobs[0])}{scale}{blocks[0]}"
    rest = "".join(folded(title, block) for title, block in zip(titles[1:], blocks[1:], strict=True))
    return section("Which expert each layer grafted", intro, first, rest)


def _choice_warning(run: Run, job: Job) -> str:
    chosen = [event for event in job.grafts.values() if event.get("chosen") is not None]
    worse, unused = sum(map(worse_than_zero, chosen)), sum(map(little_used, chosen))
    parts = []
    if worse:
        parts.append(
            f"in {worse} of {len(chosen)} places even the chosen expert is worse than none (residual 1 or more)"
        )
    if unused:
        parts.append(f"in {unused} of {len(chosen)} the client's router gives it less than a quarter of an even share")
    if not parts:
        return ""
    text = "; ".join(parts)
    return f'<p class="warn">Be careful with this choice: {text}. Such places are marked ▲ below.</p>'


def _graft_job(run: Run, job: Job, drawn: bool) -> str:
    """Heat maps and chosen experts of one job. Only the first method is `drawn`: a control measured the same."""
    layers = sorted({layer for _, layer in job.grafts})
    clients = [client for client in run.clients if any(client == owner for owner, _ in job.grafts)]
    pictures = []
    for client in clients[:MAX_PANELS] if drawn else []:
        events = [job.grafts[client, layer] for layer in layers if (client, layer) in job.grafts]
        events = [event for event in events if event.get("candidates")]
        if events:
            svg = figures.heat_panel(
                [event["candidates"] for event in events],
                [event.get("chosen") for event in events],
                [event["layer"] for event in events],
                f"Residual of every expert for client {client}, by layer",
            )
            pictures.append(figure(svg, client))
    rows = []
    for layer in layers:
        cells = [f"<th scope=row>layer {layer}</th>"]
        cells += [_choice_cell(job.grafts.get((client, layer))) for client in clients]
        rows.append(table_row(cells))
    head = ["", *(f"{escape(client)}<br><small>expert · residual · share</small>" for client in clients)]
    choices = table(head, rows)
    if len(layers) * len(clients) > 80:
        choices = folded("The chosen experts in numbers", choices)
    return (panels(pictures) + left_out(len(clients)) if pictures else "") + choices


def _choice_cell(event: Event | None) -> str:
    if event is None or event.get("chosen") is None:
        return "<td>–</td>"
    residual, mass = event.get("residual"), event.get("routed_mass")
    parts = [
        f"<b>{escape(str(event['chosen']))}</b>",
        "–" if residual is None else f"<span{' class=warn' if worse_than_zero(event) else ''}>{residual:.2f}</span>",
        "–" if mass is None else f"<span{' class=warn' if little_used(event) else ''}>{100 * mass:.1f} %</span>",
    ]
    flag = '<span class="warn">▲</span> ' if worse_than_zero(event) or little_used(event) else ""
    return f"<td>{flag}{' · '.join(parts)}</td>"
