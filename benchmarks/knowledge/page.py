"""From the jobs to `benchmarks/results/knowledge.json`, and from that to the tables and pictures of the page.

Differences are paired by seed and client, with the p-value of the sign-flip test, as in `benchmarks.study.page`.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.knowledge.cells import CELLS, CHOOSING, DEFAULT, DEMO, TEST
from benchmarks.knowledge.jobs import log_of
from benchmarks.pages import kept_rows, plain, svg, write_between
from benchmarks.study.page import format_p, paired, seed_means
from flex.demo.data import OWN_CONVENTIONS, SHARED_SKILL, TAUGHT_OTHERWISE, UNTOUCHED
from flex.evaluation.paired import Pair, sign_flip
from flex.methods import METHODS
from flex.store.events import AFTER, Done, Evaluated, read_events

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "knowledge.json"
PAGE = ROOT / "docs" / "knowledge.md"
PICTURE = "pictures/knowledge-front.svg"
BEGIN, END = "<!-- made by benchmarks.knowledge: begin -->", "<!-- end -->"
COLUMNS = (OWN_CONVENTIONS, SHARED_SKILL, "general", TAUGHT_OTHERWISE, UNTOUCHED)
COMPARED = (OWN_CONVENTIONS, UNTOUCHED)  # what a verdict is of
GOAL_KEPT, GOAL_LOST, GOAL_P, GOAL_AHEAD = 0.95, 1.0, 0.05, 5

Scores = dict[str, dict[str, dict[Pair, float]]]  # cell -> column -> (seed, client) -> exact match %


def collect(out: Path) -> list[dict]:
    """The scores of every finished job, client by client, after aggregation: shares in [0, 1], losses in nats."""
    rows = []
    for name in CELLS:
        for folder in sorted((out / name).glob("seed*")):
            seed = int(folder.name.removeprefix("seed"))
            events = read_events(log_of(name, seed, out) / "metrics.jsonl")
            if not any(isinstance(event, Done) for event in events):
                continue
            scored = [event for event in events if isinstance(event, Evaluated) and event.when == AFTER]
            last = max(event.round for event in scored)
            clients: dict[str, dict] = defaultdict(dict)
            for event in (event for event in scored if event.round == last):
                groups = {group: part["exact_match"] for group, part in event.groups.items()}
                own = {event.split: event.exact_match, f"{event.split} loss": event.loss, **groups}
                clients[event.client_id] |= {key: round(value, 5) for key, value in own.items()}
            rows += [{"cell": name, "seed": seed, "client": client, **own} for client, own in sorted(clients.items())]
    return rows


def scores_of(rows: Sequence[dict], seeds: Sequence[int]) -> Scores:
    scores: Scores = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["seed"] in seeds:
            for column in COLUMNS:
                scores[row["cell"]][column][row["seed"], row["client"]] = 100 * row[column]
    return scores


def mean(scores: dict[Pair, float]) -> float:
    return float(np.mean(seed_means(scores)))


def lead(mine: dict[Pair, float], other: dict[Pair, float]) -> tuple[float, float, int, int]:
    """(mean difference, p-value, seeds in which it is positive, seeds) over the pairs that both have."""
    differences, by_seed = paired(mine, other)
    return float(differences.mean()), sign_flip(differences), sum(v > 0 for v in by_seed.values()), len(by_seed)


def format_lead(mine: dict[Pair, float], other: dict[Pair, float]) -> str:
    if not mine.keys() & other.keys():
        return ""
    difference, p, ahead, seeds = lead(mine, other)
    return f"{difference:+.1f}, p {format_p(p)}, {ahead} of {seeds}"


def all_scores(scores: Scores) -> list[str]:
    """Every cell that has been run, and what its anchor does to the same method's own conventions."""
    head = ["", "seeds", *COLUMNS, "kept of the base's untouched, %", "own conventions over no anchor"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in (name for name in CELLS if name in scores):
        means = {column: seed_means(scores[name][column]) for column in COLUMNS}
        cells = [CELLS[name].title, str(len(means[UNTOUCHED]))]
        for column in COLUMNS:
            spread = f" ± {np.std(means[column], ddof=1):.1f}" if len(means[column]) > 1 else ""
            cells.append(f"{np.mean(means[column]):.1f}{spread}")
        cells.append(f"{100 * share_kept(scores, name):.1f}" if "base" in scores else "")
        plain = CELLS[name].method
        cells.append(
            "" if name == plain or plain not in scores
            else format_lead(scores[name][OWN_CONVENTIONS], scores[plain][OWN_CONVENTIONS])
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def share_kept(scores: Scores, name: str) -> float:
    """Of the base's exact match on untouched skills, over the seeds that both have."""
    mine, base = scores[name][UNTOUCHED], scores["base"][UNTOUCHED]
    common = mine.keys() & base.keys()
    return sum(mine[pair] for pair in common) / sum(base[pair] for pair in common)


def rivals(scores: Scores) -> list[str]:
    """FLEx at the default anchor beside every other method with the same one."""
    kind, weight = CELLS[DEFAULT].kind, CELLS[DEFAULT].weight
    head = ["FLEx over", "seeds", *(f"{column}" for column in COMPARED), "goal"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, cell in CELLS.items():
        if name in scores and cell.method != CELLS[DEFAULT].method and (cell.kind, cell.weight) == (kind, weight):
            leads = [lead(scores[DEFAULT][column], scores[name][column]) for column in COMPARED]
            texts = [format_lead(scores[DEFAULT][column], scores[name][column]) for column in COMPARED]
            reached = all(gain > 0 and p < GOAL_P and ahead >= GOAL_AHEAD for gain, p, ahead, _ in leads)
            verdict = "reached" if reached else "not reached" if leads[0][3] >= len(TEST) else "too few seeds"
            row = [METHODS[cell.method].label, str(leads[0][3]), *texts, verdict]
            lines.append(f"| {' | '.join(row)} |")
    return [*lines, ""] if len(lines) > 2 else []


def goals(scores: Scores) -> list[str]:
    """What the default keeps and costs, against what was wanted of it."""
    kept = share_kept(scores, DEFAULT)
    lost, p, _, seeds = lead(scores[DEFAULT][OWN_CONVENTIONS], scores["flex"][OWN_CONVENTIONS])
    lines = [
        f"- keeps {100 * kept:.1f} % of the base's untouched skills (goal: {100 * GOAL_KEPT:.0f} %): "
        f"{'reached' if kept >= GOAL_KEPT else 'not reached'};",
        f"- own conventions {lost:+.1f} against no anchor (p {format_p(p)}, {seeds} seeds; goal: within "
        f"{GOAL_LOST:.0f} point): {'reached' if lost >= -GOAL_LOST else 'not reached'}.",
    ]
    return [*lines, ""]


def picture(scores: dict[str, Scores], path: Path) -> None:
    """Own conventions over untouched skills: one line a method and kind, one point a weight."""
    with svg(path, (7.2, 3.4 * len(scores))) as figure:
        for axes, (title, own) in zip(np.atleast_1d(figure.subplots(len(scores))), scores.items(), strict=True):
            drawn = dict.fromkeys((CELLS[n].method, CELLS[n].kind) for n in own if CELLS[n].kind != "none")
            alone = dict.fromkeys((CELLS[n].method, "none") for n in own if CELLS[n].method != "base")
            methods = list(dict.fromkeys(method for method, _ in (*alone, *drawn)))
            for method, kind in drawn or alone:
                names = [n for n in own if CELLS[n].method == method and CELLS[n].kind in (kind, "none")]
                names = [n for n in names if CELLS[n].text == "mixture"]
                names.sort(key=lambda n: CELLS[n].weight)
                x, y = ([mean(own[n][column]) for n in names] for column in (UNTOUCHED, OWN_CONVENTIONS))
                style = {"distill": "o-", "both": "s--", "gate": "^:", "none": "o"}[kind]
                label = f"{METHODS[method].label}, {kind}"
                axes.plot(x, y, style, ms=4, color=f"C{methods.index(method)}", label=label)
                for n, at in zip(names, zip(x, y, strict=True), strict=True):
                    axes.annotate(f"{CELLS[n].weight:g}", at, xytext=(3, 3), textcoords="offset points", fontsize=7)
            axes.set(xlabel="untouched skills, exact match %", ylabel="own conventions, exact match %", title=title)
            plain(axes)
            axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def write_page(out: Path) -> None:
    """RESULTS from the jobs in `out`, if there are any, and what the page shows of it."""
    rows = kept_rows(RESULTS, collect(out))
    judged, chosen, demo = (scores_of(rows, seeds) for seeds in (TEST, CHOOSING, DEMO))
    lines = []
    if {DEFAULT, "flex", "base"} <= judged.keys():
        lines = [f"### The default, {CELLS[DEFAULT].title}, on seeds that served no choice", "", *goals(judged)]
    titles = {}
    for scores, seeds, what in (
        (judged, TEST, "judged on"),
        (chosen, CHOOSING, "chosen on"),
        (demo, DEMO, "the demo's"),
    ):
        if scores:
            title = f"{what} seeds {seeds[0]} to {seeds[-1]}"
            titles[title] = scores
            lines += [f"### Every figure, {title}", "", *all_scores(scores)]
            lines += rivals(scores) if DEFAULT in scores else []
    lines += ["### The front", "", f"![own conventions over untouched skills]({PICTURE})", ""]
    picture(titles, PAGE.parent / PICTURE)
    write_between(PAGE, BEGIN, END, lines)
