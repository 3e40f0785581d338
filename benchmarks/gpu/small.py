"""Where the host is the limit: few tokens, with and without a CUDA graph; and the first call."""

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.layer_part import Passes, providers
from benchmarks.gpu.record import OURS, Key
from benchmarks.gpu.session import Session
from benchmarks.shapes import Shape


def measure(session: Session) -> None:
    session.each("small", session.small_tokens, "fwd", measure_few_tokens)
    first = session.models[0]
    if session.wanted("first call", first.name, session.tokens[0], "warm cache"):
        first_call(session)  # which warms the cache
    for name, folder in (("warm cache", None), ("cold cache", tempfile.mkdtemp())):
        if session.wanted("first call", first.name, session.tokens[0], name):
            measure_first_call(session, Key("first call", first.name, session.tokens[0], name, OURS), folder)


def measure_few_tokens(session: Session, model: Shape, tokens: int) -> None:
    """Inference: no gradients."""
    place = ("small", model.name, tokens)
    layers = session.layers(model, tokens)
    found = providers(session, layers, place)
    with torch.no_grad():
        plain = {name: passes.forward for name, passes in found.items() if name != "bmm"}
        graphs = {
            name: session.attempt(Key(*place, "fwd graph", name), partial(session.device.graphed, run))
            for name, run in plain.items()
            if name != "eager"  # asks the device which experts are hit: cannot be captured
        }
        graphs = {name: run for name, run in graphs.items() if run is not None}
        for what, runs in (("fwd graph", graphs), ("fwd", plain)):
            for name, values in sorted(session.measure(runs).items(), key=lambda pair: pair[0] == OURS):
                counted = what == "fwd" and tokens == session.small_tokens[0]
                launches = session.device.launches(runs[name]) if counted else None
                wall_ms = session.device.wall_ms(runs[name])
                session.record.add(Key(*place, what, name), **values, wall_ms=wall_ms, launches=launches)


def measure_first_call(session: Session, key: Key, cache: str | None) -> None:
    """Seconds, in a new process: to import, to the first result with gradients (compiling), to the second."""
    environment = {**os.environ, **({} if cache is None else {"TRITON_CACHE_DIR": cache})}
    command = [sys.executable, "-m", "benchmarks.gpu", "--first-call", "--device", session.device.kind]
    command += ["--tiny"] if session.tiny else []
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        session.record.skip(key, (result.stderr.strip().splitlines() or ["no output"])[-1])
        return
    session.record.add(key, **json.loads(result.stdout.strip().splitlines()[-1]))


def first_call(session: Session) -> dict[str, float]:
    """What the new process does."""
    seconds = {}
    layers = session.layers(session.models[0], session.tokens[0])
    passes = Passes(layers, layers.modules[OURS])
    session.device.synchronize()
    for name in ("first_s", "second_s"):
        start = time.perf_counter()
        passes.both()
        session.device.synchronize()
        seconds[name] = time.perf_counter() - start
    return seconds
