"""From the jobs to `benchmarks/results/knowledge.json`, and from that to the tables and pictures of the page.

Differences are paired by seed and client, with the p-value of the sign-flip test, as in `benchmarks.study.page`.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.knowledge.cells import CELLS, CHOOSING, DEFAULT, DEMO, DOLLY, TEST
from benchmarks.knowledge.jobs import log_of
from benchmarks.pages import kept_rows, plain, svg, write_between
from benchmarks.study.page import format_p, paired, seed_means
from flex.demo.data import OWN_CONVENTIONS, SHARED_SKILL, TAUGHT_OTHERWISE, UNTOUCHED
from flex.evaluation.paired import Pair, sign_flip
from flex.methods import METHODS
from flex.store.events import AFTER, Done, Evaluated, read_events

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "knowledge.md"
BEGIN, END = "<!-- made by benchmarks.knowledge: begin -->", "<!-- end -->"
GOAL_P, GOAL_AHEAD, GOAL_SEEDS = 0.05, 5, 6
JOB = ("cell", "seed")


@dataclass(frozen=True)
class Column:
    """One score. `key`: its name in a row of the results; `goal`: a kept share, or points of skill that may be lost."""

    title: str
    key: str
    scale: float = 100.0
    digits: int = 1
    lower_is_better: bool = False

    def gain(self, difference: float) -> float:
        """Of a difference of values: positive where the first is better."""
        return -difference if self.lower_is_better else difference


@dataclass(frozen=True)
class Scene:
    """What is measured with one base.

    own, kept: the column of the clients' own skill, and that of the base's knowledge.
    chance: what somebody who knows nothing has of the latter.
    goal_kept: the share of the base's lead over chance that is to be kept. goal_lost: how much own skill may go, in
        points; None: no number was set.
    """

    name: str
    columns: tuple[Column, ...]
    own: Column
    kept: Column
    chance: float
    goal_kept: float
    goal_lost: float | None


_DEMO = {name: Column(name, name) for name in (OWN_CONVENTIONS, SHARED_SKILL, "general", TAUGHT_OTHERWISE, UNTOUCHED)}
_LOSS = Column("own loss", "test loss", 1.0, 3, lower_is_better=True)
_CLOZE = Column("cloze", "cloze")
_TEXT = Column("loss on the text", "perplexity loss", 1.0, 3, lower_is_better=True)
DEMO_SCENE = Scene("demo", tuple(_DEMO.values()), _DEMO[OWN_CONVENTIONS], _DEMO[UNTOUCHED], 0.0, 0.95, 1.0)
DOLLY_SCENE = Scene("dolly", (_LOSS, _CLOZE, _TEXT), _LOSS, _CLOZE, 25.0, 0.90, None)

Scores = dict[str, dict[Column, dict[Pair, float]]]  # cell -> column -> (seed, client) -> its value as shown


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
                share = event.exact_match if event.exact_match is not None else event.accuracy
                groups = {group: part["exact_match"] for group, part in event.groups.items()}
                own = {event.split: share, f"{event.split} loss": event.loss, **groups}
                clients[event.client_id] |= {key: round(value, 5) for key, value in own.items() if value is not None}
            rows += [{"cell": name, "seed": seed, "client": client, **own} for client, own in sorted(clients.items())]
    return rows


def scores_of(rows: Sequence[dict], seeds: Sequence[int], scene: Scene) -> Scores:
    scores: Scores = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["seed"] in seeds:
            for column in scene.columns:
                scores[row["cell"]][column][row["seed"], row["client"]] = column.scale * row[column.key]
    return scores


def mean(scores: dict[Pair, float]) -> float:
    return float(np.mean(seed_means(scores)))


def lead(mine: Scores, other: Scores, column: Column) -> tuple[float, float, int, int]:
    """(mean gain, p-value, seeds in which it is positive, seeds) over the pairs that both have."""
    differences, by_seed = paired(mine[column], other[column])
    ahead = sum(column.gain(v) > 0 for v in by_seed.values())
    return column.gain(float(differences.mean())), sign_flip(differences), ahead, len(by_seed)


def format_lead(mine: Scores, other: Scores, column: Column) -> str:
    if not mine[column].keys() & other[column].keys():
        return ""
    gain, p, ahead, seeds = lead(mine, other, column)
    return f"{gain:+.{column.digits}f}, p {format_p(p)}, {ahead} of {seeds}"


def all_scores(scores: Scores, scene: Scene) -> list[str]:
    """Every cell that has been run, and what its anchor does to the same method's own skill."""
    over = " over chance" if scene.chance else ""
    head = ["", "seeds", *(column.title for column in scene.columns)]
    head += [f"kept of the base's {scene.kept.title}{over}, %", f"gain in {scene.own.title} over no anchor"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in (name for name in CELLS if name in scores):
        means = {column: seed_means(scores[name][column]) for column in scene.columns}
        cells = [CELLS[name].title, str(len(means[scene.kept]))]
        for column in scene.columns:
            spread = f" ± {np.std(means[column], ddof=1):.{column.digits}f}" if len(means[column]) > 1 else ""
            cells.append(f"{np.mean(means[column]):.{column.digits}f}{spread}")
        cells.append(f"{100 * share_kept(scores, name, scene):.1f}" if "base" in scores else "")
        alone = CELLS[name].method
        shown = name != alone and alone in scores
        cells.append(format_lead(scores[name], scores[alone], scene.own) if shown else "")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def share_kept(scores: Scores, name: str, scene: Scene) -> float:
    """Of the base's lead over chance, over the seeds that both have."""
    mine, base = scores[name][scene.kept], scores["base"][scene.kept]
    common = mine.keys() & base.keys()
    return sum(mine[pair] - scene.chance for pair in common) / sum(base[pair] - scene.chance for pair in common)


def rivals(scores: Scores, scene: Scene) -> list[str]:
    """FLEx at the default anchor beside every other method with the same one."""
    kind, weight = CELLS[DEFAULT].kind, CELLS[DEFAULT].weight
    compared = (scene.own, scene.kept)
    head = ["FLEx over", "seeds", *(f"gain in {column.title}" for column in compared), "ahead in both"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, cell in CELLS.items():
        if name in scores and cell.method != CELLS[DEFAULT].method and (cell.kind, cell.weight) == (kind, weight):
            leads = [lead(scores[DEFAULT], scores[name], column) for column in compared]
            texts = [format_lead(scores[DEFAULT], scores[name], column) for column in compared]
            reached = all(gain > 0 and p < GOAL_P and ahead >= GOAL_AHEAD for gain, p, ahead, _ in leads)
            verdict = "yes" if reached else "no" if leads[0][3] >= GOAL_SEEDS else "too few seeds"
            row = [METHODS[cell.method].label, str(leads[0][3]), *texts, verdict]
            lines.append(f"| {' | '.join(row)} |")
    return [*lines, ""] if len(lines) > 2 else []


def goals(scores: Scores, scene: Scene) -> list[str]:
    """What the default keeps and costs, against what was wanted of it."""
    kept = share_kept(scores, DEFAULT, scene)
    gain, p, _, seeds = lead(scores[DEFAULT], scores["flex"], scene.own)
    over = " over chance" if scene.chance else ""
    goal = ""
    if scene.goal_lost is not None:
        reached = "reached" if gain >= -scene.goal_lost else "not reached"
        goal = f"; goal: at most {scene.goal_lost:.0f} point lost: {reached}"
    return [
        f"- keeps {100 * kept:.1f} % of the base's {scene.kept.title}{over} (without an anchor "
        f"{100 * share_kept(scores, 'flex', scene):.1f} %; goal: {100 * scene.goal_kept:.0f} %): "
        f"{'reached' if kept >= scene.goal_kept else 'not reached'};",
        f"- gain in {scene.own.title} over no anchor {gain:+.{scene.own.digits}f} "
        f"(p {format_p(p)}, {seeds} seeds{goal}).",
        "",
    ]


def picture(scores: dict[str, Scores], scene: Scene, path: Path) -> None:
    """Own skill over knowledge kept: one line a method and kind, one point a weight; better is up and to the right."""
    with svg(path, (7.2, 3.4 * len(scores))) as figure:
        for axes, (title, own) in zip(np.atleast_1d(figure.subplots(len(scores))), scores.items(), strict=True):
            drawn = dict.fromkeys((CELLS[n].method, CELLS[n].kind) for n in own if CELLS[n].kind != "none")
            alone = dict.fromkeys((CELLS[n].method, "none") for n in own if CELLS[n].method != "base")
            methods = list(dict.fromkeys(method for method, _ in (*alone, *drawn)))
            for method, kind in drawn or alone:
                names = [n for n in own if CELLS[n].method == method and CELLS[n].kind in (kind, "none")]
                names = [n for n in names if CELLS[n].text == "mixture"]
                names.sort(key=lambda n: CELLS[n].weight)
                x, y = ([mean(own[n][column]) for n in names] for column in (scene.kept, scene.own))
                style = {"distill": "o-", "both": "s--", "gate": "^:", "none": "o"}[kind]
                label = f"{METHODS[method].label}, {kind}"
                axes.plot(x, y, style, ms=4, color=f"C{methods.index(method)}", label=label)
                for n, at in zip(names, zip(x, y, strict=True), strict=True):
                    axes.annotate(f"{CELLS[n].weight:g}", at, xytext=(3, 3), textcoords="offset points", fontsize=7)
            axes.set(xlabel=scene.kept.title, ylabel=scene.own.title, title=title)
            if scene.own.lower_is_better:
                axes.invert_yaxis()
            plain(axes)
            axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def part(scene: Scene, rows: Sequence[dict], seeds: dict[str, tuple[int, ...]], judged: str) -> list[str]:
    """The tables of a scene, a table for each of `seeds`, and its picture. `judged`: which of them served no choice."""
    lines, shown = [], {}
    for what, chosen in seeds.items():
        if not (scores := scores_of(rows, chosen, scene)):
            continue
        if what == judged and {DEFAULT, "flex", "base"} <= scores.keys():
            lines += [f"### {scene.name}: the default, {CELLS[DEFAULT].title}", "", *goals(scores, scene)]
        title = f"{scene.name}, {what} seeds {chosen[0]} to {chosen[-1]}"
        shown[title] = scores
        lines += [f"### {title}", "", *all_scores(scores, scene)]
        lines += rivals(scores, scene) if DEFAULT in scores else []
    picture(shown, scene, PAGE.parent / f"pictures/knowledge-{scene.name}.svg")
    alt = f"{scene.own.title} over {scene.kept.title}"
    return [*lines, f"### {scene.name}: the front", "", f"![{alt}](pictures/knowledge-{scene.name}.svg)", ""]


def write_page(out: Path) -> None:
    """The results from the jobs in `out`, beside those that are kept, and what the page shows of them."""
    lines = []
    demo = kept_rows(RESULTS / "knowledge.json", collect(out), JOB)
    seeds = {"judged on": TEST, "chosen on": CHOOSING, "the demo's": DEMO}
    lines += part(DEMO_SCENE, demo, seeds, "judged on")
    if dolly := kept_rows(RESULTS / "knowledge-dolly.json", collect(out / "dolly"), JOB):
        lines += part(DOLLY_SCENE, dolly, {"judged on": DOLLY}, "judged on")
    write_between(PAGE, BEGIN, END, lines)
