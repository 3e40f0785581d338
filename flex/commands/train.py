"""`flex train` and `flex demo`: from data to report."""

from pathlib import Path

from rich.console import Console

from flex.commands.forecast import print_forecast
from flex.config import read_config
from flex.demo.data import demo_config, describe_clients, write_demo_data
from flex.report.terminal import findings, read_events, summarise, terminal_table, write_report
from flex.runs.forecast import forecast
from flex.runs.run import prepared, run
from flex.runs.tune import tune

console = Console()


def demo(folder: Path, overrides: list[str]) -> int:
    """Generates the data of each seed, then does what `train` does."""
    config = demo_config(folder, overrides)
    for seed in config.train.seeds:
        write_demo_data(Path(config.data.for_seed(seed).train).parent, seed)
    title = "FLEx demo: five clients, conventions of their own, one new skill in common"
    return report_on(run(config, console, title, describe_clients(config.train.seeds[0])))


def train(path: Path | None, overrides: list[str]) -> int:
    """Every method and seed of a configuration, from data to report; resumes what was stopped."""
    return report_on(run(read_config(path, overrides), console))


def tuned(path: Path | None, overrides: list[str]) -> int:
    """The same, each method with a learning rate of its own, which is chosen first (`runs/tune.py`)."""
    return report_on(run(tune(read_config(path, overrides), console), console))


def dry_run(path: Path | None, overrides: list[str]) -> int:
    """What the run would be and take, from a few steps of it; nothing is written."""
    config, _, world = prepared(read_config(path, overrides), console)
    print_forecast(console, config, forecast(config, world))
    return 0


def report_on(folder: Path) -> int:
    """Writes the page of a run and shows its table."""
    page = write_report(folder)  # before anything is printed: a terminal may refuse a character
    summary = summarise(read_events(folder))
    console.print(terminal_table(summary, console.width))
    for sentence in findings(summary):
        console.print(f"- {sentence}", markup=False, emoji=False)
    console.out(f"\nreport: {page}", highlight=False)
    return 0
