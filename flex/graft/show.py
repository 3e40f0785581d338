"""What `flex graft` shows of the choices: a table and a heat map in the terminal, the same as a picture in a file."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.style import Style
from rich.table import Table
from rich.text import Text

from flex.graft.choice import Choice
from flex.report.figures import COUNT_COLOURS, RESIDUAL_MAX, RESIDUAL_MIN, residual_stops

RESIDUALS = LinearSegmentedColormap.from_list("residual", residual_stops())
LEVELS = "▁▂▃▄▅▆▇█"
MOST_CELL = 6  # characters


def choice_table(client_id: str, num_sequences: int, choices: Sequence[Choice]) -> Table:
    """A line per layer: what was taken, how much of the target it leaves, what it cost."""
    first = choices[0]
    table = Table(
        title=f"client {escape(client_id)}, {num_sequences} sequences: {first.criterion}, target {first.target}",
        caption="unexplained: share of the target's energy left, 100 % is no better than nothing;\n"
        "after: with the refitted down projection; held out: on sequences nothing was fitted to",
    )
    fitted = any(c.unexplained.held_out_before is not None for c in choices)
    refitted = any(c.unexplained.after is not None for c in choices)
    columns = ["layer", "taken", "width", "routed", "unexplained"]
    columns += ["after"] * refitted + ["held out"] * fitted + ["after"] * (fitted and refitted)
    columns += ["s", "peak GiB"]
    for column in columns:
        table.add_column(column, justify="left" if column == "taken" else "right")
    for choice in choices:
        left = choice.unexplained
        shares = [left.before] + [left.after] * refitted
        shares += [left.held_out_before] * fitted + [left.held_out_after] * (fitted and refitted)
        table.add_row(
            str(choice.layer),
            taken(choice),
            str(choice.width),
            f"{choice.routed_mass:.1%}",
            *("–" if share is None else f"{share:.1%}" for share in shares),
            f"{choice.seconds:.2f}",
            f"{choice.peak_bytes / 2**30:.2f}",
        )
    return table


def taken(choice: Choice) -> str:
    """The choice in a few words."""
    if choice.parts.experts:
        return f"expert{'s' if len(choice.parts.experts) > 1 else ''} {', '.join(map(str, choice.parts.experts))}"
    owners = sum(count > 0 for count in choice.neurons)
    return f"neurons of {owners} experts" if owners else "a new module"


def heat_map(choices: Sequence[Choice], columns: int) -> RenderableType:
    """Layers x experts in coloured cells: the neurons taken from each expert, or else each expert's residual with the
    chosen ones in brackets. `columns`: of the terminal."""
    counted = by_neurons(choices)
    values, most = grid(choices), max(max(choice.neurons) for choice in choices)
    num_experts = max(len(choice.residuals) for choice in choices)
    cell = max(1, min(MOST_CELL, (columns - 8) // num_experts))
    lines = []
    for choice, row in zip(choices, values, strict=True):
        line = Text(f"{choice.layer:>5}  ", no_wrap=True)
        for expert, value in enumerate(row):
            text = f"{value:.0f}" if counted else f"{value:.2f}"
            if not counted and expert in choice.parts.experts:
                text = f"[{text}]" if cell >= MOST_CELL else "█" * cell
            share = value / most if counted else _residual_level(value)
            colour = (COUNT_COLOURS if counted else RESIDUALS)(share)
            dark = sum(c * w for c, w in zip(colour[:3], (0.3, 0.6, 0.1), strict=True)) < 0.5
            style = Style(bgcolor=_hex(colour), color="white" if dark else "black")
            line.append(text.center(cell) if len(text) <= cell else " " * cell, style)
        lines.append(line)
    what = "neurons taken from each expert" if counted else "residual of each expert; blue explains, the chosen marked"
    return Group(Text(f"layer  {what} (0 to {num_experts - 1}):"), *lines)


def curves(choices: Sequence[Choice]) -> RenderableType:
    """What is left of the target over the width, a line per layer; empty where no width was chosen step by step."""
    lines = []
    for choice in choices:
        if len(choice.curve) > 2:
            shares = [share for _, share in choice.curve]
            bars = "".join(LEVELS[min(7, int(8 * min(1.0, share)))] for share in shares)
            lines.append(Text(f"{choice.layer:>5}  {bars}  {shares[-1]:.1%} at width {choice.width}", no_wrap=True))
    return Group(Text("layer  unexplained share over the width:"), *lines) if lines else Group()


def by_neurons(choices: Sequence[Choice]) -> bool:
    """Whether the grafts are made of neurons of several experts rather than of whole ones."""
    return any(sum(choice.neurons) and not choice.parts.experts for choice in choices)


def grid(choices: Sequence[Choice]) -> list[list[float]]:
    """[layers][experts]: neurons taken, or residuals."""
    counted = by_neurons(choices)
    return [[float(v) for v in (choice.neurons if counted else choice.residuals)] for choice in choices]


def write_picture(path: Path, client_id: str, choices: Sequence[Choice]) -> Path:
    """The heat map, and the loss curves beside it where there are any, as a file of the suffix's kind (.png, .svg)."""
    counted, rows = by_neurons(choices), grid(choices)
    values = np.full((len(rows), max(map(len, rows))), np.nan)
    for own, row in zip(values, rows, strict=True):
        own[: len(row)] = row
    stepwise = [choice for choice in choices if len(choice.curve) > 2]
    height = 1.3 + 0.16 * max(10, min(40, len(rows)))
    figure = Figure(figsize=(10 if stepwise else 6, height), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2 if stepwise else 1, squeeze=False)[0]
    norm = Normalize(0) if counted else LogNorm(RESIDUAL_MIN, RESIDUAL_MAX, clip=True)
    image = panels[0].imshow(values, cmap=COUNT_COLOURS if counted else RESIDUALS, norm=norm, aspect="auto")
    bar = figure.colorbar(image, ax=panels[0], label="neurons taken" if counted else "residual (1: as bad as none)")
    if not counted:
        ticks = (RESIDUAL_MIN, 0.7, 1.0, 1.4, RESIDUAL_MAX)
        bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        bar.minorticks_off()
    marks = [(e, row) for row, choice in enumerate(choices) for e in choice.parts.experts]
    if marks:
        panels[0].plot(*zip(*marks, strict=True), "o", ms=5, mfc="white", mec="black", linestyle="none")
    panels[0].set(xlabel="expert", ylabel="layer")
    panels[0].set_title(f"{client_id}: {choices[0].criterion}, {choices[0].target}", parse_math=False)
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].yaxis.set_major_locator(MaxNLocator(min(20, len(rows)), integer=True))
    for choice in stepwise:
        colour = RESIDUALS(choice.layer / max(1, len(choices) - 1))
        panels[1].plot(*zip(*choice.curve, strict=True), color=colour, linewidth=1.4, label=f"layer {choice.layer}")
    if stepwise:
        panels[1].set(xlabel="width (neurons)", ylabel="share of the target left", ylim=(0, None))
        panels[1].grid(True, alpha=0.3)
        if len(stepwise) <= 12:
            panels[1].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _residual_level(value: float) -> float:
    if not value > 0:
        return 0.0
    low, high = math.log(RESIDUAL_MIN), math.log(RESIDUAL_MAX)
    return min(1.0, max(0.0, (math.log(value) - low) / (high - low)))


def _hex(colour: tuple[float, ...]) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in colour[:3])
