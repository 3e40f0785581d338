"""From measurements to `RESULTS.md`: what is known of the machine, the dense ceiling, the tables."""

import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.layers import TRANSFORMERS
from benchmarks.shapes import Shape
from benchmarks.tables import table, write_sections
from benchmarks.verdict import BEST, FORWARD, TRAINING, verdict
from flex_kernels.backends import native

RESULTS = Path(__file__).with_name("RESULTS.md")
TITLE = "# The layer on a CPU, measured\n"
INTRODUCTION = """Best of several rounds; GFLOP/s count useful operations only; every provider has the same frozen
experts, and a graft as wide as an expert (`layers.py`). "Dense" is `torch.mm` of 2048 x 2048 x 2048 in fp32, measured
beside each layer. "Saved" is what autograd keeps for the backward, weights not counted. Scoring (`bench_score.py`) runs
all experts on all tokens; its "products" are the bare matrix products of the same rows by `torch.mm`, its "published"
the forward of every expert with all outputs kept. Transformers' `batched_mm` is no column: it copies the weights of
every token's experts, 26 GB at mid-2048 in fp32 (`NOTES.md` has what it takes where it fits). Written by `make bench`,
a section for each instruction set; this is how another one is forced, on both sides:

    FLEX_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 make bench

Your shape, and your kernel beside it, without touching this file ([how](../CONTRIBUTING.md)):

    make bench SHAPE=512,2048,60,4,1408 PEER=my_kernels:MyExperts
"""
LEGEND = f"""| column | what it says |
|---|---|
| GFLOP/s, of dense | useful operations a second, beside a dense product there in fp32 (bf16 may exceed 100 %) |
| ... ms | the best round of that provider; – where it was not measured |
| {BEST} | time of the fastest other provider over flex's: above 1 flex is faster |
| saved MB, of grouped_mm | what autograd keeps for the backward, and beside what grouped_mm keeps |
"""


@dataclass(frozen=True)
class Ceiling:
    """Dense matrix products of PyTorch, in GFLOP/s."""

    float32: float
    bfloat16: float


@dataclass(frozen=True)
class Row:
    """One number: a provider on a shape."""

    shape: Shape
    dtype: str
    what: str  # forward or training
    provider: str
    seconds: float
    saved_bytes: int | None
    ceiling: Ceiling

    @property
    def gflops(self) -> float:
        flops = self.shape.forward_flops if self.what == "forward" else self.shape.training_flops
        return flops / self.seconds / 1e9

    def extra_info(self) -> dict[str, float | int | None]:
        return {
            "gflops": round(self.gflops, 1),
            "percent_of_dense_float32": round(100 * self.gflops / self.ceiling.float32, 1),
            "saved_bytes": self.saved_bytes,
        }


@dataclass(frozen=True)
class ScoreRow:
    """One number: a provider scoring all experts on all tokens of a shape."""

    shape: Shape
    dtype: str
    provider: str  # flex, products or published
    seconds: float

    @property
    def gflops(self) -> float:
        shape = self.shape
        flops = 6 * shape.num_tokens * shape.num_experts * shape.hidden_size * shape.intermediate_size
        return flops / self.seconds / 1e9


@dataclass(frozen=True)
class PlanRow:
    """One number: a provider planning a shape's pairs."""

    shape: Shape
    provider: str  # flex, sort + bincount or torch
    seconds: float


def measure_ceiling(size: int = 2048) -> Ceiling:
    def best(run: Callable[[], object]) -> float:
        run()
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return 2 * size**3 / min(seconds) / 1e9

    a, b = torch.randn(size, size), torch.randn(size, size)
    a16, b16 = a.bfloat16(), b.bfloat16()
    return Ceiling(best(lambda: a @ b.T), best(lambda: a16 @ b16.T))


def isa() -> str:
    return os.environ.get("FLEX_ISA") or native.module().available_isas()[0]


def machine() -> str:
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        name = found.group(1) if found else name
    capability = torch.backends.cpu.get_cpu_capability()
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
    return (
        f"{name}, {torch.get_num_threads()} threads, {platform.system()} {platform.machine()}; csrc on {isa()}, "
        f"torch on {capability}; {versions}, Python {platform.python_version()}; {time.strftime('%Y-%m-%d')}."
    )


def section(rows: list[Row], command: str) -> str:
    measured = dict.fromkeys(row.provider for row in rows)
    peers = [name for name in dict.fromkeys([*TRANSFORMERS, *measured]) if name in measured and name != "flex"]
    header = ["shape", "dtype", "flex ms", "GFLOP/s", "of dense", *(f"{peer} ms" for peer in peers), BEST]
    lines = [machine(), "", f"    {command}", ""]
    for what, title in (("forward", FORWARD), ("training", TRAINING)):
        columns = [*header, "saved MB", "of grouped_mm"] if what == "training" else header
        mine = [row for row in rows if row.what == what and row.provider == "flex"]
        lines += table(columns, [cells_of(row, rows, peers) for row in mine], title)
    ceilings = [row.ceiling for row in rows]
    lines += [
        f"Dense: {min(c.float32 for c in ceilings):.0f} to {max(c.float32 for c in ceilings):.0f} GFLOP/s in fp32, "
        f"{min(c.bfloat16 for c in ceilings):.0f} to {max(c.bfloat16 for c in ceilings):.0f} in bf16.",
        "",
    ]
    return "\n".join(lines)


def cells_of(row: Row, rows: list[Row], names: list[str]) -> list[str]:
    """A row of ours beside the peers of these names; one that was not measured at this place has a dash."""
    place = (row.shape, row.dtype, row.what)
    peers = {peer.provider: peer for peer in rows if (peer.shape, peer.dtype, peer.what) == place}
    others = [peer.seconds for name, peer in peers.items() if name != "flex"]
    cells = [
        row.shape.name,
        row.dtype,
        f"{row.seconds * 1e3:.2f}",
        f"{row.gflops:.0f}",
        f"{100 * row.gflops / row.ceiling.float32:.0f} %",
        *(f"{peers[peer].seconds * 1e3:.2f}" if peer in peers else "–" for peer in names),
        f"{min(others) / row.seconds:.2f}x" if others else "–",
    ]
    if row.saved_bytes is not None:
        grouped = peers.get("grouped_mm")
        share = f"{100 * row.saved_bytes / grouped.saved_bytes:.0f} %" if grouped and grouped.saved_bytes else "–"
        cells += [f"{row.saved_bytes / 1e6:.1f}", share]
    return cells


def scoring_section(rows: list[ScoreRow], command: str) -> str:
    header = ["shape", "dtype", "flex ms", "GFLOP/s", "products ms", "of products", "published ms", "gain"]
    cells = []
    for row in rows:
        if row.provider != "flex":
            continue
        peers = {peer.provider: peer for peer in rows if (peer.shape, peer.dtype) == (row.shape, row.dtype)}
        products, published = peers["products"].seconds, peers["published"].seconds
        outputs = row.shape.num_tokens * row.shape.num_experts * row.shape.hidden_size
        cells.append(
            [
                row.shape.name,
                row.dtype,
                f"{row.seconds * 1e3:.2f}",
                f"{row.gflops:.0f}",
                f"{products * 1e3:.2f}",
                f"{row.seconds / products:.2f}x",
                f"{published * 1e3:.2f}",
                f"{published / row.seconds:.2f}x",
                f"{outputs * getattr(torch, row.dtype).itemsize / 1e6:.1f}",
            ]
        )
    lines = [machine(), "", f"    {command}", "", *table([*header, "[T, E, H] MB"], cells, "Scoring")]
    return "\n".join([*lines, '"[T, E, H]" is what the published way keeps and flex never holds.', ""])


def plan_section(rows: list[PlanRow], command: str) -> str:
    header = ["shape", "pairs", "flex us", "sort + bincount us", "gain", "PyTorch's whole plan us"]
    cells = []
    for shape in dict.fromkeys(row.shape for row in rows):
        seconds = {row.provider: row.seconds for row in rows if row.shape == shape}
        ours, sort, whole = (1e6 * seconds[name] for name in ("flex", "sort + bincount", "torch"))
        pairs = shape.num_tokens * shape.top_k
        cells.append([shape.name, pairs, f"{ours:.1f}", f"{sort:.1f}", f"{sort / ours:.1f}x", f"{whole:.1f}"])
    return "\n".join([machine(), "", f"    {command}", "", *table(header, cells)])


def write(measured: dict[str, str]) -> None:
    """Title -> section; replaces the sections of these titles and leaves the others; the top is of all of them."""
    write_sections(RESULTS, measured, top)


def top(sections: Mapping[str, str]) -> str:
    """What stands above the sections: the verdict of all of them, what the columns mean, what is measured and how."""
    return "\n".join([TITLE, *verdict(sections), LEGEND, INTRODUCTION])


if __name__ == "__main__":  # the top anew, of what is recorded
    write({})
