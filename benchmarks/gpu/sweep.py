"""Every tile that might do, for each of the four grouped GEMMs of the layer, on each shape (`--part sweep`).

A candidate is a figure with provider "128x256x64 w8 s4 p1 g8"; `FILE-sweep.json` ranks them. `block_m` is common to
the four (`ExpertTiles`), so the ranking also adds up, for each `block_m`, the best of each kernel. `tiles.py` has
one row for all shapes with few rows an expert, and one for many: `tables` says, for each of the two and each `block_m`,
the tiles that lose least over all shapes to each shape's own best, and how much that is.
"""

import itertools
import json
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from torch import Tensor

from benchmarks.gpu import tile_part
from benchmarks.gpu.layer_part import check
from benchmarks.gpu.record import OURS, Key
from benchmarks.gpu.session import Session
from benchmarks.shapes import Shape
from flex_kernels.backends.triton import launch, tiles
from flex_kernels.backends.triton.tile_file import KERNELS, Tile
from flex_kernels.tuning import Gemm, all_candidates, gemms, name_of

# Beside the first two of `TOKENS`, for the class of few rows an expert: all but Mixtral are in it.
FEW_TOKENS = 512
SECONDS_A_CANDIDATE, LEAST_SECONDS = 0.15, 10.0


def measure(session: Session) -> None:
    if session.device.kind == "cpu" and not launch.INTERPRET:
        session.record.skip(Key("sweep", "all", 0, "tiles", OURS), "Triton needs a device, or TRITON_INTERPRET=1")
        return
    if not session.tiny and launch.target_of(session.torch_device).chip == "sm90":
        tile_part.measure(session)
    try:
        # The tables know two classes of rows an expert; more tokens than the first are in the same class.
        tokens_of_both = session.tokens if session.tiny else (*session.tokens[:2], FEW_TOKENS)
        for tokens, model in itertools.product(tokens_of_both, session.models):
            sweep(session, replace(model, num_tokens=tokens))
    finally:
        write_ranking(session)


def sweep(session: Session, shape: Shape) -> None:
    session.device.release()
    target = launch.target_of(session.torch_device)
    defaults = tile_part.default_tiles(target, session.dtype, shape)
    runs = gemms(tile_part.sizes_of(shape), session.dtype, target)
    for kernel, gemm in runs.items():
        default = getattr(defaults, kernel)
        truth = gemm(default)
        tiny = [default, replace(default, block_n=default.block_n // 2)]
        for tile in tiny if session.tiny else all_candidates(kernel, default):
            key = Key("sweep", shape.name, shape.num_tokens, kernel, name_of(tile))
            if not session.again and (key in session.record.figures or _refused_for_good(session, key)):
                continue
            session.require_seconds(LEAST_SECONDS)
            if why := tile_part.refused(session, shape, kernel, tile):
                session.record.skip(key, why)
                continue
            values = session.attempt(key, partial(measured, session, gemm, tile, truth))
            if values is not None:
                session.record.add(key, **values, default=tile == default)


def _refused_for_good(session: Session, key: Key) -> bool:
    """Memory may be there the next time."""
    return key in session.record.skipped and "OutOfMemory" not in session.record.skipped[key]


def measured(session: Session, gemm: Gemm, tile: Tile, truth: list[Tensor]) -> dict[str, float | int]:
    """Held against the default tile's result, then timed."""
    check(gemm(tile), truth, session.dtype, name_of(tile))
    seconds = min(SECONDS_A_CANDIDATE, session.seconds_a_measurement)
    return session.measure({OURS: partial(gemm, tile)}, seconds)[OURS]


def ranking(figures: dict[Key, dict], models: Iterable[Shape]) -> list[dict]:
    """For each shape and number of tokens: all tiles by time, and the best sum for each `block_m`."""
    shapes = {model.name: model for model in models}
    places: dict[tuple[str, int], dict[str, list]] = {}
    for key, row in figures.items():
        if key.part == "sweep":
            kernels = places.setdefault((key.shape, key.tokens), {})
            kernels.setdefault(key.what, []).append((row["ms"], key.provider, row["default"]))
    found = []
    for (shape, tokens), kernels in places.items():
        best_sum = {}
        for block_m in sorted({int(name.partition("x")[0]) for rows in kernels.values() for _, name, _ in rows}):
            fitting = [[row for row in rows if row[1].startswith(f"{block_m}x")] for rows in kernels.values()]
            if all(fitting):
                best_sum[block_m] = {"ms": sum(min(rows)[0] for rows in fitting), "tiles": [min(r)[1] for r in fitting]}
        ranked = {
            kernel: [{"tile": name, "ms": ms, "default": default} for ms, name, default in sorted(rows)]
            for kernel, rows in kernels.items()
        }
        model = shapes[shape]
        few = tiles.few_rows(tokens * model.top_k, model.num_experts)
        place = {"shape": shape, "tokens": tokens, "few_rows": few}
        found.append({**place, "best_sum_by_block_m": best_sum, "kernels": ranked})
    return found


def tables(found: list[dict]) -> list[dict]:
    """Of a ranking: one row for all places of a class, for each `block_m`. 1.00 loses nothing."""
    rows = []
    for few in (True, False):
        places = [place for place in found if place["few_rows"] == few and place["best_sum_by_block_m"]]
        for block_m in sorted({height for place in places for height in place["best_sum_by_block_m"]}):
            chosen, ms = {}, [0.0] * len(places)
            for kernel in KERNELS:
                times = [{row["tile"]: row["ms"] for row in place["kernels"].get(kernel, [])} for place in places]
                common = [tile for tile in times[0] if tile.startswith(f"{block_m}x") and all(tile in t for t in times)]
                if not common:
                    break
                losses = {tile: sum(t[tile] / min(t.values()) for t in times) for tile in common}
                chosen[kernel] = min(losses, key=losses.get)
                ms = [sum_of + t[chosen[kernel]] for sum_of, t in zip(ms, times, strict=True)]
            if len(chosen) == len(KERNELS):
                best = [min(of["ms"] for of in place["best_sum_by_block_m"].values()) for place in places]
                names = [f"{place['shape']}, T={place['tokens']}" for place in places]
                loss = {name: round(own / b, 3) for name, own, b in zip(names, ms, best, strict=True)}
                rows.append({"few_rows": few, "block_m": block_m, "tiles": chosen, "times_of_the_best": loss})
    return rows


def write_ranking(session: Session) -> None:
    path = session.record.path.with_name(session.record.path.stem + "-sweep.json")
    found = ranking(session.record.figures, session.models)
    content = {"machine": session.record.machine, "tables": tables(found), "ranking": found}
    path.write_text(json.dumps(content, indent=1) + "\n")
