"""From measurements to `RESULTS.md`: what is known of the machine, the dense ceiling, the tables."""

import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from shapes import Shape

from flex_kernels.backends import native

RESULTS = Path(__file__).with_name("RESULTS.md")
INTRODUCTION = """# The layer on a CPU, measured

Best of several rounds; GFLOP/s count useful operations only; every provider has the same frozen experts, and a graft as
wide as an expert (`layers.py`). "Dense" is `torch.mm` of 2048 x 2048 x 2048 in fp32, measured beside each layer.
"Saved" is what autograd keeps for the backward, weights not counted. Scoring (`bench_score.py`) runs all experts on all
tokens; its "products" are the bare matrix products of the same rows by `torch.mm`, its "published" the forward of every
expert with all outputs kept. Written by `make bench`, sections for each instruction set; this is how another one is
forced, on both sides:

    FLEX_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 make bench
"""
PEERS = ("grouped_mm", "eager")


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
    lines = [f"## {isa()}", "", machine(), "", f"    {command}", ""]
    header = ["shape", "dtype", "flex ms", "GFLOP/s", "of dense", *(f"{peer} ms" for peer in PEERS), "gain over best"]
    for what, title in (("forward", "Forward, no gradients"), ("training", "Forward and backward, trained graft")):
        columns = [*header, "saved MB", "of grouped_mm"] if what == "training" else header
        lines += [f"### {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        mine = [row for row in rows if row.what == what and row.provider == "flex"]
        lines += [line_of(row, rows) for row in mine] + [""]
    ceilings = [row.ceiling for row in rows]
    lines += [
        f"Dense: {min(c.float32 for c in ceilings):.0f} to {max(c.float32 for c in ceilings):.0f} GFLOP/s in fp32, "
        f"{min(c.bfloat16 for c in ceilings):.0f} to {max(c.bfloat16 for c in ceilings):.0f} in bf16.",
        "",
    ]
    return "\n".join(lines)


def line_of(row: Row, rows: list[Row]) -> str:
    peers = {
        other.provider: other
        for other in rows
        if (other.shape, other.dtype, other.what) == (row.shape, row.dtype, row.what) and other.provider != "flex"
    }
    best = min(peer.seconds for peer in peers.values())
    cells = [
        row.shape.name,
        row.dtype,
        f"{row.seconds * 1e3:.2f}",
        f"{row.gflops:.0f}",
        f"{100 * row.gflops / row.ceiling.float32:.0f} %",
        *(f"{peers[peer].seconds * 1e3:.2f}" for peer in PEERS),
        f"{best / row.seconds:.2f}x",
    ]
    if row.saved_bytes is not None:
        cells += [f"{row.saved_bytes / 1e6:.1f}", f"{100 * row.saved_bytes / peers['grouped_mm'].saved_bytes:.0f} %"]
    return f"| {' | '.join(cells)} |"


def scoring_section(rows: list[ScoreRow], command: str) -> str:
    header = ["shape", "dtype", "flex ms", "GFLOP/s", "products ms", "of products", "published ms", "gain"]
    header.append("[T, E, H] MB")
    lines = [f"## {isa()}, scoring", "", machine(), "", f"    {command}", "", "### Scoring", ""]
    lines += [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in rows:
        if row.provider != "flex":
            continue
        peers = {peer.provider: peer for peer in rows if (peer.shape, peer.dtype) == (row.shape, row.dtype)}
        products, published = peers["products"].seconds, peers["published"].seconds
        outputs = row.shape.num_tokens * row.shape.num_experts * row.shape.hidden_size
        cells = [
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
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", '"[T, E, H]" is what the published way keeps and flex never holds.', ""]
    return "\n".join(lines)


def plan_section(rows: list[PlanRow], command: str) -> str:
    header = ["shape", "pairs", "flex us", "sort + bincount us", "gain", "PyTorch's whole plan us"]
    lines = ["## routing plan", "", machine(), "", f"    {command}", ""]
    lines += [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for shape in dict.fromkeys(row.shape for row in rows):
        seconds = {row.provider: row.seconds for row in rows if row.shape == shape}
        ours, sort, whole = (1e6 * seconds[name] for name in ("flex", "sort + bincount", "torch"))
        pairs = shape.num_tokens * shape.top_k
        lines.append(f"| {shape.name} | {pairs} | {ours:.1f} | {sort:.1f} | {sort / ours:.1f}x | {whole:.1f} |")
    return "\n".join([*lines, ""])


def write(measured: dict[str, str]) -> None:
    """Title -> section; replaces the sections of these titles and leaves the others."""
    old = RESULTS.read_text() if RESULTS.exists() else ""
    sections = {part.partition("\n")[0]: f"## {part}" for part in re.split(r"^## ", old, flags=re.MULTILINE)[1:]}
    sections |= measured
    RESULTS.write_text("\n".join([INTRODUCTION, *(text.rstrip() + "\n" for _, text in sorted(sections.items()))]))
