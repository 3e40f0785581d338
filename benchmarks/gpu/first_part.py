"""What the first minutes on a new card should bring home (`--part first`): is it right at full size, are the bits the
same every time, and where is the time, kernel by kernel, beside transformers' `grouped_mm`.

Then question A: is the product's loop bound by L2? `down` is timed with one program of 128 x 256 on a processor, and
with two of 128 x 128, which read a third more from L2 and hide each other's epilogue. If the two are slower by 15 % or
more, L2 is the wall; if they are faster, the epilogue is.
"""

from dataclasses import replace
from functools import partial

import torch

from benchmarks.gpu import tile_part
from benchmarks.gpu.layer_part import Passes, check
from benchmarks.gpu.record import OURS, Key
from benchmarks.gpu.session import Session
from benchmarks.shapes import Shape
from flex_kernels.backends.triton import launch
from flex_kernels.backends.triton.tile_file import Tile
from flex_kernels.tuning import gemms, name_of

PEER = "grouped_mm"
REPEATS = 20
# Narrow, narrower and more, few and wide: a fault of one kind of shape shows.
TELLING = ("Qwen1.5-MoE-A2.7B", "Qwen3-30B-A3B", "Mixtral-8x7B")
QUESTION_A = (Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 4, 3, 2), Tile(128, 128, 64, 8, 4))


def measure(session: Session) -> None:
    tokens = session.tokens[0]
    for model in session.models:
        if (session.tiny or model.name in TELLING) and session.wanted("first", model.name, tokens, "kernels"):
            key = Key("first", model.name, tokens, "right", OURS)
            session.attempt(key, partial(measure_layer, session, model, tokens))
    if session.device.kind == "cuda" and session.wanted("first", session.models[0].name, tokens, "question A"):
        key = Key("first", session.models[0].name, tokens, "question A", OURS)
        session.attempt(key, partial(question_a, session, key, session.models[0], tokens))


def measure_layer(session: Session, model: Shape, tokens: int) -> None:
    """Right, the same bits, and both providers' kernels.

    A wrong layer is written down as wrong, and timed all the same: which kernel is odd may tell which is wrong.
    """
    layers = session.layers(model, tokens)
    passes = {name: Passes(layers, layers.modules[name]) for name in (OURS, PEER)}
    ours, theirs = (passes[name].both() for name in (OURS, PEER))
    wrong = ""
    try:
        check(ours, theirs, layers.dtype, PEER)
    except AssertionError as error:
        wrong = str(error)
    same = all(torch.equal(a, b) for _ in range(REPEATS) for a, b in zip(ours, passes[OURS].both(), strict=True))
    place = ("first", model.name, tokens)
    session.record.add(Key(*place, "right", OURS), right=not wrong, wrong=wrong)
    session.record.add(Key(*place, "same bits", OURS), same_bits=same, repeats=REPEATS)
    for name in (PEER, OURS):
        kernels = session.device.kernels(passes[name].both)
        session.record.add(Key(*place, "kernels", name), kernels=kernels)


def question_a(session: Session, key: Key, model: Shape, tokens: int) -> None:
    session.device.release()
    sizes = tile_part.sizes_of(replace(model, num_tokens=tokens))
    down = gemms(sizes, session.dtype, launch.target_of(session.torch_device))["down"]
    times = session.measure({name_of(tile): partial(down, tile) for tile in QUESTION_A})
    session.record.add(key, tiles={name: row["ms"] for name, row in times.items()})
