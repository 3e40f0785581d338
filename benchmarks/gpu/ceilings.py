"""What this machine can do at best: copy, and multiply random bf16 matrices. Every other figure is a part of these."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.record import OURS, Key
from benchmarks.gpu.session import Session

COPY_BYTES = 4 << 30
# (M, N, K): square, and the products of the models' layers as if all rows went to one expert.
PRODUCTS = ((8192, 8192, 8192), (16384, 8192, 8192), (32768, 2816, 2048), (16384, 28672, 4096))


def measure(session: Session) -> None:
    if not session.wanted("ceilings", "dense", 0, "done"):
        return
    source = random(session, (1 << 16 if session.tiny else COPY_BYTES) // 2)
    target = torch.empty_like(source)
    values = session.measure({"copy": partial(target.copy_, source)})["copy"]
    rate = 2 * source.nbytes / values["ms"] / 1e6
    session.record.add(Key("ceilings", "copy", source.nbytes, "copy", OURS), **values, rate=rate)
    for m, n, k in ((64, 64, 64),) if session.tiny else PRODUCTS:
        a, b = random(session, m, k), random(session, n, k)
        values = session.measure({"matmul": partial(F.linear, a, b)})["matmul"]
        rate = 2 * m * n * k / values["ms"] / 1e9
        session.record.add(Key("ceilings", f"{m}x{n}x{k}", 0, "matmul", OURS), **values, rate=rate)
    session.record.add(Key("ceilings", "dense", 0, "done", OURS), rate_unit="GB/s copied, TFLOP/s multiplied")


def random(session: Session, *shape: int) -> Tensor:
    return torch.randn(shape, device=session.device.kind, dtype=torch.bfloat16)
