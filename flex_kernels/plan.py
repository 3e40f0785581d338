"""Who computes what: the one place where a backend is chosen.

| stage        | CUDA                 | CPU                        | CPU, `TRITON_INTERPRET=1` |
|--------------|----------------------|----------------------------|---------------------------|
| routing_plan | triton, else torch   | native (C++), else torch   | native, else torch        |
| experts      | triton, else torch   | native, else torch         | triton, else torch        |
| score        | triton, else torch   | native, else torch         | triton, else torch        |
| route        | triton, else torch   | torch                      | triton, else torch        |
| graft_logits | triton, else torch   | torch                      | triton, else torch        |
| combine      | triton, else torch   | torch                      | triton, else torch        |

A backend is a module: `pytorch` (plain PyTorch), `native` and `native_experts` (csrc), or one of `kernels/`
(Triton); for the same stage all of them offer functions of the same names and signatures, those of `pytorch`.
"else torch" is when the faster one is not there (no Triton, nothing built) or does not cover the dtypes (fp64; fp16 on
the CPU; for Triton also weights of another dtype).

On CUDA `FLEX_ROUTING_PLAN=cuda` chooses csrc's plan, one launch (`native_cuda`, where it was built), and `torch` that
of PyTorch; all three give the same bits. Triton's is the default until `make bench-gpu` has put them side by side.

The layer's own order is in `ops.py`: routing_plan -> experts (two grouped products, the graft, their sum).
"""

import importlib
import importlib.util
import os
from functools import cache
from types import ModuleType

import torch

from flex_kernels.backends import native as native_experts
from flex_kernels.backends import native_cuda, pytorch
from flex_kernels.backends import native_door as native

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
TRITON_STAGES = ("routing_plan", "experts", "score", "route", "graft_logits", "combine")
CUDA_ROUTING_PLAN = os.environ.get("FLEX_ROUTING_PLAN", "triton")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def cuda_backend(stage: str, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> ModuleType:
    """The module that computes `stage` on a CUDA device, for hidden states and weights of these dtypes."""
    if stage == "routing_plan" and CUDA_ROUTING_PLAN != "triton":
        return _wanted_routing_plan()
    same_dtype = weight_dtype in (None, dtype)
    if stage in TRITON_STAGES and dtype in TRITON_DTYPES and same_dtype and _has_triton():
        return _kernels(stage)
    return pytorch


def cpu_backend(stage: str, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> ModuleType:
    """The module that computes `stage` on the CPU, for hidden states and weights of these dtypes."""
    if INTERPRET and stage != "routing_plan":  # on the CPU the plan refuses negative ids, on a GPU it cannot look
        return cuda_backend(stage, dtype, weight_dtype)
    if native.covers(stage, dtype, weight_dtype or dtype):
        return native if stage == "routing_plan" else native_experts
    return pytorch


def backend_name(backend: ModuleType) -> str:
    """`torch`, `native`, `cuda` (csrc's) or `triton`, for messages."""
    names = {pytorch: "torch", native: "native", native_experts: "native", native_cuda: "cuda"}
    return names.get(backend, "triton")


def _wanted_routing_plan() -> ModuleType:
    backends = {"cuda": native_cuda, "torch": pytorch}
    if CUDA_ROUTING_PLAN not in backends:
        raise ValueError(f"FLEX_ROUTING_PLAN is {CUDA_ROUTING_PLAN!r}, want triton, cuda or torch")
    return backends[CUDA_ROUTING_PLAN]


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _kernels(stage: str) -> ModuleType:
    return importlib.import_module(f"flex_kernels.kernels.{stage}")
