"""The grouped GEMMs' common part: the schedule of row tiles, the loads, and the product of sorted rows with matrices.

A grouped GEMM runs over the rows in plan order (sorted by expert), then over the graft's rows (all tokens, in order).
Its tiles are numbered on the device, so no count ever travels to the host: `row_tiles` lists (expert, first row, end
row) of every row tile of every expert, `num_row_tiles` says how many there are; grids and buffers are upper bounds
(`ceil(R / block_m) + E` row tiles). The graft is expert number `E` in the same launch: its tiles come after the others.

    out_r = W_e in_r    for the rows r of expert e         out_{R+t} = W_g in_t    for the graft's row of token t

with `W_e` stored [N, K] (`down_proj`, forward) or [K, N] (`gate_up_proj` read as it lies, for `dX`).
Twin: the `F.linear`s of `reference.expert`. Tiles go expert by expert, `GROUP_M` row tiles to a visit, so that the
programs in flight share their weights in L2 and a weight is read from memory about once.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from flex_kernels.backends.call import LayerCall
from flex_kernels.backends.triton.codes import load_across, load_along
from flex_kernels.backends.triton.launch import (
    Target,
    alignment,
    cdiv,
    codes_and_scales,
    next_power_of_2,
    operand,
    target_of,
    use_tma,
)
from flex_kernels.backends.triton.tile_file import ExpertTiles, Tile
from flex_kernels.backends.triton.tiles import beside_codes, expert_tiles
from flex_kernels.weights import Experts, Stored

PAIRS_PER_PROGRAM = 1024  # of the schedule kernel's second job; any power of two is right


@dataclass(frozen=True)
class Schedule:
    """Which rows each row tile covers, and where each pair went. All on the device but the last three."""

    row_tiles: Tensor  # [3, max_row_tiles] int32: expert, first row, end row
    num_row_tiles: Tensor  # [1] int32
    row_of_pair: Tensor  # [T*K] int32, -1 where no expert here computes the pair
    num_tokens: int
    num_rows: int  # T*K
    block_m: int

    @property
    def max_row_tiles(self) -> int:
        return self.row_tiles.shape[1]

    def graft_alone(self) -> "Schedule":
        """No row of any expert, and all of the graft's."""
        return replace(self, num_row_tiles=torch.zeros_like(self.num_row_tiles), num_rows=0)

    def graft_row_tiles(self, has_graft: bool) -> int:
        return cdiv(self.num_tokens, self.block_m) if has_graft else 0


def target_and_tiles(call: LayerCall) -> tuple[Target, ExpertTiles]:
    """The chip and the tiles of one layer call's GEMMs; forward and backward get the same."""
    target, (num_experts, *sizes) = target_of(call.hidden_states.device), call.down_proj.shape
    num_rows, dtype = len(call.sorted_pairs), call.hidden_states.dtype
    return target, expert_tiles(target, dtype, num_rows, num_experts, (*sizes, call.graft_width))


@triton.jit(do_not_specialize=["num_pairs", "max_row_tiles"])
def _schedule_kernel(
    expert_offsets_ptr, sorted_pairs_ptr,
    row_tiles_ptr, num_row_tiles_ptr, row_of_pair_ptr,
    num_pairs, num_experts, max_row_tiles,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Programs 0 to E-1 list one expert's row tiles each; the others invert `sorted_pairs`."""
    program = tl.program_id(0)
    if program < num_experts:
        experts = tl.arange(0, BLOCK_E)
        starts = tl.load(expert_offsets_ptr + experts, mask=experts < num_experts, other=0)
        ends = tl.load(expert_offsets_ptr + experts + 1, mask=experts < num_experts, other=0)
        tiles = (ends - starts + BLOCK_M - 1) // BLOCK_M
        before = tl.sum(tl.where(experts < program, tiles, 0), axis=0)
        if program == 0:
            tl.store(num_row_tiles_ptr, tl.sum(tiles, axis=0))
        start = tl.load(expert_offsets_ptr + program)
        end = tl.load(expert_offsets_ptr + program + 1)
        for first in range(start, end, BLOCK_M * BLOCK_E):
            rows = first + experts * BLOCK_M
            entries = row_tiles_ptr + before + (first - start) // BLOCK_M + experts
            tl.store(entries, tl.zeros_like(rows) + program, mask=rows < end)
            tl.store(entries + max_row_tiles, rows, mask=rows < end)
            tl.store(entries + 2 * max_row_tiles, tl.minimum(rows + BLOCK_M, end), mask=rows < end)
    else:
        rows = (program - num_experts) * BLOCK_P + tl.arange(0, BLOCK_P)
        num_rows = tl.load(expert_offsets_ptr + num_experts)
        pairs = tl.load(sorted_pairs_ptr + rows, mask=rows < num_pairs, other=0)
        tl.store(row_of_pair_ptr + pairs, tl.where(rows < num_rows, rows, -1), mask=rows < num_pairs)


def make_schedule(sorted_pairs: Tensor, expert_offsets: Tensor, num_tokens: int, block_m: int) -> Schedule:
    """One launch; `sorted_pairs` and `expert_offsets` as `routing_plan` gives them."""
    num_pairs, num_experts = sorted_pairs.numel(), expert_offsets.numel() - 1
    max_row_tiles = cdiv(num_pairs, block_m) + num_experts
    schedule = Schedule(
        row_tiles=sorted_pairs.new_empty(3, max_row_tiles),
        num_row_tiles=sorted_pairs.new_empty(1),
        row_of_pair=torch.empty_like(sorted_pairs),
        num_tokens=num_tokens,
        num_rows=num_pairs,
        block_m=block_m,
    )
    _schedule_kernel[(num_experts + cdiv(num_pairs, PAIRS_PER_PROGRAM),)](
        expert_offsets, sorted_pairs,
        schedule.row_tiles, schedule.num_row_tiles, schedule.row_of_pair,
        num_pairs, num_experts, max_row_tiles,
        BLOCK_M=block_m, BLOCK_E=next_power_of_2(num_experts), BLOCK_P=PAIRS_PER_PROGRAM,
    )  # fmt: skip
    return schedule


@triton.jit
def locate_tile(
    tile, row_tiles_ptr, num_row_tiles, max_row_tiles, num_columns,
    graft_row_tiles, graft_num_columns, num_tokens, num_experts,
    BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """(expert, first row, end row, column tile) of tile number `tile`; the graft is expert `num_experts`."""
    routed_tiles = num_row_tiles * num_columns
    is_graft = tile >= routed_tiles
    local = tl.where(is_graft, tile - routed_tiles, tile)
    rows = tl.where(is_graft, graft_row_tiles, num_row_tiles)
    columns = tl.where(is_graft, graft_num_columns, num_columns)
    # Within a group of GROUP_M row tiles the row tile changes fastest.
    group_first = local // (GROUP_M * columns) * GROUP_M
    group_rows = tl.minimum(rows - group_first, GROUP_M)
    within = local % (GROUP_M * columns)
    row_tile = group_first + within % group_rows
    column = within // group_rows
    expert = tl.load(row_tiles_ptr + row_tile, mask=tile < routed_tiles, other=0)
    first_row = tl.load(row_tiles_ptr + max_row_tiles + row_tile, mask=tile < routed_tiles, other=0)
    end_row = tl.load(row_tiles_ptr + 2 * max_row_tiles + row_tile, mask=tile < routed_tiles, other=0)
    expert = tl.where(is_graft, num_experts, expert)
    first_row = tl.where(is_graft, row_tile * BLOCK_M, first_row)
    end_row = tl.where(is_graft, num_tokens, end_row)
    return expert, first_row, end_row, column


@triton.jit
def load_rows(row_ptrs, k, inner_size, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_M, BLOCK_K] of the left operand from index `k` of the sum on."""
    if EVEN:
        tile = tl.load(row_ptrs + k)
    else:
        tile = tl.load(row_ptrs + k, mask=(tl.arange(0, BLOCK_K) < inner_size - k)[None, :], other=0.0)
    return tile


@triton.jit
def find_weight(
    weight, first_row, first_column, inner_size, out_size,
    INNER_LAST: tl.constexpr, TMA: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PAIR: tl.constexpr = False, FORMAT: tl.constexpr = "dense",
):  # fmt: skip
    """Where `load_weight` begins: with TMA the matrix's first row, else pointers to the first tile of its sum; of codes
    the rows that it reads along, or the first one that it reads across.

    The matrix is [N, K] (`INNER_LAST`) or [K, N], from row `first_row` of all rows on; N is `out_size`. A `PAIR` is two
    matrices [N, K], one after the other, of which the tile has BLOCK_N columns each; with TMA its `first_row` is the
    number of its first matrix.
    """
    if TMA:
        place = first_row
    else:
        inner_offsets = tl.arange(0, BLOCK_K)
        if INNER_LAST:
            # Columns past the end repeat the last one: no mask for them, and the store drops them.
            if PAIR:
                both = tl.arange(0, 2 * BLOCK_N)
                rows = both // BLOCK_N * out_size + tl.minimum(first_column + both % BLOCK_N, out_size - 1)
            else:
                rows = tl.minimum(first_column + tl.arange(0, BLOCK_N), out_size - 1)
            place = (first_row + rows).to(tl.int64)
            if FORMAT == "dense":
                place = weight + place[None, :] * inner_size + inner_offsets[:, None]
        elif FORMAT != "dense":
            place = first_row
        else:
            rows = (first_row + inner_offsets).to(tl.int64)
            place = weight + rows[:, None] * out_size + (first_column + tl.arange(0, BLOCK_N))[None, :]
    return place


@triton.jit
def load_weight(
    weight, place, k, first_column, inner_size, out_size,
    INNER_LAST: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PAIR: tl.constexpr = False, scales_ptr=None, FORMAT: tl.constexpr = "dense", DTYPE: tl.constexpr = None,
):  # fmt: skip
    """[BLOCK_K, BLOCK_N] of an expert's matrix, of a `PAIR` [BLOCK_K, 2 BLOCK_N], from index `k` of the sum on: every
    grouped GEMM reads weights here. Codes become `DTYPE`."""
    if FORMAT != "dense":
        if INNER_LAST:
            tile = load_along(weight, scales_ptr, place, k, inner_size, FORMAT, DTYPE, BLOCK_K)
        else:
            tile = load_across(
                weight, scales_ptr, place, k, first_column, inner_size, out_size, FORMAT, DTYPE, BLOCK_N, BLOCK_K
            )
    elif TMA:
        if PAIR:
            tile = tl.reshape(weight.load([place, first_column, k]), (2 * BLOCK_N, BLOCK_K)).T
        elif INNER_LAST:
            tile = weight.load([place + first_column, k]).T
        else:
            tile = weight.load([place + k, first_column])
    elif INNER_LAST:
        if EVEN:
            tile = tl.load(place + k)
        else:
            tile = tl.load(place + k, mask=(tl.arange(0, BLOCK_K) < inner_size - k)[:, None], other=0.0)
    else:
        columns = first_column + tl.arange(0, BLOCK_N)
        mask = (tl.arange(0, BLOCK_K) < inner_size - k)[:, None] & (columns < out_size)[None, :]
        tile = tl.load(place + tl.cast(k, tl.int64) * out_size, mask=mask, other=0.0)
    return tile


@triton.jit
def halve_columns(x):
    """[M, N] -> two [M, N / 2]: left, right; each thread keeps what it has."""
    left_right = tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2))
    return tl.split(tl.permute(left_right, (0, 2, 1)))


@triton.jit
def quarter_columns(x):
    """[M, N] -> four [M, N / 4], left to right; each thread keeps what it has.

    For epilogues in parts: an activation's intermediate values are several times as large as the accumulator, and all
    of them at once do not fit in registers.
    """
    left, right = halve_columns(x)
    far_left, middle_left = halve_columns(left)
    middle_right, far_right = halve_columns(right)
    return far_left, middle_left, middle_right, far_right


@triton.jit
def eighth_columns(x):
    """[M, N] -> eight [M, N / 8], as `quarter_columns`."""
    a, b, c, d = quarter_columns(x)
    a0, a1 = halve_columns(a)
    b0, b1 = halve_columns(b)
    c0, c1 = halve_columns(c)
    d0, d1 = halve_columns(d)
    return a0, a1, b0, b1, c0, c1, d0, d1


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "max_row_tiles", "graft_row_tiles"])
def _grouped_rows_kernel(
    sources, graft_sources, weights, scales_ptr, graft_weights,
    out_ptr,
    row_tiles_ptr, num_row_tiles_ptr, max_row_tiles, graft_row_tiles,
    num_tokens, num_rows, num_experts, inner_size, graft_inner_size, out_size,
    HAS_GRAFT: tl.constexpr, INNER_LAST: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Says to the compiler that rows begin at multiples of ALIGN: what is loaded and stored can be 16 bytes wide.
    inner_size = inner_size // ALIGN * ALIGN
    graft_inner_size = graft_inner_size // ALIGN * ALIGN
    out_size = out_size // ALIGN * ALIGN
    num_row_tiles = tl.load(num_row_tiles_ptr)
    num_columns = (out_size + BLOCK_N - 1) // BLOCK_N
    num_tiles = (num_row_tiles + graft_row_tiles) * num_columns
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        expert, first_row, end_row, column = locate_tile(
            tile, row_tiles_ptr, num_row_tiles, max_row_tiles, num_columns,
            graft_row_tiles, num_columns, num_tokens, num_experts, BLOCK_M, GROUP_M,
        )  # fmt: skip
        rows = first_row + tl.arange(0, BLOCK_M)
        first_column = column * BLOCK_N
        source = sources
        weight = weights
        inner = inner_size
        out_row = 0
        weight_row = expert * out_size if INNER_LAST else expert * inner_size
        if HAS_GRAFT and expert == num_experts:
            source = graft_sources
            weight = graft_weights
            inner = graft_inner_size
            out_row = num_rows
            weight_row = 0
        if not TMA:
            # Rows past the end repeat the last one: no mask for them, and the store drops them.
            safe_rows = tl.minimum(rows, end_row - 1).to(tl.int64)
            source_ptrs = source + safe_rows[:, None] * inner + tl.arange(0, BLOCK_K)[None, :]
        place = find_weight(
            weight, weight_row, first_column, inner, out_size, INNER_LAST, TMA, BLOCK_N, BLOCK_K, FORMAT=FORMAT
        )

        accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, inner, BLOCK_K):
            if TMA:
                left = source.load([first_row, k])
            else:
                left = load_rows(source_ptrs, k, inner, INNER_LAST and EVEN, BLOCK_K)
            right = load_weight(
                weight, place, k, first_column, inner, out_size, INNER_LAST, TMA, EVEN, BLOCK_N, BLOCK_K,
                scales_ptr=scales_ptr, FORMAT=FORMAT, DTYPE=left.dtype,
            )  # fmt: skip
            accumulator = tl.dot(left, right, accumulator, input_precision="ieee")

        out_rows = (out_row + rows).to(tl.int64)
        parts = quarter_columns(accumulator)
        for part in tl.static_range(4):
            part_columns = first_column + part * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
            kept = (rows < end_row)[:, None] & (part_columns < out_size)[None, :]
            out_ptrs = out_ptr + out_rows[:, None] * out_size + part_columns[None, :]
            tl.store(out_ptrs, parts[part].to(out_ptr.dtype.element_ty), mask=kept)


def grouped_rows(
    rows: Tensor,
    graft_rows: Tensor | None,
    weights: Experts,
    graft_weights: Tensor | None,
    schedule: Schedule,
    target: Target,
    tile: Tile,
    inner_last: bool,
    out: Tensor | None = None,
) -> Tensor:
    """[R, K] and [T, K_g] times each row's own matrix -> [R + T, N] (or [R, N] without a graft).

    Beside codes the graft, which is dense, has a launch of its own."""
    if isinstance(weights, Stored):
        tile = beside_codes(target, "down" if inner_last else "d_hidden", weights.format.name, tile)
    if isinstance(weights, Stored) and graft_rows is not None:
        out_size = weights.shape[1 if inner_last else 2]
        out = rows.new_empty(schedule.num_rows + schedule.num_tokens, out_size)
        own = (schedule, target, tile, inner_last)
        grouped_rows(rows, None, weights, None, *own, out=out[: schedule.num_rows])
        alone = (schedule.graft_alone(), target, tile, inner_last)
        grouped_rows(
            graft_rows[:0], graft_rows, graft_weights[None], graft_weights, *alone, out=out[schedule.num_rows :]
        )
        return out
    num_experts, inner_size = weights.shape[0], rows.shape[1]
    out_size = weights.shape[1 if inner_last else 2]
    has_graft = graft_rows is not None
    graft_inner_size = graft_rows.shape[1] if has_graft else 0
    graft_row_tiles = schedule.graft_row_tiles(has_graft)
    if out is None:
        out = rows.new_empty(schedule.num_rows + (schedule.num_tokens if has_graft else 0), out_size)
    codes, scales, format = codes_and_scales(weights)
    # A descriptor pads with zeros past its own end only: where experts follow each other along K, K must be even.
    even = inner_size % tile.block_k == 0
    tma = use_tma(target, rows, graft_rows, weights, graft_weights) and (inner_last or even)
    source_block = [tile.block_m, tile.block_k]
    weight_block = [tile.block_n, tile.block_k] if inner_last else [tile.block_k, tile.block_n]
    max_tiles = (schedule.max_row_tiles + graft_row_tiles) * cdiv(out_size, tile.block_n)
    _grouped_rows_kernel[(target.programs(tile, max_tiles),)](
        operand(rows, tma, source_block), operand(graft_rows, tma, source_block),
        operand(codes, tma, weight_block), scales, operand(graft_weights, tma, weight_block),
        out,
        schedule.row_tiles, schedule.num_row_tiles, schedule.max_row_tiles, graft_row_tiles,
        schedule.num_tokens, schedule.num_rows, num_experts, inner_size, graft_inner_size, out_size,
        HAS_GRAFT=has_graft, INNER_LAST=inner_last, TMA=tma,
        EVEN=even and graft_inner_size % tile.block_k == 0, ALIGN=alignment(inner_size, graft_inner_size, out_size),
        FORMAT=format,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out
