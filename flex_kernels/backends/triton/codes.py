"""Frozen weights as codes, as the grouped products load them: a tile of codes becomes `code * scale` in registers.

int8: a scale per row. nf4: two codes a byte, the earlier one in its low half, a scale per 64 neighbours, rows padded to
whole groups (`weights.py`, `reference.dequantize`). The product with the scale is in fp32 and rounded to the dtype of
the other operand. What a product reads of memory is a half or a quarter of bf16, and nothing dense is ever stored.
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(64)


@triton.jit
def nf4_value(code):
    """`NF4_VALUES[code]`: a tree of 15 choices, one level for each bit of the code."""
    odd = (code & 1) != 0
    second, third, fourth = (code & 2) != 0, (code & 4) != 0, (code & 8) != 0
    a = tl.where(
        second, tl.where(odd, -0.39491748809814453, -0.5250730514526367), tl.where(odd, -0.6961928009986877, -1.0)
    )
    b = tl.where(
        second, tl.where(odd, 0.0, -0.09105003625154495), tl.where(odd, -0.18477343022823334, -0.28444138169288635)
    )
    c = tl.where(
        second,
        tl.where(odd, 0.33791524171829224, 0.24611230194568634),
        tl.where(odd, 0.16093020141124725, 0.07958029955625534),
    )
    d = tl.where(second, tl.where(odd, 1.0, 0.7229568362236023), tl.where(odd, 0.5626170039176941, 0.44070982933044434))
    return tl.where(fourth, tl.where(third, d, c), tl.where(third, b, a))


@triton.jit
def load_along(
    codes_ptr, scales_ptr, rows, k, inner_size, FORMAT: tl.constexpr, DTYPE: tl.constexpr, BLOCK_K: tl.constexpr
):
    """[BLOCK_K, N]: the weights of `rows` [N] (int64) from column `k` on, which are steps of the sum."""
    if FORMAT == "int8":
        inner = k + tl.arange(0, BLOCK_K)
        codes = tl.load(
            codes_ptr + rows[:, None] * inner_size + inner[None, :], mask=(inner < inner_size)[None, :], other=0
        )
        scale = tl.load(scales_ptr + rows)
        tile = (codes.to(tl.float32) * scale[:, None]).to(DTYPE)
    else:  # whole groups: nothing to mask, what stands past the end of a row is zero
        groups = (inner_size + GROUP - 1) // GROUP
        halves = tl.arange(0, BLOCK_K // 2)
        codes = tl.load(codes_ptr + rows[:, None] * (groups * (GROUP // 2)) + (k // 2 + halves)[None, :])
        if BLOCK_K <= GROUP:
            scale = tl.load(scales_ptr + rows * groups + k // GROUP)[:, None]
        else:
            inner = k + 2 * halves
            scale = tl.load(
                scales_ptr + rows[:, None] * groups + (inner // GROUP)[None, :],
                mask=(inner < inner_size)[None, :],
                other=0.0,
            )
        scale = scale.to(tl.float32)
        tile = tl.interleave((nf4_value(codes & 15) * scale).to(DTYPE), (nf4_value(codes >> 4) * scale).to(DTYPE))
    return tile.T


@triton.jit
def load_across(
    codes_ptr, scales_ptr, first_row, k, first_column, inner_size, out_size,
    FORMAT: tl.constexpr, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_K, BLOCK_N]: rows from `first_row + k` on, steps of the sum, and columns from `first_column` on."""
    steps = k + tl.arange(0, BLOCK_K)
    rows = (first_row + steps).to(tl.int64)
    inside = (steps < inner_size)[:, None]
    if FORMAT == "int8":
        columns = first_column + tl.arange(0, BLOCK_N)
        codes = tl.load(
            codes_ptr + rows[:, None] * out_size + columns[None, :],
            mask=inside & (columns < out_size)[None, :],
            other=0,
        )
        scale = tl.load(scales_ptr + rows, mask=steps < inner_size, other=0.0)
        tile = (codes.to(tl.float32) * scale[:, None]).to(DTYPE)
    else:
        groups = (out_size + GROUP - 1) // GROUP
        columns = first_column + 2 * tl.arange(0, BLOCK_N // 2)
        kept = inside & (columns < out_size)[None, :]
        codes = tl.load(
            codes_ptr + rows[:, None] * (groups * (GROUP // 2)) + (columns // 2)[None, :], mask=kept, other=0
        )
        scale = tl.load(scales_ptr + rows[:, None] * groups + (columns // GROUP)[None, :], mask=kept, other=0.0)
        scale = scale.to(tl.float32)
        tile = tl.interleave((nf4_value(codes & 15) * scale).to(DTYPE), (nf4_value(codes >> 4) * scale).to(DTYPE))
    return tile
