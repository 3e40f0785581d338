"""What a call looks like, so that what was checked or prepared for one call is not done again for the next like it.

A description is the shapes, dtypes and devices of a call's tensors and the names and numbers beside them. A check that
reads nothing else has the same answer for every call of the same description. It exists for plain calls alone: tensors
of torch's own class with ordinary memory, outside of code that is being compiled. Values are never part of it, nor
strides: whoever needs rows side by side still asks for them.
"""

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = frozenset((Tensor, nn.Parameter))
NAMES = frozenset((str, int, bool, type(None), torch.dtype))
# A run has a handful; generating texts has one for every length of a prompt, of a kilobyte each.
MOST = 1024
_STRIDED = torch.strided
_is_dead_wrapper = torch._C._functorch.is_dead_tensor_wrapper  # what is left of a tensor after `torch.func.grad`


class Remembered(dict[Hashable, Any]):
    """Something for each description; forgets all of them when there are too many."""

    def put(self, description: Hashable, value: Any = True) -> Any:
        """Returns the value."""
        if len(self) >= MOST:
            self.clear()
        self[description] = value
        return value


def describe(tensors: Iterable[Tensor | None], *names: Any) -> Hashable | None:
    """None for a call that is not plain, from which nothing is concluded for the next one."""
    if torch.compiler.is_compiling() or not are_plain(names):
        return None
    parts = [*names]
    for x in tensors:
        if x is None:
            parts.append(None)
        elif x.__class__ in PLAIN and x.layout is _STRIDED and not x.is_neg() and not _is_dead_wrapper(x):
            parts += (x.shape, x.dtype, x.is_cpu or x.device)
        else:
            return None
    return tuple(parts)


def are_plain(arguments: Iterable[Any]) -> bool:
    """Of each tensor, whether its address and its shape say all: no subclass, nothing sparse, no minus still due."""
    for x in arguments:
        if x.__class__ in PLAIN:
            if x.layout is not _STRIDED or x.is_neg() or _is_dead_wrapper(x):
                return False
        elif x.__class__ not in NAMES:
            return False
    return True
