"""The report as one HTML page. First what came out (verdict, table, picture, differences), then what the run was; the
evidence behind the numbers follows from report_evidence.py."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

from flex.report import figures
from flex.report.evidence import evidence
from flex.report.findings import Difference, difference, findings
from flex.report.html import Row, Run, cell, figure, folded, method_cell, panels, section, stat_cell, table, table_row
from flex.report.numbers import AFTER, BEFORE, Measure, format_bytes, format_count, measures

STYLE = Path(__file__).with_name("report.css")
SENTENCES_IN_VERDICT = (
    4  # the other findings stand below the picture, so that table and picture are on the first screen
)

VERDICT_WORDS = {
    "better": "better",
    "ahead": "not settled",
    "level": "level",
    "behind": "not settled",
    "worse": "worse",
    "open": "not judged",
}


def page(run: Run) -> str:
    """The whole document."""
    title = str(run.header.get("title") or "FLEx run")
    said = findings(run.summary)
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="sub">{_subtitle(run)}</p>',
        _verdict(said[:SENTENCES_IN_VERDICT]),
        _comparison(run),
        _more_findings(run, said[SENTENCES_IN_VERDICT:]),
        _before_and_after(run),
        _what_this_was(run),
        *evidence(run),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}: FLEx report</title><style>{STYLE.read_text(encoding='utf-8')}</style></head>\n"
        "<body><main>" + "\n".join(part for part in body if part) + "</main></body></html>\n"
    )


def _subtitle(run: Run) -> str:
    rounds = max((job.num_rounds or 0 for job in run.jobs), default=0)
    seeds = {job.seed for job in run.jobs}
    parts = [
        _count(len(run.clients), "client"),
        _count(rounds, "round") if rounds else "",
        _count(len(seeds), "seed"),
        f"aggregated by {run.strategy} wherever FedAvg is named" if run.strategy not in ("", "fedavg") else "",
        "" if all(row["finished"] for row in run.summary) else "not finished",
    ]
    what = "Clients fine-tune one Mixture-of-Experts model together; their data and their private experts stay at home."
    return f"{what} {escape(' · '.join(part for part in parts if part))}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _verdict(sentences: list[str]) -> str:
    return '<section class="verdict">' + "".join(f"<p>{_prose(text)}</p>" for text in sentences) + "</section>"


def _prose(text: str) -> str:
    """Escaped, and a number is not torn from its spread or its unit at the end of a line."""
    return escape(text).replace(" ± ", "\u00a0±\u00a0").replace(" %", "\u00a0%")


def _comparison(run: Run) -> str:
    found = measures(run.summary)
    if not found:
        return ""
    forgetting = [m for m in found if m.split == "general"]
    found = [m for m in found if m not in forgetting[1:]]  # one measure of forgetting is enough here
    head = ["Method", *(escape(m.title) for m in found)]
    head += ["sent up<br>per round", "trained: shared<br>+ private"]
    rows = []
    for row in run.summary:
        sent, trained = row["bytes_per_round"], row["trained_parameters"]
        cells = [method_cell(run, row), *(stat_cell(m, row[AFTER].get(m)) for m in found)]
        cells.append(cell(format_bytes(sent["up"]) if sent else "–"))
        both = [format_count(trained.get(part) or 0) for part in ("shared", "personal")] if trained else []
        cells.append(cell(" + ".join(both) or "–"))
        rows.append(table_row(cells, emphasised=row["method"] == "flex"))
    several = any(len(row["seeds"]) > 1 for row in run.summary)
    spread = " ± is the standard deviation over seeds." if several else " One seed: no spread."
    note = (
        "Scores of the last round, after aggregation (the averaged weights plus what a client keeps to itself), each "
        f"client on its own test questions, plain mean over clients.{spread} EM: share of answers that are right to "
        "the last token. "
        "General: questions that belong to no client; what is lost there against the base model was forgotten."
    )
    pictures = panels(_bars(run, m) for m in found)
    methods = "".join(f"<dt>{escape(r['label'])}</dt><dd>{escape(r['about'])}</dd>" for r in run.summary if r["about"])
    explained = f"<h3>The methods</h3><dl>{methods}</dl>" if methods else ""
    return section("Comparison", "", table(head, rows), pictures, f'<p class="note">{escape(note)}</p>', explained)


def _bars(run: Run, measure: Measure) -> str:
    rows = [row for row in run.summary if measure in row[AFTER]]
    scale = 1 if measure.name == "loss" else 100
    stats = [row[AFTER][measure] for row in rows]
    values = [[scale * value for value in stat["values"].values()] for stat in stats]
    finite = [value for seeds in values for value in seeds if math.isfinite(value)]
    longest = sorted((max(seeds, default=0.0) for seeds in values if all(map(math.isfinite, seeds))), reverse=True)
    limit = max(finite, default=0.0) or 1.0
    # The loss of one method, mostly the base, would make the others' bars too short to compare.
    cut = measure.name == "loss" and len(longest) > 2 and longest[0] > 3 * longest[1] > 0
    if cut:
        limit = 1.3 * longest[1]
    svg = figures.comparison_panel(
        [row["label"] for row in rows],
        [run.marks[row["method"]] for row in rows],
        values,
        [measure.format(stat["mean"]) for stat in stats],
        limit,
        f"{measure.title} by method: "
        + ", ".join(f"{row['label']} {measure.format(stat['mean'])}" for row, stat in zip(rows, stats, strict=True)),
    )
    direction = "higher is better" if measure.higher_is_better else "lower is better"
    dots = ", a dot is a seed" if any(len(seeds) > 1 for seeds in values) else ""
    return figure(svg, measure.title, direction + (", longest bar cut" if cut else dots))


def _more_findings(run: Run, sentences: list[str]) -> str:
    items = "".join(f"<li>{_prose(text)}</li>" for text in sentences)
    differences = _differences(run)
    if not items and not differences:
        return ""
    return section("What else the numbers say", "", f"<ul>{items}</ul>" if items else "", differences)


def _differences(run: Run) -> str:
    """FLEx minus every other method, seed by seed."""
    main = run.rows.get("flex")
    others = [row for row in run.summary if row["method"] != "flex"]
    if main is None or not others:
        return ""
    found = [measure for measure in measures(run.summary) if measure in main[AFTER]]
    rows = [
        table_row([method_cell(run, row), *(_difference_cell(difference(main, row, m)) for m in found)])
        for row in others
    ]
    note = (
        "Mean and standard deviation of the differences over the seeds that both have; after the word, in how many of "
        "these seeds FLEx is ahead. The noise is the larger of that deviation and the sampling error of the test set. "
        "Up to once the noise two methods are level; beyond twice the noise, with the same sign in every seed, FLEx is "
        "better or worse; between them it is not settled. A loss has no sampling error here: with two seeds, do not "
        "lean on its verdict."
    )
    body = table(["FLEx minus …", *(escape(m.title) for m in found)], rows)
    return f'<h3>Paired differences</h3>{body}<p class="note">{note}</p>'


def _difference_cell(found: Difference | None) -> str:
    if found is None:
        return "<td>–</td>"
    kind = found.verdict if found.verdict in ("better", "worse") else ""
    word = f"<small class={kind or 'plain'}>{VERDICT_WORDS[found.verdict]} · {found.ahead}/{found.num_seeds}</small>"
    return f"<td>{escape(str(found))}<br>{word}</td>"


def _before_and_after(run: Run) -> str:
    """Both sets of weights that a client can be scored with, for the methods that were scored with both."""
    found = [m for m in measures(run.summary) if any(m in row[BEFORE] for row in run.summary)]
    rows = []
    for row in run.summary:
        if row["method"] == "base" or not row[BEFORE] or not row[AFTER]:
            continue
        for when, words in ((BEFORE, "before"), (AFTER, "after")):
            name = method_cell(run, row) if when == BEFORE else "<th></th>"
            rows.append(table_row([name, cell(words, "text"), *(stat_cell(m, row[when].get(m)) for m in found)]))
    intro = (
        "Before: the client's own weights after its last local steps. After: the averaged weights together with what "
        "the client keeps private. They can differ much, so a score means little without saying which of the two it is."
    )
    if not rows:
        return ""
    head = ["Method", "aggregation", *(escape(m.title) for m in found)]
    return section("Before and after aggregation", intro, table(head, rows, text_columns=(1,)))


def _what_this_was(run: Run) -> str:
    header = run.header
    versions = ", ".join(f"{name} {version}" for name, version in (header.get("versions") or {}).items())
    rounds = sorted({job.num_rounds for job in run.jobs if job.num_rounds})
    facts = {
        "Base model": header.get("base_model"),
        "Prompt template": header.get("template"),
        "Aggregation": run.strategy,
        "Rounds": ", ".join(map(str, rounds)),
        "Seeds": ", ".join(map(str, sorted({job.seed for job in run.jobs}))),
        "Started": min((job.info["started"] for job in run.jobs if job.info and job.info.get("started")), default=None),
        "Threads": header.get("threads"),
        "Versions": versions,
    }
    items = "".join(f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items() if value)
    return section(
        "What this run was",
        "",
        f"<dl>{items}</dl>" if items else "",
        _clients(run),
        folded("Configuration (config.toml)", f"<pre>{escape(run.config_text)}</pre>" if run.config_text else ""),
    )


def _clients(run: Run) -> str:
    declared: dict[str, Row] = {str(client["client_id"]): client for client in run.header.get("clients") or []}
    trained = {client: event.get("num_examples") for job in run.jobs for (_, client), event in job.trains.items()}
    tested = {
        client: event.get("num_examples")
        for job in run.jobs
        for (_, client, _, split), event in job.evaluations.items()
        if split == "test"
    }
    rows = []
    for client in run.clients:
        known = declared.get(client, {})
        sizes = (known.get("num_train", trained.get(client)), known.get("num_test", tested.get(client)))
        numbers = [cell("–" if size is None else f"{size:,}".replace(",", " ")) for size in sizes]
        rows.append(
            table_row([f"<th scope=row>{escape(client)}</th>", *numbers, cell(known.get("description") or "", "text")])
        )
    head = ["Client", "training<br>examples", "test<br>examples", "what it holds"]
    return f"<h3>Clients</h3>{table(head, rows, text_columns=(3,))}" if rows else ""
