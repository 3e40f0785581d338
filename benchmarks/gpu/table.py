"""The record as tables: a section of RESULTS.md for each device, the others left as they are (see `results.py`)."""

from pathlib import Path

from benchmarks.gpu.record import OURS, Key, Record
from benchmarks.results import top
from benchmarks.tables import table, write_sections

PEERS = ("grouped_mm", "eager", "raw grouped_mm", "liger")
BARE, BOUND = "flex bare", "bmm"
MOST_KERNELS = 10  # of a provider, by name


def write(record: Record, path: Path, command: str) -> None:
    write_sections(path, {record.machine["device"]: section(record, command)}, top)


def section(record: Record, command: str) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in record.machine.items() if name != "device")
    copy, matmul = record.ceiling("copy"), record.ceiling("matmul")
    lines = [
        f"{machine}. Medians; L2 flushed before every run; useful operations only; bf16.",
        "",
        f"    {command}",
        "",
        "Ceilings measured in the same way: "
        f"{number(copy, 0)} GB/s copied, {number(matmul, 0)} TFLOP/s of bf16 products of random matrices.",
        "",
        *first_table(record),
        *layer_table(record),
        *graft_table(record),
        *simple_table(record, "plan", "The routing plan"),
        *simple_table(record, "scoring", "Scoring a layer"),
        *simple_table(record, "step", "A training step of the whole model"),
        *simple_table(record, "round", "A round of the whole model"),
        *simple_table(record, "small", "Few tokens, no gradients"),
        *fact_lines(record),
        *skipped_lines(record),
    ]
    return "\n".join(lines)


def first_table(record: Record) -> list[str]:
    """The kernels of a forward and backward, the longest first; what is left is one row."""
    rows = []
    for key, row in record.figures.items():
        if (key.part, key.what) != ("first", "kernels") or not row["kernels"]:
            continue
        kernels = list(row["kernels"].items())
        shown = [*kernels[:MOST_KERNELS]]
        if rest := kernels[MOST_KERNELS:]:
            shown.append(("all others", [sum(us for _, (us, _) in rest), sum(count for _, (_, count) in rest)]))
        whole = sum(us for _, (us, _) in kernels)
        for name, (us, count) in shown:
            cells = [key.shape, key.tokens, key.provider, name[:60].replace("|", "/"), int(count)]
            rows.append([*cells, number(us / 1e3, 3), percent(100 * us / whole)])
    columns = ["shape", "T", "provider", "kernel", "launches", "ms", "of all"]
    return table(columns, rows, "Kernel by kernel, one forward and backward")


def layer_table(record: Record) -> list[str]:
    columns = ["shape", "T", "pass", "flex ms", "spread", "of ceiling", *(f"{peer} x" for peer in PEERS), "bmm x"]
    columns += ["saved MB", "of grouped_mm", "peak MB", "launches"]
    rows = []
    for key, row in record.figures.items():
        if (key.part, key.provider) != ("layers", OURS):
            continue
        ratios = [ratio(record, key, peer) for peer in (*PEERS, BOUND)]
        theirs = record.figures.get(key._replace(provider="grouped_mm"), {}).get("saved_bytes")
        saved = row.get("saved_bytes")
        cells = [key.shape, key.tokens, key.what, number(row["ms"], 3), spread(row)]
        cells += [percent(row.get("percent_of_ceiling")), *ratios]
        cells += [number(saved and saved / 1e6), percent(100 * saved / theirs if saved and theirs else None)]
        cells += [number(row["peak_bytes"] and row["peak_bytes"] / 1e6), number(row["launches"], 0)]
        rows.append(cells)
    title = "The layer with one graft (x: that provider's time over flex's; bmm is a bound, not a layer)"
    return table(columns, rows, title)


def graft_table(record: Record) -> list[str]:
    """What the graft adds in time, over its share of the operations: 1.0 is as fast as the rest."""
    rows = []
    for key, row in record.figures.items():
        bare = record.figures.get(key._replace(provider=BARE))
        if (key.part, key.provider) == ("layers", OURS) and bare:
            operations = row["tflop_s"] * row["ms"] / (bare["tflop_s"] * bare["ms"])
            cells = [key.shape, key.tokens, key.what, number(bare["ms"], 3), number(row["ms"], 3)]
            rows.append([*cells, number(row["ms"] / bare["ms"], 3), number(operations, 3)])
    return table(["shape", "T", "pass", "bare ms", "ms", "time x", "operations x"], rows, "What the graft costs")


def simple_table(record: Record, part: str, title: str) -> list[str]:
    columns = ["shape", "T", "what", "provider", "ms", "spread", "flex is", "of ceiling", "peak MB", "launches"]
    columns += ["wall ms", "tokens/s"]
    rows = []
    for key, row in record.figures.items():
        if key.part == part and "ms" in row:
            peak = row.get("peak_bytes")
            cells = [key.shape, key.tokens, key.what, key.provider, number(row["ms"], 3), spread(row)]
            cells += [ratio(record, key._replace(provider=OURS), key.provider), percent(row.get("percent_of_ceiling"))]
            cells += [number(peak and peak / 1e6), number(row.get("launches"), 0)]
            cells += [number(row.get("wall_ms"), 3), number(row.get("tokens_per_s"), 0)]
            rows.append(cells)
    return table(columns, rows, title)


def fact_lines(record: Record) -> list[str]:
    """What is no time of a run: right or wrong, the same bits, the first call, the sanitizer."""
    lines = []
    for key, row in record.figures.items():
        if key.part in ("first", "first call", "sanitize") and "kernels" not in row:
            facts = ", ".join(f"{name} {value}" for name, value in row.items() if name != "measured")
            lines.append(f"- {key.part}, {key.shape}, {key.what}: {facts}")
    return [*lines, ""] if lines else []


def skipped_lines(record: Record) -> list[str]:
    """The tiles that the sweep left out are in its own file."""
    lines = [f"- {' '.join(map(str, key))}: {why}" for key, why in record.skipped.items() if key.part != "sweep"]
    return ["Not measured:", "", *lines] if lines else []


def ratio(record: Record, ours: Key, peer: str) -> str:
    a, b = record.figures.get(ours), record.figures.get(ours._replace(provider=peer))
    return f"{b['ms'] / a['ms']:.2f}x" if a and b else "-"


def spread(row: dict) -> str:
    """From the lower to the upper quartile."""
    return f"{row['ms_low_quartile']:.3f}-{row['ms_high_quartile']:.3f}"


def number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} %"
