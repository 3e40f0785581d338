"""How much memory a computation takes, and how much there is.

On a GPU torch counts what it has allocated. On a CPU nobody does: `peak_of` sums up the tensors that are alive, which
leaves out what an operation allocates and frees inside of it.
"""

import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

# Where a control group tells what it may take and what it takes, in bytes; files that could be dropped count as taken.
GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that are made while the mode is on and still alive; `peak` is the most of them.

    Args:
        known: tensors whose memory was there before; a view of them is nothing new.
    """

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.held = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, out)
        return out

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.held:
            self.held.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return tensor

    def _gone(self, which: int, size: int) -> None:
        self.held.discard(which)
        self.now -= size


def peak_of(work: Callable[[], object], known: Iterable[Tensor], device: torch.device) -> int:
    """The most bytes that `work` held at once, besides `known` and whatever was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with Alive(known) as alive:
        work()
    return alive.peak


def available_bytes(device: torch.device) -> int:
    """Memory that is free now: of the GPU with what torch holds and does not use, else of the machine or container."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = _entries("/proc/meminfo")["MemAvailable:"] * 1024
    for folder, limit, usage in GROUPS:
        try:
            room = int((folder / limit).read_text()) - int((folder / usage).read_text())
            available = min(available, room + _entries(folder / "memory.stat")["inactive_file"])
        except (OSError, ValueError, KeyError):  # no such group, or "max": no limit
            continue
    return max(0, available)


def _entries(path: str | Path) -> dict[str, int]:
    """`name number ...` of every line."""
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}
