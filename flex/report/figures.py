"""The pictures of the report: small matplotlib figures as inline SVG, one panel each, laid out by the page's own grid.

A panel knows no colour of the page. It is drawn in stand-in colours that `_svg` replaces by the CSS variables of
report.css, so that one picture is right in light, dark and print; its text is real text in the page's font. Names that
come from the user (clients, groups) never enter matplotlib: the page writes them as captions.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from hashlib import sha256
from html import escape

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

INK, SOFT, LINE, PAGE = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"  # text, lesser text, grid lines, background
MARKS = 28  # method colours --mark-0 ... --mark-27 in report.css
LAYERS = 6  # layer colours --layer-0 ... --layer-5
_VARIABLES = {INK: "--ink", SOFT: "--soft", LINE: "--line", PAGE: "--card"}
_VARIABLES |= {f"#0b0c{i:02x}": f"--mark-{i}" for i in range(MARKS)}
_VARIABLES |= {f"#0b0d{i:02x}": f"--layer-{i}" for i in range(LAYERS)}

DASHES = ("-", "--", ":", "-.")  # solid, and the others in turn for the variants of a method

# Relative residual of an expert, log scale around 1: below 1 it explains something of the layer's output, above it is
# worse than the zero function. Both ends stay apart for the colour-blind and on paper.
RESIDUAL_MIN, RESIDUAL_MAX = 0.5, 2.0
RESIDUAL_COLOURS = LinearSegmentedColormap.from_list(
    "residual", ["#1b5fa8", "#86b6e0", "#f5f3ee", "#f0a868", "#b4480f"]
)
# How many neurons came from an expert, from none to the most.
COUNT_COLOURS = LinearSegmentedColormap.from_list("count", ["#f5f3ee", "#86b6e0", "#1b5fa8"])

_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "flex",
    "text.parse_math": False,
    "font.size": 8.5,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


def mark(index: int) -> str:
    """Stand-in for the colour of method number `index`."""
    return f"#0b0c{index % MARKS:02x}"


def stops(colours: LinearSegmentedColormap) -> list[str]:
    """Nine colours from one end of a scale to the other, for its legend."""
    return [to_hex(colours(i / 8)) for i in range(9)]


def residual_stops() -> list[str]:
    """The colours of the residual scale from RESIDUAL_MIN over 1 to RESIDUAL_MAX."""
    return stops(RESIDUAL_COLOURS)


def comparison_panel(
    labels: Sequence[str],
    marks: Sequence[int],
    seeds: Sequence[Sequence[float]],
    texts: Sequence[str],
    limit: float,
    alt: str,
) -> str:
    """One bar per method (its mean), one dot per seed, the number at the end. Values in the unit of the axis.

    A bar longer than `limit` is cut: it ends there, with a gap in it.
    """
    with matplotlib.rc_context(_SETTINGS):
        left = 0.12 + 0.072 * max(map(len, labels))
        figure, axes = _panel(height=0.15 + 0.235 * len(labels), left=min(left, 1.4), bottom=0.04)
        axes.grid(False)
        rows = np.arange(len(labels))
        for row, index, values, text in zip(rows, marks, seeds, texts, strict=True):
            finite = [value for value in values if math.isfinite(value)]
            mean = sum(finite) / len(finite) if finite else 0.0
            axes.barh(row, min(mean, limit), height=0.62, color=mark(index), alpha=0.85, linewidth=0)
            if mean > limit:
                axes.plot([limit * 0.86, limit * 0.9], [row + 0.3, row - 0.3], color=PAGE, linewidth=3)
            dots = [value for value in finite if value <= limit]
            if dots:  # an empty line would count as a point in the layout
                axes.plot(dots, [row] * len(dots), "o", ms=4, mfc=PAGE, mec=INK, mew=0.8, clip_on=False, zorder=3)
            end = min(limit, max([mean, *finite]))
            axes.text(end + limit * 0.06, row, text, va="center", ha="left", color=INK)
        axes.set_yticks(rows, labels, color=INK)
        axes.set_xticks([])
        axes.set_xlim(0, limit * 1.3)
        axes.set_ylim(len(labels) - 0.45, -0.55)
        axes.spines["bottom"].set_visible(False)
        return _svg(figure, alt)


def loss_panel(
    series: Sequence[tuple[int, int, list[list[tuple[int, float]]]]], limits: tuple[float, float], log: bool, alt: str
) -> str:
    """Training loss over the rounds of one client: (method mark, dash, one list of (round, loss) per seed).

    Seeds are thin lines, their mean a thick one.
    """
    with matplotlib.rc_context(_SETTINGS):
        figure, axes = _panel(height=1.5)
        for index, dash, seeds in series:
            style = {"color": mark(index), "linestyle": DASHES[dash]}
            by_round: dict[int, list[float]] = {}
            for points in seeds:
                for round_index, loss in points:
                    by_round.setdefault(round_index, []).append(loss)
                if len(seeds) > 1:
                    axes.plot(*zip(*points, strict=True), linewidth=0.6, alpha=0.55, color=mark(index))
            rounds = sorted(by_round)
            means = [sum(by_round[r]) / len(by_round[r]) for r in rounds]
            axes.plot(rounds, means, marker="o" if len(rounds) == 1 else None, ms=4, **style)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(*limits)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("round")
        return _svg(figure, alt)


def heat_panel(
    residuals: Sequence[Sequence[float]], chosen: Sequence[int | None], layers: Sequence[int], alt: str
) -> str:
    """Relative residual of every expert (columns) in every layer (rows) of one client; a ring marks the chosen one."""
    norm = Normalize(math.log(RESIDUAL_MIN), math.log(RESIDUAL_MAX), clip=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        grid = np.log(_grid(residuals))
    rings = [(expert, row) for row, expert in enumerate(chosen) if expert is not None]
    return _map(grid, norm, RESIDUAL_COLOURS, rings, layers, alt)


def count_panel(counts: Sequence[Sequence[int]], most: int, layers: Sequence[int], alt: str) -> str:
    """How many neurons of every expert (columns) went into the graft of every layer (rows) of one client."""
    return _map(_grid(counts), Normalize(0, most), COUNT_COLOURS, [], layers, alt)


def _grid(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
    """[layers, experts]; NaN where a layer has fewer experts than another."""
    grid = np.full((len(rows), max(map(len, rows))), np.nan)
    for own, values in zip(grid, rows, strict=True):
        own[: len(values)] = [math.nan if value is None else value for value in values]
    return grid


def _map(
    grid: np.ndarray,
    norm: Normalize,
    colours: LinearSegmentedColormap,
    rings: Sequence[tuple[int, int]],
    layers: Sequence[int],
    alt: str,
) -> str:
    num_rows, width = grid.shape
    with matplotlib.rc_context(_SETTINGS):
        figure, axes = _panel(height=min(2.4, 0.5 + 0.17 * num_rows))
        axes.grid(False)
        axes.imshow(grid, norm=norm, cmap=colours, aspect="auto", interpolation="none")
        if rings:
            size = max(2.5, min(6.0, 90 / width))
            axes.plot(*zip(*rings, strict=True), "o", ms=size, mfc="white", mec="black", mew=1.1, linestyle="none")
        axes.set_yticks(*_thinned(layers, 8))
        axes.set_xticks(*_thinned(range(width), 8))
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        for spine in axes.spines.values():
            spine.set_visible(False)
        return _svg(figure, alt)


def openness_panel(rounds: Sequence[int], openings: Sequence[Sequence[float]], limit: float, alt: str) -> str:
    """Mean opening of the gate over the rounds, one line per layer, its number at the end of the line."""
    with matplotlib.rc_context(_SETTINGS):
        figure, axes = _panel(height=1.7)
        ends = []
        for layer, values in enumerate(openings):
            index = round(layer * (LAYERS - 1) / max(1, len(openings) - 1))
            axes.plot(rounds, values, color=f"#0b0d{index:02x}", marker="o" if len(rounds) == 1 else None, ms=4)
            ends.append((values[-1], layer))
        step = math.ceil(len(ends) / 8)
        named = sorted(end for end in ends if end[1] % step == 0 and math.isfinite(end[0]))
        for (_, layer), height in zip(named, _apart([value for value, _ in named], limit * 0.085, limit), strict=True):
            axes.annotate(f" {layer}", (rounds[-1], height), va="center", ha="left", color=INK, annotation_clip=False)
        axes.set_ylim(0, limit)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        axes.set_xlabel("round")
        return _svg(figure, alt)


def _panel(height: float, left: float = 0.34, bottom: float = 0.34) -> tuple[Figure, Axes]:
    """A figure 2.7 inches wide: shown about 300 pixels wide, its text is then as large as the page's small text.

    Margins in inches, fixed: panels side by side then have equal axes (and no layout has to be solved).
    """
    width, right, top = 2.7, 0.12, 0.06
    figure = Figure(figsize=(width, height))
    figure.patch.set_alpha(0)
    box = (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    return figure, figure.add_axes(box)


def _apart(values: Sequence[float], gap: float, top: float) -> list[float]:
    """Ascending values moved so that neighbours lie at least `gap` apart and none above `top`."""
    moved: list[float] = []
    for value in values:
        moved.append(max(value, moved[-1] + gap) if moved else value)
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], moved[i + 1] - gap if i + 1 < len(moved) else top)
    return moved


def _thinned(labels: Sequence[int], at_most: int) -> tuple[list[int], list[str]]:
    """Positions and labels of at most so many ticks."""
    step = math.ceil(len(labels) / at_most)
    positions = list(range(0, len(labels), step))
    return positions, [str(labels[position]) for position in positions]


def _svg(figure: Figure, alt: str) -> str:
    """The figure as an <svg> element for the middle of a page: themed, without identifiers that would occur twice."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' id="(?:figure|axes|patch|text|matplotlib\.axis|xtick|ytick|line2d|legend)_\d+"', "", text)
    shape = re.search(r'viewBox="[^"]*"', text)[0]
    text = f'<svg {shape} role="img" aria-label="{escape(alt)}">' + text[text.index(">") + 1 :]
    own = sha256(text.encode()).hexdigest()[:8]  # markers that two drawings share have one name in both
    text = re.sub(r'(id="|href="#|url\(#)(?=\w)', rf"\g<1>x{own}-", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return re.sub(r"\n\s*", "\n", text).strip()
