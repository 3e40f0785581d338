"""The bricks of the report page: tables, chips, figures. Whatever is not markup of our own is escaped here, or by the
caller with `escape` where it builds a cell itself."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any

from flex.report.numbers import CONTROLS, METHODS, Event, Job, Measure, collect_jobs, summarise

Row = dict[str, Any]

MAX_PANELS = 16  # small multiples beyond this are left out, and the page says how many


@dataclass(frozen=True)
class Run:
    """What the sections are written from."""

    events: list[Event]
    config_text: str = ""

    @cached_property
    def summary(self) -> list[Row]:
        return summarise(self.events)

    @cached_property
    def jobs(self) -> list[Job]:
        return collect_jobs(self.events)

    @cached_property
    def header(self) -> Event:
        """The `run` event that the trainer writes first (the last one, if it was resumed); empty if there is none."""
        return next((event for event in reversed(self.events) if event["event"] == "run"), {})

    @cached_property
    def strategy(self) -> str:
        """How the server aggregates, by the configuration; empty where that is not known."""
        try:
            return str(tomllib.loads(self.config_text).get("train", {}).get("strategy", ""))
        except (tomllib.TOMLDecodeError, AttributeError):
            return ""

    @cached_property
    def rows(self) -> dict[str, Row]:
        return {row["method"]: row for row in self.summary}

    @cached_property
    def clients(self) -> list[str]:
        """In the order of the `run` event, then whoever occurs only in the events of the jobs."""
        declared = [str(client["client_id"]) for client in self.header.get("clients") or []]
        seen = sorted({str(event["client_id"]) for event in self.events if event.get("client_id") is not None})
        return list(dict.fromkeys(declared + seen))

    @cached_property
    def marks(self) -> dict[str, int]:
        """The colour of every method, the same wherever it occurs."""
        known = list(METHODS)
        others = [method for method in self.rows if method not in known]
        return {m: known.index(m) if m in known else len(known) + others.index(m) % 3 for m in self.rows}

    def jobs_of(self, method: str) -> list[Job]:
        return [job for job in self.jobs if job.method == method]


def dash(method: str) -> int:
    """Line style, so that no reading depends on colour alone: 1, 2, 3 in turn for the controls, 0 for the others."""
    return CONTROLS.index(method) % 3 + 1 if method in CONTROLS else 0


def chip(run: Run, method: str) -> str:
    style = f"color:var(--mark-{run.marks[method]})"
    return f'<span class="chip dash{dash(method)}" style="{style}"></span>'


def legend(run: Run, methods: Iterable[str]) -> str:
    items = "".join(f"<span>{chip(run, m)}{escape(run.rows[m]['label'])}</span>" for m in methods)
    return f'<div class="legend">{items}</div>'


def method_cell(run: Run, row: Row) -> str:
    return f'<th scope="row">{chip(run, row["method"])}{escape(row["label"])}</th>'


def stat_cell(measure: Measure, stat: dict[str, Any] | None) -> str:
    if stat is None:
        return "<td>–</td>"
    spread = f" <small>± {measure.format(stat['spread'])}</small>" if stat["spread"] is not None else ""
    return f"<td>{measure.format(stat['mean'])}{spread}</td>"


def table(head: Sequence[str], rows: Iterable[str], text_columns: Sequence[int] = ()) -> str:
    """`head` holds markup; each of `rows` is a whole <tr>. Wide tables scroll inside the page."""
    cells = "".join(
        f'<th scope="col"{" class=text" if i in text_columns else ""}>{title}</th>' for i, title in enumerate(head)
    )
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def table_row(cells: Iterable[str], emphasised: bool = False) -> str:
    return f"<tr{' class=main' if emphasised else ''}>{''.join(cells)}</tr>"


def cell(text: object, kind: str = "") -> str:
    """One escaped cell; kind "text" for words, "warn" for what a reader must not miss."""
    return f"<td{f' class={kind}' if kind else ''}>{escape(str(text))}</td>"


def figure(svg: str, caption: str, remark: str = "") -> str:
    small = f"<small>{escape(remark)}</small>" if remark else ""
    return f"<figure><figcaption>{escape(caption)}{small}</figcaption>{svg}</figure>"


def panels(items: Iterable[str], wide: bool = False) -> str:
    return f'<div class="panels{" wide" if wide else ""}">{"".join(items)}</div>'


def left_out(count: int) -> str:
    return f'<p class="note">{count - MAX_PANELS} more clients are not drawn.</p>' if count > MAX_PANELS else ""


def section(title: str, intro: str, *body: str) -> str:
    """`intro` and `body` are markup; a section without a body does not appear."""
    content = "".join(body)
    if not content:
        return ""
    return f"<section><h2>{escape(title)}</h2>{f'<p class=note>{intro}</p>' if intro else ''}{content}</section>"


def folded(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>" if body else ""
