"""Compiles every candidate of the sweep for its chip, on all processors, without a device (`--part tiles`).

What it leaves in Triton's cache is what the sweep launches, so that no device waits for a compiler; and a candidate
that spills registers in the loop of its product, or wants more shared memory than there is, is known before it costs
a measurement.
"""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace

import torch

from benchmarks.gpu.record import Key
from benchmarks.gpu.session import OutOfTime, Session
from benchmarks.shapes import MODELS, Shape
from flex_kernels.backends.triton import launch, tiles
from flex_kernels.backends.triton.tile_file import KERNELS, ExpertTiles, Tile
from flex_kernels.tuning import Sizes, all_candidates, gemms, name_of

GEMM_OF = {
    "gate_up": "_gate_up_fwd_kernel",
    "down": "_grouped_rows_kernel",
    "d_preactivations": "_d_preactivations_kernel",
    "d_hidden": "_grouped_rows_kernel",
}
# Triton compiles anew where an integer becomes a multiple of 16. Of the five models only the experts' number does so.
CLASSES = {"60 experts": MODELS[0], "64 experts": MODELS[1]}
KEPT = ("registers", "spills", "loop_spills", "shared_bytes", "hgmma", "hgmma_waits", "resident", "compile_s")
TOKENS = 8192


def sizes_of(shape: Shape) -> Sizes:
    """With the graft as wide as an expert."""
    width = shape.intermediate_size
    return Sizes(shape.num_tokens, shape.top_k, shape.hidden_size, width, width, shape.num_experts)


def default_tiles(target: launch.Target, dtype: torch.dtype, shape: Shape) -> ExpertTiles:
    """What the tables say, whatever this machine's user has measured."""
    few = tiles.few_rows(shape.num_tokens * shape.top_k, shape.num_experts)
    return tiles.table_tiles(target, dtype, few, (shape.hidden_size, shape.intermediate_size, shape.intermediate_size))


def compile_one(chip: str, kernel: str, tile: Tile, model: Shape) -> dict[str, object]:
    """Registers, spills and the like of one candidate; {"error"} where the compiler refuses it."""
    from benchmarks import aot

    found: dict[str, aot.Compiled] = {}
    with aot.compiling_for(chip, found):
        target = aot.CHIPS[chip].target
        try:
            gemms(sizes_of(model), torch.bfloat16, target)[kernel](tile)
        except Exception as error:  # whatever a compiler says of a tile that it cannot do
            return {"error": (str(error).strip() or repr(error)).splitlines()[0][:200]}
    compiled = next(row for row in found.values() if row.kernel == GEMM_OF[kernel])
    return {**{name: asdict(compiled)[name] for name in KEPT}, "faults": compiled.faults(outside_the_loop=False)}


def jobs(chip: str, tiny: bool) -> Iterator[tuple[Key, tuple[str, str, Tile, Shape]]]:
    from benchmarks import aot

    target = aot.CHIPS[chip].target
    for (name, model), kernel in ((pair, kernel) for pair in CLASSES.items() for kernel in KERNELS):
        shape = replace(model, num_tokens=TOKENS)
        default = getattr(default_tiles(target, torch.bfloat16, shape), kernel)
        for tile in [default] if tiny else all_candidates(kernel, default):
            yield Key("tiles", name, 0, kernel, name_of(tile)), (chip, kernel, tile, shape)


def measure(session: Session, chip: str = "sm90") -> None:
    wanted = [(key, job) for key, job in jobs(chip, session.tiny) if key not in session.record.figures or session.again]
    if not wanted:
        return
    with ProcessPoolExecutor(session.jobs or os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        running = [(key, pool.submit(compile_one, *job)) for key, job in wanted]
        try:
            for key, future in running:
                session.record.add(key, **future.result(timeout=max(session.seconds_left(), 1)))
        except TimeoutError:
            raise OutOfTime from None
        finally:
            pool.shutdown(cancel_futures=True)


def refused(session: Session, model: Shape, kernel: str, tile: Tile) -> str | None:
    """Why a candidate is not worth a measurement, as far as the compiler was asked."""
    name = "64 experts" if model.num_experts % 16 == 0 else "60 experts"
    row = session.record.figures.get(Key("tiles", name, 0, kernel, name_of(tile)))
    if row is None:
        return None
    return row.get("error") or ", ".join(row["faults"]) or None
