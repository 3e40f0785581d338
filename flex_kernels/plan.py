"""Who computes what: the one place where a backend is chosen.

| stage         | CUDA                 | CPU                        | CPU, `TRITON_INTERPRET=1` |
|---------------|----------------------|----------------------------|---------------------------|
| routing_plan  | triton, else torch   | native (C++), else torch   | native, else torch        |
| experts       | triton, else torch   | native, else torch         | triton, else torch        |
| score         | triton, else torch   | native, else torch         | triton, else torch        |
| grafted_route | triton, else torch   | native, else torch         | triton, else torch        |
| route         | triton, else torch   | torch                      | triton, else torch        |
| graft_logits  | triton, else torch   | torch                      | triton, else torch        |
| combine       | triton, else torch   | torch                      | triton, else torch        |

A backend is a module of `backends/`: `pytorch` (plain PyTorch), `native` (csrc) or `triton.stages`; for the same stage
all of them offer functions of the same names and signatures, those of `pytorch`.
"else torch" is when the faster one is not there (no Triton, nothing built) or does not cover the dtypes (fp64; fp16 on
the CPU; for Triton also dense weights of another dtype). Experts in a format of `weights.py` are asked about by the
dtype of their codes.

On CUDA `FLEX_ROUTING_PLAN=cuda` chooses csrc's plan, one launch, if it was built, and `torch` that of PyTorch; all
three give the same bits. Triton's is the default until `make bench-gpu` has put them side by side.

The layer's own order is in `ops/experts.py`: routing_plan -> experts (two grouped products, the graft, their sum).
"""

import importlib.util
import os
from functools import cache
from types import ModuleType

import torch

from flex_kernels.backends import native, pytorch
from flex_kernels.weights import CODE_DTYPES

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
TRITON_STAGES = ("routing_plan", "experts", "score", "grafted_route", "route", "graft_logits", "combine")
CUDA_ROUTING_PLAN = os.environ.get("FLEX_ROUTING_PLAN", "triton")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def cuda_backend(stage: str, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> ModuleType:
    """The module that computes `stage` on a CUDA device, for hidden states and weights of these dtypes."""
    if stage == "routing_plan" and CUDA_ROUTING_PLAN != "triton":
        planners = {"cuda": native, "torch": pytorch}
        if CUDA_ROUTING_PLAN not in planners:
            raise ValueError(f"FLEX_ROUTING_PLAN is {CUDA_ROUTING_PLAN!r}, expected triton, cuda or torch")
        return planners[CUDA_ROUTING_PLAN]
    if INTERPRET and dtype == torch.bfloat16 and not _interprets_bfloat16():
        return pytorch
    same_dtype = weight_dtype in (None, dtype, *CODE_DTYPES)
    if stage in TRITON_STAGES and dtype in TRITON_DTYPES and same_dtype and _has_triton():
        return triton_backend()
    return pytorch


def cpu_backend(stage: str, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> ModuleType:
    """The module that computes `stage` on the CPU, for hidden states and weights of these dtypes."""
    if INTERPRET and stage != "routing_plan":  # on the CPU the plan refuses negative ids, on a GPU it cannot look
        return cuda_backend(stage, dtype, weight_dtype)
    return native if native.covers(stage, dtype, weight_dtype or dtype) else pytorch


def backend_name(backend: ModuleType) -> str:
    """`torch`, `native` or `triton`, for messages."""
    return {pytorch: "torch", native: "native"}.get(backend, "triton")


@cache
def triton_backend() -> ModuleType:
    """`backends/triton/stages.py`, imported when it is first asked for; its tiles are measured by `tuning.py`."""
    from flex_kernels import tuning
    from flex_kernels.backends.triton import stages, tiles

    tiles.measure_with(tuning.tune)
    return stages


def _interprets_bfloat16() -> bool:
    """Triton's interpreter takes bf16 for integers, silently; `tests/support/interp_shim.py` mends it."""
    if not _has_triton():
        return False
    from triton.runtime.interpreter import InterpreterBuilder

    return getattr(InterpreterBuilder, "_mended", False)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
