"""The layer beside transformers' `eager` and `grouped_mm` and whoever was added or picked (`layers.py`), on the same
frozen experts, in one process.

`forward` is without gradients; `training` is forward and backward with a trained graft and frozen experts. The best of
several rounds counts: on a shared machine everything else is somebody else's time.
"""

import time
from functools import lru_cache

import pytest
import torch

from benchmarks.layers import CHECKED_TOKENS, Layers
from benchmarks.results import Ceiling, Row, measure_ceiling
from benchmarks.shapes import Shape

MOST_SECONDS = 4.0  # for the rounds of one number
MOST_ROUNDS = 100


@lru_cache(maxsize=1)  # the weights of one layer may be 2 GB
def layers_of(shape: Shape, dtype: torch.dtype, peers: tuple[str, ...]) -> Layers:
    layers = Layers(shape, dtype, peers)
    layers.check()
    return layers


@lru_cache(maxsize=1)
def ceiling_beside(shape: Shape, dtype: torch.dtype) -> Ceiling:
    """Measured anew for each layer: the machine's clock is not the same an hour later."""
    return measure_ceiling()


@pytest.mark.parametrize("what", ["forward", "training"])
def test_layer(
    shape: Shape,
    dtype: torch.dtype,
    what: str,
    layer_provider: str,
    peers: tuple[str, ...],
    benchmark,
    rows: list[Row],
) -> None:
    layers, provider = layers_of(shape, dtype, peers), layer_provider
    run = getattr(layers, what)(provider)
    if not benchmark.enabled:
        benchmark(run)
        return
    short = getattr(layers, what)(provider, CHECKED_TOKENS)
    short()
    start = time.perf_counter()
    short()
    seconds = (time.perf_counter() - start) * max(1.0, shape.num_tokens / CHECKED_TOKENS)
    rounds = int(max(1, min(MOST_ROUNDS, MOST_SECONDS / seconds)))
    benchmark.group = f"{shape.name} {dtype} {what}"
    benchmark.pedantic(run, rounds=max(rounds, 3) if seconds < 10 else 1, warmup_rounds=1 if seconds < 10 else 0)
    row = Row(
        shape=shape,
        dtype=str(dtype).removeprefix("torch."),
        what=what,
        provider=provider,
        seconds=benchmark.stats.stats.min,
        saved_bytes=layers.saved_bytes(provider) if what == "training" else None,
        ceiling=ceiling_beside(shape, dtype),
    )
    benchmark.extra_info.update(row.extra_info())
    rows.append(row)
