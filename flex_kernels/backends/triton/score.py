"""How well experts, and single neurons, reconstruct the layer's output on calibration data (paper: graft selection).

    score_experts   per batch b, expert i:   sum_t ||F_t - E_i(x_t)||^2,  sum_t <F_t, E_i(x_t)>,  sum_t ||E_i(x_t)||^2
    score_neurons   per neuron (e, j):       q = ||d_ej||^2 sum_t a_ej(t)^2,        b = sum_t a_ej(t) <d_ej, F_t>

Twins: `reference.score_experts`, `reference.score_neurons`. The experts' outputs `[E, T, H]` (2 to 4 GB a layer in
bf16) are never written: each program of the down GEMM walks all columns of its rows and keeps three sums per row; a
second launch adds rows per batch in a fixed order. The activations `A` of as many experts as fit ACTIVATION_BYTES pass
through memory, from the layer's own gate-up kernel. `score_neurons` writes nothing but its result: three products share
one loop (`X G^T`, `X U^T`, `F D`), and a program keeps its neurons' sums over all tokens. No atomics.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from flex_kernels.backends.triton.activations import pass_through
from flex_kernels.backends.triton.experts_fwd import gate_up_fwd
from flex_kernels.backends.triton.grouped import find_weight, load_rows, load_weight, make_schedule
from flex_kernels.backends.triton.launch import Target, alignment, cdiv, contiguous, operand, target_of, use_tma
from flex_kernels.backends.triton.tiles import expert_tiles, neuron_tile, score_tile
from flex_kernels.weights import Experts, Stored

# Memory for the activations of the experts scored in one launch. Enough rows to fill a GPU, little beside the weights.
ACTIVATION_BYTES = 256 << 20
TOKENS_AT_A_TIME = 1024  # of the sum per batch
MIN_TOKENS_AT_ONCE = 1024  # however wide an expert is: fewer would not fill a GPU


@triton.jit(do_not_specialize=["num_tokens", "first_token", "num_rows", "first_expert", "plane"])
def _score_experts_kernel(
    activations_ptr, down, target_ptr, token_sums_ptr,
    num_tokens, first_token, num_rows, first_expert, hidden_size, intermediate_size, plane,
    TMA: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows: `num_rows` tokens from `first_token` on; program (row tile, expert). Sums [3, E, T], `plane` apart."""
    hidden_size = hidden_size // ALIGN * ALIGN
    intermediate_size = intermediate_size // ALIGN * ALIGN
    local_expert = tl.program_id(1)
    expert = first_expert + local_expert
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    safe_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)
    tokens = first_token + safe_rows
    source_rows = local_expert.to(tl.int64) * num_rows + safe_rows
    source_ptrs = activations_ptr + source_rows[:, None] * intermediate_size + tl.arange(0, BLOCK_K)[None, :]

    residual = tl.zeros((BLOCK_M,), dtype=tl.float32)
    inner_product = tl.zeros((BLOCK_M,), dtype=tl.float32)
    energy = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for first_column in range(0, hidden_size, BLOCK_N):
        columns = first_column + tl.arange(0, BLOCK_N)
        place = find_weight(
            down, expert * hidden_size, first_column, intermediate_size, hidden_size, True, TMA, BLOCK_N, BLOCK_K
        )
        out = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, intermediate_size, BLOCK_K):
            source = load_rows(source_ptrs, k, intermediate_size, EVEN, BLOCK_K)
            matrix = load_weight(
                down, place, k, first_column, intermediate_size, hidden_size, True, TMA, EVEN, BLOCK_N, BLOCK_K
            )
            out = tl.dot(source, matrix, out, input_precision="ieee")
        kept = row_mask[:, None] & (columns < hidden_size)[None, :]
        out = tl.where(kept, out, 0.0)
        target_ptrs = target_ptr + tokens[:, None] * hidden_size + columns[None, :]
        wanted = tl.load(target_ptrs, mask=kept, other=0.0).to(tl.float32)
        residual += tl.sum((wanted - out) * (wanted - out), axis=1)
        inner_product += tl.sum(wanted * out, axis=1)
        energy += tl.sum(out * out, axis=1)
    sums_ptrs = token_sums_ptr + expert.to(tl.int64) * num_tokens + tokens
    tl.store(sums_ptrs, residual, mask=row_mask)
    tl.store(sums_ptrs + plane, inner_product, mask=row_mask)
    tl.store(sums_ptrs + 2 * plane, energy, mask=row_mask)


@triton.jit(do_not_specialize=["num_tokens", "plane"])
def _sum_batches_kernel(
    token_sums_ptr, batch_offsets_ptr, scores_ptr, num_tokens, num_experts, plane, BLOCK_T: tl.constexpr
):
    """scores[b, e, :]: the sums of the tokens of batch `b`, added in token order."""
    batch, expert, kind = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end = tl.load(batch_offsets_ptr + batch), tl.load(batch_offsets_ptr + batch + 1)
    source_ptr = token_sums_ptr + kind.to(tl.int64) * plane + expert.to(tl.int64) * num_tokens
    total = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for first in range(start, end, BLOCK_T):
        tokens = first + tl.arange(0, BLOCK_T)
        total += tl.load(source_ptr + tokens, mask=tokens < end, other=0.0)
    tl.store(scores_ptr + (batch * num_experts + expert) * 3 + kind, tl.sum(total, axis=0))


def score_experts(
    hidden_states: Tensor,
    target: Tensor,
    gate_up_proj: Experts,
    down_proj: Experts,
    batch_offsets: Tensor,
    activation: str,
) -> Tensor:
    """[B, E, 3] fp32. `target` may have any float dtype; it is compared in fp32. Codes become dense a few experts at a
    time."""
    if isinstance(gate_up_proj, Stored):
        parts = _dense_parts(hidden_states, gate_up_proj, down_proj)
        return torch.cat([score_experts(hidden_states, target, *part, batch_offsets, activation) for part in parts], 1)
    hidden_states, target, gate_up_proj = contiguous(hidden_states, target, gate_up_proj)
    down_proj, batch_offsets = contiguous(down_proj, batch_offsets)
    num_tokens = hidden_states.shape[0]
    num_experts, _, intermediate_size = down_proj.shape
    num_batches = batch_offsets.numel() - 1
    scores = target.new_empty(num_batches, num_experts, 3, dtype=torch.float32)
    if num_tokens == 0 or scores.numel() == 0:
        return scores.zero_()
    token_sums = target.new_empty(3, num_experts, num_tokens, dtype=torch.float32)
    chip = target_of(hidden_states.device)
    row_bytes = intermediate_size * hidden_states.element_size()
    tokens_at_once = min(num_tokens, max(MIN_TOKENS_AT_ONCE, ACTIVATION_BYTES // row_bytes))
    experts_at_once = min(num_experts, max(1, ACTIVATION_BYTES // (row_bytes * tokens_at_once)))
    with torch.cuda.device_of(hidden_states):
        for first_token in range(0, num_tokens, tokens_at_once):
            tokens = slice(first_token, min(first_token + tokens_at_once, num_tokens))
            for first_expert in range(0, num_experts, experts_at_once):
                some = slice(first_expert, min(first_expert + experts_at_once, num_experts))
                activations = _all_tokens_through(hidden_states[tokens], gate_up_proj[some], chip, activation)
                _score_rows(activations, down_proj, target, token_sums, first_token, first_expert, chip)
        _sum_batches_kernel[(num_batches, num_experts, 3)](
            token_sums, batch_offsets, scores, num_tokens, num_experts, num_experts * num_tokens,
            BLOCK_T=TOKENS_AT_A_TIME,
        )  # fmt: skip
    return scores


def _dense_parts(hidden_states: Tensor, gate_up_proj: Stored, down_proj: Stored) -> Iterator[tuple[Tensor, Tensor]]:
    """Both matrices of as many experts as `ACTIVATION_BYTES` hold, dense."""
    num_experts, rows, columns = gate_up_proj.shape
    at_once = max(1, ACTIVATION_BYTES // max(1, 2 * rows * columns * hidden_states.element_size()))
    for first in range(0, num_experts, at_once):
        some = slice(first, first + at_once)
        yield gate_up_proj.experts(some, hidden_states.dtype), down_proj.experts(some, hidden_states.dtype)


def _all_tokens_through(hidden_states: Tensor, gate_up_proj: Tensor, chip: Target, activation: str) -> Tensor:
    """A of every given expert on every token, [E, T, I]: the layer's kernel with all tokens routed to all experts."""
    num_tokens, num_experts = hidden_states.shape[0], gate_up_proj.shape[0]
    new = {"dtype": torch.int32, "device": hidden_states.device}
    tokens = torch.arange(num_tokens, **new).repeat(num_experts)
    offsets = torch.arange(num_experts + 1, **new) * num_tokens
    sizes = (hidden_states.shape[1], gate_up_proj.shape[1] // 2)
    tile = expert_tiles(chip, hidden_states.dtype, tokens.numel(), num_experts, sizes).gate_up
    schedule = make_schedule(tokens, offsets, num_tokens, tile.block_m)
    activations, *_ = gate_up_fwd(
        hidden_states, tokens, 1, gate_up_proj, None, schedule, chip, tile, activation, save_preactivations=False
    )
    return activations.view(num_experts, num_tokens, -1)


def _score_rows(
    activations: Tensor,
    down_proj: Tensor,
    target: Tensor,
    token_sums: Tensor,
    first_token: int,
    first_expert: int,
    chip: Target,
) -> None:
    num_experts, num_rows, intermediate_size = activations.shape
    hidden_size, num_tokens = down_proj.shape[1], target.shape[0]
    tile = score_tile(chip, activations.dtype, (hidden_size, intermediate_size))
    tma = use_tma(chip, down_proj)
    _score_experts_kernel[(cdiv(num_rows, tile.block_m), num_experts)](
        activations, operand(down_proj, tma, [tile.block_n, tile.block_k]), target, token_sums,
        num_tokens, first_token, num_rows, first_expert, hidden_size, intermediate_size, token_sums[0].numel(),
        TMA=tma, EVEN=intermediate_size % tile.block_k == 0, ALIGN=alignment(hidden_size, intermediate_size),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def _score_neurons_kernel(
    hidden_states_ptr, target_ptr, gate_up, down,
    energy_ptr, correlation_ptr,
    num_tokens, hidden_size, intermediate_size,
    ACTIVATION: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (neuron tile, expert): `BLOCK_N` neurons of one expert, over all tokens."""
    hidden_size = hidden_size // ALIGN * ALIGN
    intermediate_size = intermediate_size // ALIGN * ALIGN
    expert = tl.program_id(1)
    first_neuron = tl.program_id(0) * BLOCK_N
    neurons = first_neuron + tl.arange(0, BLOCK_N)
    neuron_mask = neurons < intermediate_size
    inner_offsets = tl.arange(0, BLOCK_K)
    if not TMA:
        gate_rows = expert.to(tl.int64) * 2 * intermediate_size + tl.minimum(neurons, intermediate_size - 1)
        gate_ptrs = gate_up + gate_rows[None, :] * hidden_size + inner_offsets[:, None]
        up_ptrs = gate_ptrs + tl.cast(intermediate_size, tl.int64) * hidden_size
        down_rows = expert.to(tl.int64) * hidden_size + inner_offsets
        down_ptrs = down + down_rows[:, None] * intermediate_size + neurons[None, :]

    activation_energy = tl.zeros((BLOCK_N,), dtype=tl.float32)
    correlation = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first_token in range(0, num_tokens, BLOCK_M):
        tokens = first_token + tl.arange(0, BLOCK_M)
        token_mask = tokens < num_tokens
        row_offsets = tl.minimum(tokens, num_tokens - 1).to(tl.int64)[:, None] * hidden_size + inner_offsets[None, :]
        gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        wanted = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)  # F D: what the target asks of each neuron
        for k in range(0, hidden_size, BLOCK_K):
            in_range = inner_offsets < hidden_size - k
            if EVEN:
                source = tl.load(hidden_states_ptr + row_offsets + k)
                target = tl.load(target_ptr + row_offsets + k)
            else:
                source = tl.load(hidden_states_ptr + row_offsets + k, mask=in_range[None, :], other=0.0)
                target = tl.load(target_ptr + row_offsets + k, mask=in_range[None, :], other=0.0)
            if TMA:
                gate_matrix = gate_up.load([expert * 2 * intermediate_size + first_neuron, k]).T
                up_matrix = gate_up.load([expert * 2 * intermediate_size + intermediate_size + first_neuron, k]).T
                down_matrix = down.load([expert * hidden_size + k, first_neuron])
            else:
                gate_matrix = tl.load(gate_ptrs + k, mask=in_range[:, None], other=0.0)
                up_matrix = tl.load(up_ptrs + k, mask=in_range[:, None], other=0.0)
                down_offset = tl.cast(k, tl.int64) * intermediate_size
                down_matrix = tl.load(down_ptrs + down_offset, mask=in_range[:, None] & neuron_mask[None, :], other=0.0)
            gate = tl.dot(source, gate_matrix, gate, input_precision="ieee")
            up = tl.dot(source, up_matrix, up, input_precision="ieee")
            wanted = tl.dot(target, down_matrix, wanted, input_precision="ieee")
        activations = gate * pass_through(gate, ACTIVATION) * up
        activations = tl.where(token_mask[:, None], activations, 0.0)
        activation_energy += tl.sum(activations * activations, axis=0)
        correlation += tl.sum(activations * wanted, axis=0)

    column_energy = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for k in range(0, hidden_size, BLOCK_K):
        if TMA:
            down_matrix = down.load([expert * hidden_size + k, first_neuron])
        else:
            mask = (inner_offsets < hidden_size - k)[:, None] & neuron_mask[None, :]
            down_matrix = tl.load(down_ptrs + tl.cast(k, tl.int64) * intermediate_size, mask=mask, other=0.0)
        down_matrix = down_matrix.to(tl.float32)
        column_energy += tl.sum(down_matrix * down_matrix, axis=0)
    out_offsets = expert.to(tl.int64) * intermediate_size + neurons
    tl.store(energy_ptr + out_offsets, activation_energy * column_energy, mask=neuron_mask)
    tl.store(correlation_ptr + out_offsets, correlation, mask=neuron_mask)


def score_neurons(
    hidden_states: Tensor, target: Tensor, gate_up_proj: Experts, down_proj: Experts, activation: str
) -> tuple[Tensor, Tensor]:
    """energy [E, I] and correlation [E, I], fp32. `target` is rounded to the weights' dtype, scaled to a maximum of 1
    before (a small gradient would vanish in fp16). Codes become dense a few experts at a time."""
    if isinstance(gate_up_proj, Stored):
        parts = _dense_parts(hidden_states, gate_up_proj, down_proj)
        found = [score_neurons(hidden_states, target, *part, activation) for part in parts]
        return tuple(torch.cat(columns) for columns in zip(*found, strict=True))
    hidden_states, target, gate_up_proj, down_proj = contiguous(hidden_states, target, gate_up_proj, down_proj)
    num_tokens, hidden_size = hidden_states.shape
    num_experts, _, intermediate_size = down_proj.shape
    energy = hidden_states.new_empty(num_experts, intermediate_size, dtype=torch.float32)
    correlation = torch.empty_like(energy)
    if num_tokens == 0 or energy.numel() == 0:
        return energy.zero_(), correlation.zero_()
    scale = None
    if target.dtype != down_proj.dtype:
        scale = target.abs().amax().float().clamp_min(torch.finfo(torch.float32).tiny)
        target = (target / scale).to(down_proj.dtype)
    chip = target_of(hidden_states.device)
    tile = neuron_tile(chip, hidden_states.dtype, (hidden_size, intermediate_size))
    even = hidden_size % tile.block_k == 0
    tma = use_tma(chip, gate_up_proj, down_proj) and even
    with torch.cuda.device_of(hidden_states):
        _score_neurons_kernel[(cdiv(intermediate_size, tile.block_n), num_experts)](
            hidden_states, target,
            operand(gate_up_proj, tma, [tile.block_n, tile.block_k]),
            operand(down_proj, tma, [tile.block_k, tile.block_n]),
            energy, correlation,
            num_tokens, hidden_size, intermediate_size,
            ACTIVATION=activation, TMA=tma, EVEN=even, ALIGN=alignment(hidden_size, intermediate_size),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return energy, correlation if scale is None else correlation * scale
