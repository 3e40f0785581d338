"""How much memory a computation takes: the largest tensor in this process, or the peak of a process of its own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

HAS_PEAK = Path("/proc/self/status").exists()
MEASURE = """
import re, torch
import flex_kernels
from flex_kernels import plan
from flex_kernels.backends import pytorch
if {backend!r} == "torch":
    plan.cpu_backend = lambda *_: pytorch
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
def run(num_tokens):
    x, target = X[:num_tokens], TARGET[:num_tokens]
{body}
X, TARGET = torch.randn(2, {num_tokens}, {hidden_size})
GATE_UP, DOWN = torch.randn({num_experts}, {rows}, {hidden_size}), torch.randn({num_experts}, {hidden_size}, {width})
run(16)
before = peak()
run({num_tokens})
print(peak() - before)
"""


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation gives back while the mode is on."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def peak_growth_bytes(
    body: str, backend: str, *, num_tokens: int, hidden_size: int, num_experts: int, width: int
) -> int:
    """By how much `body` on all tokens raises the process's peak over what it took on 16 of them.

    `body`: one line of Python that may use flex_kernels, torch, x, target, GATE_UP and DOWN. `backend`: "torch", or
    anything else for the one that `plan` chooses.
    """
    code = MEASURE.format(
        body="    " + body,
        backend=backend,
        num_tokens=num_tokens,
        hidden_size=hidden_size,
        num_experts=num_experts,
        rows=2 * width,
        width=width,
    )
    root = Path(__file__).resolve().parents[2]
    # Left to itself, glibc stops giving freed blocks back at once, and the peak is then that of its heap's holes.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=env, check=False)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)
