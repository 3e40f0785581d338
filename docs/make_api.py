"""Writes docs/api.md, the reference of `flex_kernels`, from the docstrings.

    python docs/make_api.py

A test compares the page with what this would write, so it cannot fall behind.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import flex_kernels

PAGE = Path(__file__).resolve().parent / "api.md"
CHAPTERS = {
    "The layer": ["grafted_experts", "GraftedMoE", "Graft", "LoraGraft"],
    "transformers": ["register", "explain", "moe_layers", "expert_weights", "ExpertWeights", "LayerPath"],
    "Grafts on a transformers model": [
        *("attach_graft", "detach_graft", "train_grafts", "save_grafts", "load_grafts", "graft_callback"),
    ],
    "Experts in 8 and 4 bits": [
        *("prepare_experts", "prepare_shared_experts", "load_prepared", "save_prepared", "FrozenWeight"),
    ],
    "Router, gate and sum": ["grafted_route", "route", "routing_plan", "graft_logits", "combine"],
    "Scoring components": ["score_experts", "score_neurons"],
    "Choosing one expert": ["*one_expert"],
    "Several experts": ["*subsets"],
    "Neurons": ["*neurons"],
    "Refit": ["*refit"],
    "Sums of batches": ["*sums"],
}
INTRODUCTIONS = {
    "transformers": "transformers_plug",
    "Grafts on a transformers model": "grafts",
    "Experts in 8 and 4 bits": "weights",
    "Choosing one expert": "selection.one_expert",
    "Several experts": "selection.subsets",
    "Neurons": "selection.neurons",
    "Refit": "selection.refit",
    "Sums of batches": "selection.sums",
}
SECTIONS = ("Args", "Returns", "Raises")


def page() -> str:
    """The whole page; every public name stands in exactly one chapter."""
    chapters = {title: list(_names(names)) for title, names in CHAPTERS.items()}
    told = [name for names in chapters.values() for name in names]
    if sorted(told) != sorted(flex_kernels.__all__):
        sys.exit(f"CHAPTERS and flex_kernels.__all__ differ: {sorted(set(told) ^ set(flex_kernels.__all__))}")
    lines = ["# flex_kernels", "", "From the docstrings, by `python docs/make_api.py`.", "", *_sizes()]
    for title, names in chapters.items():
        lines += [f"## {title}", ""]
        if title in INTRODUCTIONS:
            lines += [inspect.getdoc(_module(INTRODUCTIONS[title])), ""]
        for name in names:
            lines += _entry(name, getattr(flex_kernels, name))
    return "\n".join(lines).rstrip() + "\n"


def _names(names: list[str]) -> Iterator[str]:
    for name in names:
        if name.startswith("*"):
            home = f"flex_kernels.selection.{name[1:]}"
            yield from (public for public in flex_kernels.__all__ if _home(public) == home)
        else:
            yield name


def _home(name: str) -> str:
    return getattr(flex_kernels, name).__module__


def _module(name: str) -> ModuleType:
    return sys.modules[f"flex_kernels.{name}"]


def _sizes() -> list[str]:
    return [
        "In shapes: `T` tokens, `H` hidden size, `E` experts of intermediate width `I`, top-`K`; a graft has width",
        "`I_g`. `E(x) = D (act(G x) * (U x))`; `gate_up_proj` holds the rows of `G`, then those of `U`, `down_proj` is",
        "`D`.",
        "A *twin* is the same operation in `flex_kernels/reference.py`, in plain PyTorch: the specification.",
        "",
    ]


def _entry(name: str, thing: Any, level: int = 3) -> list[str]:
    lines = [f"{'#' * level} {name}", ""]
    if isinstance(thing, property):
        return [*lines, *_text(inspect.getdoc(thing))]
    lines += ["```python", _signature(name.rpartition(".")[2], thing), "```", "", *_text(inspect.getdoc(thing))]
    if inspect.isclass(thing) and not issubclass(thing, tuple):
        for member, value in vars(thing).items():
            told = inspect.isfunction(value) or isinstance(value, property)
            if told and not member.startswith("_") and member != "extra_repr":
                lines += _entry(f"{name}.{member}", value, level + 1)
    return lines


def _signature(name: str, thing: Any) -> str:
    signature = inspect.signature(thing)
    kept = [parameter for parameter in signature.parameters.values() if parameter.name != "self"]
    text = f"{name}{signature.replace(parameters=kept)}".replace("torch.Tensor", "Tensor")
    text = re.sub(r"torch\.nn\.modules\.module\.Module", "nn.Module", text)
    return re.sub(r"flex_kernels\.(\w+\.)+", "", text)


def _text(docstring: str | None) -> list[str]:
    """A docstring as Markdown: its sections become lists, the rest stays."""
    lines, section = [], None
    for line in (docstring or "").splitlines():
        if line.rstrip(":") in SECTIONS and line.endswith(":"):
            section = line.rstrip(":")
            lines += [f"**{section}**", ""]
        elif section is None or not line.strip():
            section = section if line.strip() else None
            lines.append(line.rstrip())
        elif line.startswith("        "):  # an item goes on
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(f"- {line.strip()}" if section != "Returns" else line.strip())
    return [*lines, ""]


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
