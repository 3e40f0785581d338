"""The roofline and the bars, from the record; left out, with a word, where matplotlib is not installed."""

from pathlib import Path

from benchmarks.gpu.record import Record
from benchmarks.shapes import MODELS, TINY_MODELS

BARS_PASS = "fwd+bwd"


def draw(record: Record) -> list[Path]:
    try:
        import matplotlib
    except ImportError:
        print("no pictures: matplotlib is not installed; the same command draws them from the file where it is")
        return []
    matplotlib.use("agg")
    return [path for path in (bars(record), roofline(record)) if path is not None]


def bars(record: Record) -> Path | None:
    """TFLOP/s of every provider, forward and backward, at the number of tokens that was measured first."""
    import matplotlib.pyplot as plt

    rows = {key: row for key, row in record.figures.items() if key.part == "layers" and key.what == BARS_PASS}
    if not rows:
        return None
    tokens = next(iter(rows)).tokens
    shapes = list(dict.fromkeys(key.shape for key in rows if key.tokens == tokens))
    names = list(dict.fromkeys(key.provider for key in rows))
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        found = {key.shape: row["tflop_s"] for key, row in rows.items() if (key.tokens, key.provider) == (tokens, name)}
        places = [shapes.index(shape) + index * width for shape in found]
        axes.bar(places, list(found.values()), width, label=name)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(shapes))], shapes)
    if (ceiling := record.ceiling("matmul")) is not None:
        axes.axhline(ceiling, color="grey", linestyle=":", label="dense product")
    axes.set_ylabel("useful TFLOP/s")
    axes.set_title(f"{record.machine['device']}: forward and frozen backward with a graft, {tokens} tokens")
    axes.legend(fontsize="small", ncols=2)
    return save(record, figure, "bars")


def roofline(record: Record) -> Path | None:
    """TFLOP/s of ours over operations per byte that must be moved (weights once, each activation once in and out)."""
    import matplotlib.pyplot as plt

    copy, matmul = record.ceiling("copy"), record.ceiling("matmul")
    models = {model.name: model for model in (*MODELS, *TINY_MODELS)}
    points = [
        (key, row["tflop_s"], intensity(models[key.shape], key.tokens))
        for key, row in record.figures.items()
        if (key.part, key.what, key.provider) == ("layers", "fwd", "flex")
    ]
    if not points or copy is None or matmul is None:
        return None
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    left, right = min(point[2] for point in points) / 4, max(point[2] for point in points) * 4
    knee = matmul * 1e3 / copy
    ends = sorted({left, min(max(knee, left), right), right})
    axes.loglog(ends, [min(matmul, x * copy / 1e3) for x in ends], color="grey")
    for shape in dict.fromkeys(key.shape for key, _, _ in points):
        own = [(x, y) for key, y, x in points if key.shape == shape]
        axes.loglog(*zip(*own, strict=True), "o", label=shape)
    axes.set_xlabel("operations per byte that must be moved")
    axes.set_ylabel("useful TFLOP/s, forward")
    axes.set_title(f"{record.machine['device']}: flex under the measured roofs")
    axes.legend(fontsize="small")
    return save(record, figure, "roofline")


def intensity(model, tokens: int) -> float:
    wide = model.hidden_size * model.intermediate_size
    rows, hidden = tokens * (model.top_k + 1), tokens * model.hidden_size
    weights = 3 * wide * (min(model.num_experts, tokens * model.top_k) + 1)
    activations = 2 * hidden + rows * (4 * model.intermediate_size + 2 * model.hidden_size)
    return 6 * rows * wide / (2 * (weights + activations))


def save(record: Record, figure, name: str) -> Path:
    import matplotlib.pyplot as plt

    path = record.path.with_name(f"{record.path.stem}-{name}.png")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
