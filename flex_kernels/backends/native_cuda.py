"""The door to csrc's CUDA code: checks first, then addresses and the current stream.

`flex_kernels._cuda` is built where nvcc was there (`setup.py`, FLEX_CUDA), knows no torch, and imports without a
driver.
"""

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor


@cache
def module() -> ModuleType | None:
    """The compiled module, or None where it was not built."""
    try:
        return importlib.import_module("flex_kernels._cuda")
    except ImportError:
        return None


def routing_plan(expert_indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.routing_plan` in one launch, without a synchronisation; negative ids are skipped like those `>= E`.

    Returns:
        sorted_pairs [T*K], tokens_per_expert [E], expert_offsets [E+1], all int32.

    Raises:
        TypeError: `expert_indices` is not int32 or int64 on a CUDA device. ValueError: 2^31 pairs and more, or more
            experts than a block's shared memory counts (6,143). RuntimeError: not built, or CUDA refuses the launch.
    """
    device = expert_indices.device
    if device.type != "cuda" or expert_indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"expert_indices is {expert_indices.dtype} on {device}, want int32 or int64 on a CUDA device")
    if module() is None:
        raise RuntimeError("flex_kernels._cuda was not built; `FLEX_CUDA=1 pip install -e .` with nvcc builds it")
    ids = expert_indices.contiguous()
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    launch = module().plan_launch(ids.numel(), num_experts, processors)
    counts, sorted_pairs, tokens_per_expert, expert_offsets = (
        ids.new_empty(size, dtype=torch.int32)
        for size in (launch.num_counts, ids.numel(), num_experts, num_experts + 1)
    )
    with torch.cuda.device_of(ids):
        module().routing_plan(
            launch,
            ids.data_ptr(),
            ids.dtype == torch.int64,
            ids.numel(),
            num_experts,
            counts.data_ptr(),
            sorted_pairs.data_ptr(),
            tokens_per_expert.data_ptr(),
            expert_offsets.data_ptr(),
            device.index,
            torch.cuda.current_stream(device).cuda_stream,
        )
    return sorted_pairs, tokens_per_expert, expert_offsets
