"""From the study's jobs to `benchmarks/results/choosing.json`, and from that to the tables and pictures of the page.

Differences are paired: the same client with the same data and seed, once with each start of the graft. Their p-values
are of the sign-flip test (`flex/evaluation/paired.py`); in how many seeds the difference is positive stands beside.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.pages import kept_rows, plain, svg, write_between
from benchmarks.study.variants import SETTINGS, VARIANTS, Setting
from flex.evaluation.paired import Pair, sign_flip

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "choosing.json"
PAGE = ROOT / "docs" / "choosing-the-graft.md"
BEGIN, END = "<!-- made by benchmarks.study: begin -->", "<!-- end -->"
REFERENCES = {  # group -> what its members are compared with
    "one expert wide": ("rule", "random", "fresh"),
    "two experts wide": ("random-2",),
    "LoRA on the graft": ("rule-lora", "random-lora", "fresh-lora"),
    "something else kept private": ("neurons-corr-refit", "random", "fedavg"),
}
DEFAULT = "neurons-corr-refit"  # what `flex` starts from
DRAWN = ("fedavg", "rule", "random", "fresh", "neurons-refit", "random-corr", "neurons-corr-refit")

Scores = dict[str, dict[int, dict[Pair, float]]]  # variant -> round -> pair -> score, higher is better


def collect(out: Path) -> list[dict]:
    """Every finished job's scores on its clients' test parts, after aggregation."""
    rows = []
    for path in sorted(out.glob("*/*/seed*/metrics.jsonl")):
        setting, variant, seed = path.parts[-4:-1]
        events = [json.loads(line) for line in path.read_text().splitlines()]
        for event in events:
            if (event.get("event"), event.get("split"), event.get("when")) == ("evaluate", "test", "after_aggregation"):
                row = {"setting": setting, "variant": variant, "seed": int(seed.removeprefix("seed"))}
                row |= {"round": event["round"], "client": event["client_id"]}
                rows.append(row | {name: round(event[name], 5) for name in ("exact_match", "loss")})
    return rows


def scores_of(rows: Sequence[dict], setting: str) -> Scores:
    """One setting's scores by its metric: exact match in percent, or minus the loss a token."""
    scores: Scores = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["setting"] == setting:
            value = 100 * row["exact_match"] if SETTINGS[setting].metric == "exact_match" else -row["loss"]
            scores[row["variant"]][row["round"]][row["seed"], row["client"]] = value
    return scores


def paired(mine: dict[Pair, float], other: dict[Pair, float]) -> tuple[np.ndarray, dict[int, float]]:
    """Differences of the pairs that both have, and their mean of each seed."""
    common = sorted(mine.keys() & other.keys())
    differences = np.array([mine[pair] - other[pair] for pair in common])
    seeds = sorted({seed for seed, _ in common})
    return differences, {s: float(np.mean([mine[p] - other[p] for p in common if p[0] == s])) for s in seeds}


def seed_means(scores: dict[Pair, float]) -> list[float]:
    return [float(np.mean([v for (s, _), v in scores.items() if s == seed])) for seed in sorted({s for s, _ in scores})]


def table(setting: Setting, scores: Scores) -> list[str]:
    """Two tables for each group of variants: after few steps (the first round that was evaluated), and at the end."""
    unit = "exact match %" if setting.metric == "exact_match" else "loss"
    rounds = sorted(next(iter(scores.values())))
    lines = [
        f"Test {unit} after aggregation, mean over clients, ± deviation over seeds. Differences: better is positive; "
        "each with its p-value, and in how many seeds it is positive.",
        "",
    ]
    for group in dict.fromkeys(variant.group for variant in VARIANTS.values()):
        names = [name for name in scores if VARIANTS[name].group == group]
        for at in (rounds[0], rounds[-1]):
            lines += group_table(group, at, setting, scores, names)
    return lines


def group_table(group: str, at: int, setting: Setting, scores: Scores, names: list[str]) -> list[str]:
    """The variants `names` at one round, the best first, each beside the group's references."""
    if not names:
        return []
    sign, digits = (1, 1) if setting.metric == "exact_match" else (-1, 3)
    references = [name for name in REFERENCES.get(group, ()) if name in scores]
    head = [f"{group}, round {at}", "seeds", "mean", *(f"over {VARIANTS[name].title}" for name in references)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in sorted(names, key=lambda name: -np.mean(seed_means(scores[name][at]))):
        means = seed_means(scores[name][at])
        spread = f" ± {np.std(means, ddof=1):.{digits}f}" if len(means) > 1 else ""
        cells = [VARIANTS[name].title, str(len(means)), f"{sign * np.mean(means):.{digits}f}{spread}"]
        cells += ["" if other == name else lead(setting, scores[name][at], scores[other][at]) for other in references]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def format_p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def leads(rows: Sequence[dict]) -> list[str]:
    """The default start beside its three references, in every setting, after few steps and at the end."""
    references = REFERENCES[VARIANTS[DEFAULT].group]
    head = ["setting", "round", "seeds", *(f"over {VARIANTS[name].title}" for name in references)]
    lines = ["### The lead of the default start", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for setting_name, setting in SETTINGS.items():
        scores = scores_of(rows, setting_name)
        if DEFAULT not in scores:
            continue
        rounds = sorted(scores[DEFAULT])
        for at in (rounds[0], rounds[-1]):
            cells = [setting.title, str(at), str(len(seed_means(scores[DEFAULT][at])))]
            cells += [lead(setting, scores[DEFAULT][at], scores[name][at]) for name in references if name in scores]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def lead(setting: Setting, mine: dict[Pair, float], other: dict[Pair, float]) -> str:
    """Mean difference of the pairs, its p-value, and in how many seeds it is positive."""
    differences, by_seed = paired(mine, other)
    if not by_seed:
        return ""
    digits, ahead = 1 if setting.metric == "exact_match" else 3, sum(value > 0 for value in by_seed.values())
    return f"{differences.mean():+.{digits}f}, p {format_p(sign_flip(differences))}, {ahead} of {len(by_seed)}"


def picture(setting: Setting, scores: Scores, path: Path) -> None:
    """The score over the rounds, one line a start of the graft."""
    with svg(path, (6.4, 3.4)) as figure:
        axes = figure.subplots()
        sign = 1 if setting.metric == "exact_match" else -1
        for number, name in enumerate(name for name in DRAWN if name in scores):
            rounds = sorted(scores[name])
            values = [sign * np.mean(list(scores[name][at].values())) for at in rounds]
            axes.plot(rounds, values, "o-", ms=3, color=f"C{number}", label=VARIANTS[name].title)
        axes.set(xlabel="round", ylabel="exact match %" if sign > 0 else "test loss", title=setting.title)
        plain(axes)
        axes.legend(frameon=False, fontsize=8)


def write_page(out: Path) -> None:
    """RESULTS from the jobs in `out`, if there are any, and what the page shows of it."""
    rows = kept_rows(RESULTS, collect(out))
    lines = leads(rows)
    for name, setting in SETTINGS.items():
        scores = scores_of(rows, name)
        if not scores:
            continue
        file = PAGE.parent / "pictures" / f"choosing-{name}.svg"
        picture(setting, scores, file)
        lines += [
            f"### {setting.title[0].upper()}{setting.title[1:]}",
            "",
            f"![{setting.title}](pictures/{file.name})",
            "",
        ]
        lines += table(setting, scores)
    write_between(PAGE, BEGIN, END, lines)
