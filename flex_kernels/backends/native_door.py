"""The one door to csrc: checks first, then pointers.

csrc knows no torch, it gets raw addresses and sizes; whatever could make it read a wrong address is refused here.
Where the native module was not built, `covers` says no (and says so once, as a warning), and PyTorch computes instead.
"""

import importlib
import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
# stage -> dtypes of hidden states and weights, None: any
STAGES: dict[str, tuple[torch.dtype, ...] | None] = {"routing_plan": None, "experts": DTYPES, "score": DTYPES}


@cache
def module() -> ModuleType | None:
    """The compiled module, or None where it could not be built."""
    try:
        # torch is imported first, so that the module shares its OpenMP runtime.
        return importlib.import_module("flex_kernels._native")
    except ImportError as error:
        warnings.warn(
            f"flex_kernels: the native module is not there ({error}); PyTorch computes instead, slower. "
            "`pip install -e .` with a C++ compiler at hand builds it.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def covers(stage: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> bool:
    """Does csrc compute this stage for hidden states and weights of these dtypes, on this machine?"""
    if stage not in STAGES:
        return False
    dtypes = STAGES[stage]
    return (dtypes is None or (dtype in dtypes and weight_dtype in dtypes)) and module() is not None


def routing_plan(expert_indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.routing_plan`: sorted_pairs [T*K], tokens_per_expert [E], expert_offsets [E+1], all int32.

    Raises:
        ValueError: a negative id. TypeError: `expert_indices` is not an integer tensor on the CPU.
    """
    if expert_indices.device.type != "cpu" or expert_indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"expert_indices is {expert_indices.dtype} on {expert_indices.device}, want int32 or int64 on the CPU"
        )
    ids = expert_indices.to(torch.int64).contiguous()
    num_pairs = ids.numel()
    if num_pairs > torch.iinfo(torch.int32).max:
        raise ValueError(f"expert_indices has {num_pairs} entries, want fewer than 2^31")
    sorted_pairs = torch.empty(num_pairs, dtype=torch.int32)
    tokens_per_expert = torch.empty(num_experts, dtype=torch.int32)
    expert_offsets = torch.empty(num_experts + 1, dtype=torch.int32)
    module().routing_plan(
        ids.data_ptr(),
        num_pairs,
        num_experts,
        sorted_pairs.data_ptr(),
        tokens_per_expert.data_ptr(),
        expert_offsets.data_ptr(),
    )
    return sorted_pairs, tokens_per_expert, expert_offsets
