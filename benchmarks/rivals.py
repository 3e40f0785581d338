"""FLEx beside every rival, each with its own learning rate: the demo's clients, and Dolly's.

    python -m benchmarks.rivals --out runs/rivals                               # the demo, six seeds
    python -m benchmarks.rivals --out runs/rivals --base BASE --dolly DATA/dolly   # four clients of Dolly, three seeds
    python -m benchmarks.rivals --out runs/rivals --page docs/rivals.md         # the page, from what is there
    python -m benchmarks.rivals --out runs/rivals --privacy docs/privacy.md     # what the demo's updates alone know

Called again it goes on where it was stopped. Rates are chosen on validation parts of the training records
(`runs/tune.py`), by the measure that is compared, on a seed that no run has; differences are judged by the paired test
of `flex/evaluation/paired.py`.
The page has a part for each setting, made from its run: table, picture and what its numbers say, whoever wins. A
setting that is not there keeps the part it has. `benchmarks/results/rivals-*.json` has every client's scores.
"""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.dolly import dolly_clients, dolly_settings
from benchmarks.pages import kept_rows, plain, svg, write_between
from flex.commands.train import report_on
from flex.config import RunConfig, read_config
from flex.demo.data import OWN_CONVENTIONS, SHARED_SKILL, UNTOUCHED, demo_config, write_demo_data
from flex.methods import MAIN, METHODS
from flex.report import read_events, summarise
from flex.report.findings import Difference, differences, format_p
from flex.report.flat import flat_rows, write_csv
from flex.report.numbers import Measure, Row, format_bytes
from flex.runs.run import run
from flex.runs.tune import TUNED, tune
from flex.store.events import AFTER, BASE_ALONE, UPDATE_ALONE

RESULTS = Path(__file__).resolve().parent / "results"
SEEDS = {"demo": (32, 33, 34, 35, 36, 37), "dolly": (0, 1, 2)}  # that served no choice before
TUNED_ON = {"demo": 30, "dolly": 9}
TUNED_BY = {"demo": "exact_match", "dolly": "loss"}  # as the first of the measures
# What is shown of a setting; methods are compared by the first.
MEASURES = {
    "demo": (
        Measure("test", "", "exact_match"),
        Measure("test", OWN_CONVENTIONS, "exact_match"),
        Measure("test", SHARED_SKILL, "exact_match"),
        Measure("general", UNTOUCHED, "exact_match"),
        Measure("test", "", "rouge_l"),
    ),
    "dolly": (Measure("test", "", "loss"), Measure("test", "", "rouge_l")),
}
VERDICTS = {
    "better": "ahead of",
    "worse": "behind",
    "unsettled": "not told apart from",
    "open": "too few seeds to judge beside",
}
END = "<!-- end -->"


def configure(
    setting: str,
    out: Path,
    base: Path | None,
    dolly: Path | None,
    seeds: tuple[int, ...],
    methods: tuple[str, ...] = tuple(METHODS),
) -> RunConfig:
    """The run of a setting, all its methods and seeds; writes its data where they are not there yet."""
    folder = out / setting
    common = [f"train.methods={json.dumps(list(methods))}", f"train.seeds={json.dumps(list(seeds))}", "threads=1"]
    if setting == "demo":
        data = folder / "data-{seed}"
        for seed in (*seeds, TUNED_ON[setting]):
            write_demo_data(Path(str(data).replace("{seed}", str(seed))), seed)
        paths = [f"data.{n}={json.dumps(str(data / f'{n}.jsonl'))}" for n in ("train", "test", "general")]
        paths += [f"anchor.text={json.dumps(str(data / 'anchor.jsonl'))}"]
        return demo_config(folder / "run", [*paths, *common])
    if base is None or dolly is None:
        raise SystemExit("dolly needs --base (a pretrained MoE) and --dolly (a folder)")
    for seed in (*seeds, TUNED_ON[setting]):
        dolly_clients(folder / f"data-{seed}", dolly, 0, seed)
    own = [*dolly_settings(base, folder / "data-{seed}", folder / "run"), "evaluate.max_new_tokens=32", "workers=2"]
    return read_config(None, [*own, *common])


def measure(setting: str, config: RunConfig, console: Console) -> None:
    """Tunes on a seed of its own, then runs every method and seed.

    The demo's scores with every rate are kept in `benchmarks/results`, and what is there is not tried again; Dolly's
    hang on the base that is given.
    """
    config = config.with_values(train={"tune_by": TUNED_BY[setting]})
    first = config.with_values(train={"seeds": (TUNED_ON[setting],)})
    first = dataclasses.replace(first, output=f"{config.output}-tuning")
    tuned, kept = Path(first.output) / TUNED, RESULTS / f"rivals-{setting}-{TUNED}"
    if kept.exists() and not tuned.exists():
        tuned.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(kept, tuned)
    tuned_run = tune(first, console)
    if setting == "demo":
        shutil.copy(tuned, kept)
    chosen = {"train": {"rates": tuned_run.train.rates}, "strategy": {"etas": tuned_run.strategy.etas}}
    folder = run(config.with_values(**chosen), console)
    report_on(folder)
    write_csv(folder / "numbers.csv", flat_rows(summarise(read_events(folder)), setting))


def section(setting: str, folder: Path, picture: Path) -> list[str]:
    """The table of a setting, the picture of its differences, and what its numbers say."""
    summary = summarise(read_events(folder))
    shown = [measure for measure in MEASURES[setting] if any(measure in row.after for row in summary)]
    others = [row for row in summary if row.method != MAIN]
    main = next(row for row in summary if row.method == MAIN)
    against = differences(main, others, shown[0])
    draw(shown[0], against, {row.method: row.label for row in summary}, picture)
    head = ["method", *(m.title for m in shown), "FLEx minus it", "p", "FLEx ahead in", "rates", "sent a round"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in sorted(summary, key=lambda row: place(row, shown[0])):
        cells = [row.label]
        cells += [m.format(row.after[m].mean, row.after[m].spread) if m in row.after else "" for m in shown]
        cells += against_cells(against.get(row.method))
        rate = (row.learning_rates or {}).get("learning_rate")
        cells.append("" if rate is None else f"{rate:.2g}")
        cells.append(format_bytes(row.bytes_per_round["up"]) if row.bytes_per_round else "")
        lines.append(f"| {' | '.join(cells)} |")
    drawn = f"![FLEx minus each rival](pictures/{picture.name})"
    return [*lines, "", drawn, "", *(settled(main, others, measure) for measure in shown), ""]


def settled(main: Row, others: list[Row], measure: Measure) -> str:
    """Whom FLEx is ahead of, level with and behind by one measure, with the differences, as the test says."""
    found = differences(main, others, measure)
    labels, said = {row.method: row.label for row in others}, []
    for verdict, words in VERDICTS.items():
        named = [f"{labels[method]} ({diff})" for method, diff in found.items() if diff.verdict == verdict]
        said += [f"{words} {', '.join(named)}"] if named else []
    stat = main.after[measure]
    return f"- **{measure.title}**: FLEx {measure.format(stat.mean, stat.spread)}; {'; '.join(said)}."


def place(row: Row, measure: Measure) -> float:
    """The best first; who has no score comes last."""
    if measure not in row.after:
        return float("inf")
    return -row.after[measure].mean if measure.higher_is_better else row.after[measure].mean


def against_cells(found: Difference | None) -> list[str]:
    """The difference with its interval, its corrected p-value, and in how many seeds FLEx is ahead."""
    if found is None:
        return ["", "", ""]
    p = format_p(found.p).removeprefix("= ") if found.verdict != "open" else ""
    return [f"{found} {found.interval}".strip(), p, f"{found.ahead} of {found.num_seeds}"]


def draw(measure: Measure, against: dict[str, Difference], labels: dict[str, str], path: Path) -> None:
    """FLEx minus each rival with its interval, those that it leads most on top; right of zero FLEx is ahead."""
    scale = measure.kind.scale * (1 if measure.higher_is_better else -1)
    found = sorted(against.items(), key=lambda item: item[1].gain)
    with svg(path, (6.4, 0.6 + 0.22 * len(found))) as figure:
        axes = figure.subplots()
        for height, (_, difference) in enumerate(found):
            test = difference.test
            if test is not None and test.low is not None and test.high is not None:
                axes.plot([scale * test.low, scale * test.high], [height, height], color="C0", lw=1.2)
            face = "C0" if difference.verdict in ("better", "worse") else "white"
            axes.plot([scale * difference.mean], [height], "o", ms=4.5, color="C0", mfc=face)
        axes.axvline(0, color="0.4", lw=0.8)
        axes.set_yticks(range(len(found)), [labels[method] for method, _ in found])
        axes.set_xlabel(f"FLEx ahead in {measure.title}, with its 95 % interval; hollow: not settled")
        plain(axes)


def collect(folder: Path) -> list[dict[str, Any]]:
    """Every job's scores, client by client, after aggregation: shares in [0, 1], losses in nats."""
    rows = []
    for row in summarise(read_events(folder)):
        pairs = {measure: row.pairs(measure, AFTER) for measure in row.after}
        for seed, client in sorted(set().union(*pairs.values())):
            scores = {
                "/".join(filter(None, measure)): round(of_pair[seed, client], 5)
                for measure, of_pair in pairs.items()
                if (seed, client) in of_pair
            }
            rows.append({"method": row.method, "seed": seed, "client": client, **scores})
    return rows


def write_page(path: Path, out: Path) -> None:
    """Each setting that has been run, between two marks of its own, and its scores beside those of other studies."""
    for name in SEEDS:
        folder = out / name / "run"
        if folder.exists():
            kept_rows(RESULTS / f"rivals-{name}.json", collect(folder))
            lines = section(name, folder, path.parent / f"pictures/rivals-{name}.svg")
            write_between(path, f"<!-- made by benchmarks.rivals, {name}: begin -->", END, lines)


def given_away(folder: Path) -> list[str]:
    """The table of what each method's last update, alone with the base, answers of its own client's prompts."""
    asked = [measure for measure in MEASURES["demo"] if measure.group in (OWN_CONVENTIONS, SHARED_SKILL)]
    head = ["", *(f"{m.group}: {who}" for m in asked for who in ("update alone", "the client itself")), "seeds"]
    rows = [row for row in summarise(read_events(folder)) if row.scores[UPDATE_ALONE]]
    lines = [("the base as it came", (rows[0].scores[BASE_ALONE], {}), rows[0].seeds)]
    lines += [(row.label, (row.scores[UPDATE_ALONE], row.before), row.seeds) for row in rows]
    table = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for label, found, seeds in lines:
        cells = [m.format(of[m].mean, of[m].spread) if m in of else "–" for m in asked for of in found]
        table.append(f"| {' | '.join([label, *cells, str(len(seeds))])} |")
    return [*table, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/rivals"))
    parser.add_argument("--base", type=Path)
    parser.add_argument("--dolly", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="(default: all)")
    parser.add_argument("--page", type=Path)
    parser.add_argument("--privacy", type=Path)
    given = parser.parse_args()
    if given.page is not None:
        write_page(given.page, given.out)
    if given.privacy is not None:
        begin = "<!-- made by benchmarks.rivals, update alone: begin -->"
        write_between(given.privacy, begin, END, given_away(given.out / "demo" / "run"))
    if given.page is not None or given.privacy is not None:
        return
    setting = "dolly" if given.dolly is not None else "demo"
    seeds = tuple(given.seeds or SEEDS[setting])
    methods = tuple(given.methods or METHODS)
    measure(setting, configure(setting, given.out, given.base, given.dolly, seeds, methods), Console())


if __name__ == "__main__":
    main()
