"""Stable counting sort of the (token, slot) pairs by expert, on the device, without a host synchronisation.

    sorted_pairs[position(p)] = p      position(p) = offset[e] + #{q < p : expert(q) = e}      for pair p of expert e

Twin: `reference.routing_plan`. Two launches: counts per block of pairs, then every block adds the counts of the blocks
before it and ranks its own pairs; where there is one block, as for few tokens, it counts for itself, and one launch is
enough. Integers only and no atomics, so the order is the same on every run. Pairs of an id that is no expert here
(`>= E`: expert parallelism) keep their order behind all others.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flex_kernels.backends.triton.launch import INTERPRET, cdiv, contiguous, next_power_of_2

# Pairs ranked at once times experts: the comparison table [pairs, experts] that stays in registers.
RANK_TABLE = 4096
# Pairs of one program, while there are few; with many, programs grow so that no more than MAX_BLOCKS count rows exist.
MIN_PAIRS_PER_PROGRAM = 64 if INTERPRET else 256
MAX_BLOCKS = 256


@triton.jit
def _count_pairs(
    expert_indices_ptr, first, num_pairs, pairs_per_program, num_experts,
    BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """[BLOCK_E]: pairs of each expert in the block that begins with pair `first`."""
    experts = tl.arange(0, BLOCK_E)
    counts = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for start in range(0, pairs_per_program, BLOCK_P):
        pairs = first + start + tl.arange(0, BLOCK_P)
        ids = tl.load(expert_indices_ptr + pairs, mask=pairs < num_pairs, other=num_experts)
        counts += tl.sum((ids[:, None] == experts[None, :]).to(tl.int32), axis=0)
    return tl.where(experts < num_experts, counts, 0)


@triton.jit(do_not_specialize=["num_pairs", "pairs_per_program"])
def _count_pairs_kernel(
    expert_indices_ptr, counts_ptr, num_pairs, pairs_per_program, num_experts,
    BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """counts[block, e]: pairs of expert `e` in this program's block of pairs."""
    first = tl.program_id(0).to(tl.int64) * pairs_per_program
    experts = tl.arange(0, BLOCK_E)
    counts = _count_pairs(expert_indices_ptr, first, num_pairs, pairs_per_program, num_experts, BLOCK_P, BLOCK_E)
    tl.store(counts_ptr + tl.program_id(0) * num_experts + experts, counts, mask=experts < num_experts)


@triton.jit(do_not_specialize=["num_pairs", "pairs_per_program", "num_blocks"])
def _place_pairs_kernel(
    expert_indices_ptr, counts_ptr, sorted_pairs_ptr, tokens_per_expert_ptr, expert_offsets_ptr,
    num_pairs, pairs_per_program, num_blocks, num_experts,
    BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_B: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    first = program.to(tl.int64) * pairs_per_program
    experts = tl.arange(0, BLOCK_E)
    expert_mask = experts < num_experts
    total = tl.zeros((BLOCK_E,), dtype=tl.int32)
    before = tl.zeros((BLOCK_E,), dtype=tl.int32)
    if ONE_BLOCK:
        total += _count_pairs(expert_indices_ptr, first, num_pairs, pairs_per_program, num_experts, BLOCK_P, BLOCK_E)
    else:
        for start in range(0, num_blocks, BLOCK_B):
            blocks = start + tl.arange(0, BLOCK_B)
            mask = (blocks < num_blocks)[:, None] & expert_mask[None, :]
            counts = tl.load(counts_ptr + blocks[:, None] * num_experts + experts[None, :], mask=mask, other=0)
            total += tl.sum(counts, axis=0)
            before += tl.sum(tl.where((blocks < program)[:, None], counts, 0), axis=0)
    offsets = tl.cumsum(total, axis=0) - total
    num_placed = tl.sum(total, axis=0)
    if program == 0:
        tl.store(tokens_per_expert_ptr + experts, total, mask=expert_mask)
        tl.store(expert_offsets_ptr + experts, offsets, mask=expert_mask)
        tl.store(expert_offsets_ptr + num_experts, num_placed)

    next_position = offsets + before  # [E], of each expert's next pair
    next_unplaced = num_placed + first - tl.sum(before, axis=0)  # of the next pair that no expert here takes
    for start in range(0, pairs_per_program, BLOCK_P):
        pairs = first + start + tl.arange(0, BLOCK_P)
        pair_mask = pairs < num_pairs
        ids = tl.load(expert_indices_ptr + pairs, mask=pair_mask, other=num_experts)
        chosen = (ids[:, None] == experts[None, :]) & expert_mask[None, :]
        ranks = tl.cumsum(chosen.to(tl.int32), axis=0)
        placed = tl.sum(chosen.to(tl.int32), axis=1)
        positions = tl.sum(tl.where(chosen, next_position[None, :] + ranks - 1, 0), axis=1)
        unplaced_ranks = tl.cumsum(1 - placed, axis=0)
        positions = tl.where(placed > 0, positions, next_unplaced + unplaced_ranks - 1)
        tl.store(sorted_pairs_ptr + positions, pairs.to(tl.int32), mask=pair_mask)
        next_position += tl.sum(chosen.to(tl.int32), axis=0)
        next_unplaced += tl.sum(1 - placed, axis=0)


def routing_plan(expert_indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """sorted_pairs [T*K], tokens_per_expert [E], expert_offsets [E+1], all int32; `expert_indices` are not negative."""
    (expert_indices,) = contiguous(expert_indices)
    num_pairs = expert_indices.numel()
    new = expert_indices.new_empty
    sorted_pairs = new(num_pairs, dtype=torch.int32)
    if num_pairs == 0:
        return sorted_pairs, *(new(n, dtype=torch.int32).zero_() for n in (num_experts, num_experts + 1))
    tokens_per_expert, expert_offsets = new(num_experts, dtype=torch.int32), new(num_experts + 1, dtype=torch.int32)
    block_e = next_power_of_2(num_experts)
    block_p = max(16, min(MIN_PAIRS_PER_PROGRAM, RANK_TABLE // block_e))
    pairs_per_program = max(MIN_PAIRS_PER_PROGRAM, next_power_of_2(cdiv(num_pairs, MAX_BLOCKS)))
    num_blocks = cdiv(num_pairs, pairs_per_program)
    counts = new(num_blocks if num_blocks > 1 else 0, num_experts, dtype=torch.int32)
    with torch.cuda.device_of(expert_indices):
        if num_blocks > 1:
            _count_pairs_kernel[(num_blocks,)](
                expert_indices, counts, num_pairs, pairs_per_program, num_experts, BLOCK_P=block_p, BLOCK_E=block_e
            )
        _place_pairs_kernel[(num_blocks,)](
            expert_indices, counts, sorted_pairs, tokens_per_expert, expert_offsets,
            num_pairs, pairs_per_program, num_blocks, num_experts,
            BLOCK_P=block_p, BLOCK_E=block_e, BLOCK_B=max(1, RANK_TABLE // block_e), ONE_BLOCK=num_blocks == 1,
        )  # fmt: skip
    return sorted_pairs, tokens_per_expert, expert_offsets
