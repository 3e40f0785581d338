"""For every launcher: the chip it launches for, sizes of grids and blocks, and its operands."""

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flex_kernels.backends.triton.tile_file import Tile
from flex_kernels.weights import Experts, Stored

INTERPRET = triton.knobs.runtime.interpret
# The tensor memory accelerator wants bases and row strides in multiples of 16 bytes.
TMA_ALIGNMENT = 16


@dataclass(frozen=True)
class Target:
    """The chip that kernels are shaped for: a family of chips and how many processors a persistent grid fills.

    `name` and `device` are set only for a real device; tiles are measured and remembered for those alone.
    """

    chip: str
    num_processors: int
    name: str = ""  # as the driver says it
    device: str = "meta"  # as torch says it

    @property
    def has_tma(self) -> bool:
        return self.chip in ("sm90", "sm100")

    def programs(self, tile: Tile, max_tiles: int) -> int:
        """Programs in a persistent grid of n; program p takes tiles p, p + n, p + 2n, ..."""
        return min(max_tiles, self.num_processors * tile.per_processor)


# Three programs: persistent loops take several turns even at test sizes.
_INTERPRETER = Target("interpreter", 3, device="cpu")
_forced_target: Target | None = None


def target_of(device: torch.device) -> Target:
    """The chip behind `device`; under `TRITON_INTERPRET=1` the interpreter."""
    if _forced_target is not None:
        return _forced_target
    return _INTERPRETER if INTERPRET else _device_target(device.index or 0)


def force_target(target: Target | None) -> None:
    """Shape kernels for a chip that is not there (compile checks); None goes back to the device."""
    global _forced_target
    _forced_target = target


@cache
def _device_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        chip = "gfx942" if properties.gcnArchName.startswith(("gfx942", "gfx950")) else "small"
    else:
        # 8.6, 8.9 and 12.x have 99 KB of shared memory per block; the chips named here have 163 KB and more.
        chip = {(8, 0): "sm80", (8, 7): "sm80", (9, 0): "sm90", (10, 0): "sm100", (10, 3): "sm100"}.get(
            (properties.major, properties.minor), "small"
        )
    return Target(chip, properties.multi_processor_count, properties.name, f"cuda:{index}")


def cdiv(a: int, b: int) -> int:
    """Rounded up. Triton's own costs the host 2 us per call, and a layer's forward and backward make 28."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


def alignment(*sizes: int) -> int:
    """Largest of 16, 8, 1 that divides every row length; at 1 loads are element by element."""
    common = math.gcd(16, *sizes)
    return common if common >= 8 else 1


def codes_and_scales(weights: Experts) -> tuple[Tensor, Tensor | None, str]:
    """What a kernel is given of frozen weights, and the name of their format."""
    if isinstance(weights, Stored):
        return weights.codes, weights.scales, weights.format.name
    return weights, None, "dense"


def use_tma(target: Target, *weights: Experts | None) -> bool:
    """Whether all weights can be read through tensor descriptors on this chip. Codes are read through pointers."""
    if any(isinstance(weight, Stored) for weight in weights):
        return False
    if not (target.has_tma or target.chip == "interpreter"):
        return False
    return all(
        weight is None
        or (
            weight.numel() > 0
            and weight.data_ptr() % TMA_ALIGNMENT == 0
            and weight.shape[-1] * weight.element_size() % TMA_ALIGNMENT == 0
        )
        for weight in weights
    )


def operand(weight: Tensor | None, tma: bool, block_shape: list[int]) -> Tensor | TensorDescriptor | None:
    """A weight as a kernel takes it: a descriptor over all its rows, or the tensor (a pointer), or None."""
    if weight is None or not tma:
        return weight
    rows = weight.view(-1, weight.shape[-1])
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), block_shape)


def pair_operand(weight: Tensor | None, width: int, tma: bool, tile: Tile) -> Tensor | TensorDescriptor | None:
    """Gate and up, [..., 2 width, K], as a kernel takes them: a descriptor over all matrices [width, K], of which a box
    holds two, or the tensor (a pointer), or None."""
    if weight is None or not tma:
        return weight
    matrices = weight.view(-1, width, weight.shape[-1])
    box = [2, tile.block_n, tile.block_k]
    return TensorDescriptor(matrices, list(matrices.shape), list(matrices.stride()), box)


def token_tile(device: torch.device, hidden_size: int) -> tuple[int, int, int]:
    """(tokens, columns, warps) of a kernel that streams rows of `hidden_size`: one 16-byte load per thread."""
    if target_of(device).chip == "interpreter":
        return 16, 32, 1
    columns = max(128, min(next_power_of_2(hidden_size), 1024))
    return 1, columns, columns // 256 if columns >= 512 else 1


def reduction_tokens(device: torch.device, width: int) -> int:
    """Tokens per program of the per-token reductions; each holds a row of `width` numbers in registers."""
    return 16 if target_of(device).chip == "interpreter" else max(1, min(32, 1024 // width))


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """How every launcher begins: autograd hands over transposed and stride-0 tensors."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)
