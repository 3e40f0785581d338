"""What the wall between SuperNode and worker costs: one message there and one back through the worker's socket.

    python -m benchmarks.worker_socket 19 500        # megabytes; seconds, bytes and peak memory of both sides

The worker's half answers with what it was sent, so that what is timed is the way alone: safetensors, two copies through
the kernel, and back.
"""

import os
import resource
import socket
import sys
import time

import numpy as np

from flex.deploy.frames import receive_frame, send_frame
from flex.federation.flower import Array, ArrayRecord, RecordDict

TENSORS = 32


def payload(megabytes: float) -> RecordDict:
    """A shared state of this size, in as many tensors as the demo's has."""
    count = int(megabytes * 1e6 / 4 / TENSORS)
    draw = np.random.default_rng(0)
    arrays = {f"layer.{i}.lora": draw.standard_normal(count, dtype=np.float32) for i in range(TENSORS)}
    return RecordDict({"arrays": ArrayRecord({name: Array(array) for name, array in arrays.items()})})


def measure(megabytes: float) -> tuple[float, float, float, float]:
    """(seconds there and back, MB one way, peak MB of the shim's side, of the worker's side)."""
    here, there = socket.socketpair()
    if (child := os.fork()) == 0:
        here.close()
        head, content = receive_frame(there, "the shim")
        send_frame(there, head, content)
        os._exit(0)
    there.close()
    content = payload(megabytes)
    started = time.perf_counter()
    send_frame(here, {"kind": "train"}, content)
    receive_frame(here, "the worker")
    seconds = time.perf_counter() - started
    here.close()
    usage = os.wait4(child, 0)[2]
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = sum(len(array.data) for array in content["arrays"].values())
    return seconds, size / 1e6, own / 1e3, usage.ru_maxrss / 1e3


if __name__ == "__main__":
    print("   MB   seconds   peak MB shim   peak MB worker")
    for words in sys.argv[1:] or ["19", "500"]:
        seconds, size, shim, worker = measure(float(words))
        print(f"{size:5.0f}   {seconds:7.2f}   {shim:12.0f}   {worker:14.0f}")
