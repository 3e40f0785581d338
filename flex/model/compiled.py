"""`train.compile`: the model of the local steps by torch.compile.

Scoring, generating and choosing grafts stay as they are: there every batch has other sizes, and hooks look in between.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import nn

from flex.errors import FlexError, first_line

BACKEND = "inductor"


@contextlib.contextmanager
def compiled(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Inside the block, if `wanted`, the model's forward and backward are torch.compile's, for batches of any length.

    What was compiled is kept for the next block; whatever changes in the model (its LoRAs, what trains) is noticed and
    compiled anew, until `forget_compiled`.
    """
    if not wanted:
        yield
        return
    model.forward = torch.compile(model.forward, dynamic=True, backend=BACKEND)
    try:
        # A graft remembers its logits: once is enough, also where a layer is computed again in the backward.
        with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
            yield
    finally:
        del model.forward


def forget_compiled() -> None:
    """Before another job: of one piece of code torch keeps a few compiled versions, and then runs it as it stands."""
    torch.compiler.reset()


@functools.cache
def check_compiler(device: str) -> None:
    """
    Raises:
        FlexError: torch.compile cannot compile here.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # of Inductor, of Triton, of a C++ compiler that is not there
        raise FlexError(
            f"train.compile = true, but torch.compile cannot compile on {device} here: {first_line(error)}; expected "
            "a C++ compiler (CXX names another) and on a GPU Triton, or train.compile = false"
        ) from None
