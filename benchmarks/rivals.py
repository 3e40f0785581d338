"""FLEx beside every rival, each with its own learning rate: the demo's clients, and Dolly's.

    python -m benchmarks.rivals --out runs/rivals                               # the demo, six seeds
    python -m benchmarks.rivals --out runs/rivals --base BASE --dolly DATA/dolly   # four clients of Dolly, three seeds
    python -m benchmarks.rivals --out runs/rivals --page docs/rivals.md         # the page, from what is there

Called again it goes on where it was stopped. Rates are chosen by the loss on validation parts of the training records
(`runs/tune.py`), on a seed that no run has; differences are judged by the paired test of `flex/evaluation/paired.py`.
The page has the table, the verdicts and the command; it says what the numbers say, whoever wins.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from rich.console import Console

from benchmarks.dolly import dolly_clients, dolly_settings
from benchmarks.pages import write_between
from flex.commands.train import report_on
from flex.config import RunConfig, read_config
from flex.demo.data import demo_config, write_demo_data
from flex.methods import METHODS
from flex.report import findings, read_events, summarise
from flex.report.flat import flat_rows, write_csv
from flex.report.numbers import Measure, format_bytes
from flex.runs.run import run
from flex.runs.tune import tune

SEEDS = {"demo": (31, 32, 33, 34, 35, 36), "dolly": (0, 1, 2)}  # that served no choice before
TUNED_ON = {"demo": 30, "dolly": 9}
SCORES = {"demo": ("exact_match", "rouge_l"), "dolly": ("loss", "rouge_l")}
BEGIN, END = "<!-- made by benchmarks.rivals: begin -->", "<!-- end -->"


def configure(setting: str, out: Path, base: Path | None, dolly: Path | None, seeds: tuple[int, ...]) -> RunConfig:
    """The run of a setting, all methods and seeds; writes its data where they are not there yet."""
    folder = out / setting
    common = [f"train.methods={json.dumps(list(METHODS))}", f"train.seeds={json.dumps(list(seeds))}", "threads=1"]
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
    own = [*dolly_settings(base, folder / "data-{seed}", folder / "run"), "evaluate.max_new_tokens=32"]
    return read_config(None, [*own, *common])


def measure(setting: str, config: RunConfig, console: Console) -> None:
    """Tunes on a seed of its own, then runs every method and seed."""
    first = config.with_values(train={"seeds": (TUNED_ON[setting],)})
    first = dataclasses.replace(first, output=f"{config.output}-tuning")
    rates = tune(first, console).train.rates
    folder = run(config.with_values(train={"rates": rates}), console)
    report_on(folder)
    write_csv(folder / "numbers.csv", flat_rows(summarise(read_events(folder)), setting))


def section(setting: str, folder: Path) -> list[str]:
    """The table of a setting and what its numbers say."""
    summary = summarise(read_events(folder))
    rows = flat_rows(summary, setting)
    shown = [m for name in SCORES[setting] if any((m := Measure("test", "", name)) in row.after for row in summary)]
    lines = [
        f"### {setting}",
        "",
        "| method | " + " | ".join(m.title for m in shown) + " | FLEx minus it | p | seeds | rate | sent a round |",
    ]
    lines.append("|---" * (6 + len(shown)) + "|")
    for row in summary:
        own = {r["measure"]: r for r in rows if r["method"] == row.method and r["split"] == "test" and not r["group"]}
        cells = [m.format(row.after[m].mean, row.after[m].spread) if m in row.after else "" for m in shown]
        first = own.get(shown[0].name, {})
        known = first.get("main_minus_this") is not None and first.get("p_holm") is not None
        cells.append(shown[0].format_signed(first["main_minus_this"]) if known else "")
        cells.append(f"{first['p_holm']:.3f}" if known else "")
        cells.append(str(first.get("main_ahead_in_seeds", "")))
        rate = (row.learning_rates or {}).get("learning_rate")
        cells.append("" if rate is None else f"{rate:.2g}")
        cells.append(format_bytes(row.bytes_per_round["up"]) if row.bytes_per_round else "")
        lines.append(f"| {row.label} | {' | '.join(cells)} |")
    return [*lines, "", *(f"- {sentence}" for sentence in findings(summary)), ""]


def write_page(path: Path, out: Path) -> None:
    """Between the two marks of the page, or as a new page."""
    found = [line for name in SEEDS if (out / name / "run").exists() for line in section(name, out / name / "run")]
    write_between(path, BEGIN, END, found, new=f"# FLEx and its rivals\n\n{BEGIN}\n{END}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/rivals"))
    parser.add_argument("--base", type=Path)
    parser.add_argument("--dolly", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    if given.page is not None:
        write_page(given.page, given.out)
        return
    setting = "dolly" if given.dolly is not None else "demo"
    seeds = tuple(given.seeds or SEEDS[setting])
    measure(setting, configure(setting, given.out, given.base, given.dolly, seeds), Console())


if __name__ == "__main__":
    main()
