"""What `flex train --dry-run` prints of a forecast."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flex.config import RunConfig
from flex.methods import METHODS
from flex.runs.forecast import Cost, Forecast

PLAIN = {"box": box.SIMPLE_HEAD, "collapse_padding": True, "pad_edge": False}  # 80 columns are enough
UNITS, COUNTS = ("B", "kB", "MB", "GB", "TB"), ("", "k", "M", "G")


def print_forecast(console: Console, config: RunConfig, told: Forecast) -> None:
    """Lengths, a prompt, what each method trains, sends and takes, and the largest batch."""
    console.print(_lengths(config, told))
    console.print("one prompt, as the model reads it:", style="bold")
    console.out(told.prompt, highlight=False)
    console.print("and its answer:", style="bold")
    console.out(told.answer, highlight=False)
    console.print(_costs(config, told))
    lines = [
        f"time: {_duration(told.seconds)} for all methods and seeds, one job after another, by steps timed just now",
    ]
    if config.train.compile:
        lines.append("train.compile: the steps were timed without it; every job compiles its model, for minutes, first")
    heaviest = max(told.costs, key=lambda cost: cost.step_bytes)
    if heaviest.step_bytes:
        length, fits = config.data.max_length, min(cost.fits for cost in told.costs if cost.step_bytes)
        lines += [
            f"memory: {_bytes(told.base_bytes)} for the base, which is loaded, and {_bytes(heaviest.step_bytes)} for a "
            f"step of {heaviest.method} (measured); {_bytes(told.available)} are free",
            f"largest train.batch_size: {f'about {fits}' if fits else 'none, not even 1,'} examples of data.max_length "
            f"= {length} tokens (estimated: {_bytes(heaviest.fixed_bytes)} + {_bytes(heaviest.token_bytes)} a token, "
            "through the peaks of two steps, against what is free; leave some room)",
        ]
    for line in [*lines, "nothing was written"]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _lengths(config: RunConfig, told: Forecast) -> Table:
    table = Table(title=Text("tokens of an example", "table.title"), **PLAIN)
    for column in ("client", "part", "examples", "half up to", "90 % up to", "longest", "cut"):
        table.add_column(column, justify="left" if column in ("client", "part") else "right")
    for row in told.lengths:
        numbers = (row.count, *row.quantiles, row.cut)
        table.add_row(Text(row.client_id), row.part, *(str(number) for number in numbers))
    table.caption = Text(f"template {config.data.template}, cut at data.max_length = {config.data.max_length}")
    return table


def _costs(config: RunConfig, told: Forecast) -> Table:
    table = Table(title=Text("what the methods train, send and take", "table.title"), **PLAIN)
    table.add_column("method", no_wrap=True)
    for column in ("shared", "private", "sent", "bytes", "step", "train", "score", "choose"):
        table.add_column(column, justify="right", no_wrap=True)
    for cost in told.costs:
        table.add_row(cost.method, *_row(cost))
    seeds, rounds = len(config.train.seeds), config.train.rounds
    targets = ", ".join(name.rpartition(".")[2] for name in config.lora.targets[:8])
    table.caption = Text(
        "shared, private: numbers trained; sent: tensors and bytes of a client in a round, as many come back; seconds "
        f"of a step, and of {seeds} seed(s) with {rounds} rounds each; LoRA on {targets}"
    )
    return table


def _row(cost: Cost) -> list[str]:
    if not METHODS[cost.method].trains:
        return ["–"] * 6 + [_duration(cost.score_seconds).replace(" ", ""), "–"]
    cells = [
        *(_scaled(cost.trained.get(role, 0), COUNTS) for role in ("shared", "personal")),
        str(cost.tensors or "–"),
        _bytes(cost.sent_bytes) if cost.sent_bytes else "–",
        f"{cost.step_seconds:.2g} s",
        _duration(cost.train_seconds),
        _duration(cost.score_seconds),
        _duration(cost.choose_seconds) if cost.choose_seconds else "–",
    ]
    return [cell.replace(" ", "") for cell in cells]


def _bytes(number: float) -> str:
    return _scaled(number, UNITS)


def _scaled(number: float, units: Sequence[str]) -> str:
    """Three digits and a unit of thousands."""
    for unit in units[:-1]:
        if number < 999.5:
            return f"{number:.3g} {unit}".rstrip()
        number /= 1000
    return f"{number:.3g} {units[-1]}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
