"""A fused mixture of experts in Triton, of the well-known design: what `bench gpu` compares our kernels with.

Pairs (token, k) are sorted by expert, each expert's padded to whole blocks of rows; one launch multiplies all blocks, each
with the weights of its expert; a second product multiplies with the router's weights, and a token's K rows are summed.
vLLM's and SGLang's fused_moe work so; this is written anew. Imported only where Triton is installed.

Letters: T tokens, D hidden, F ffn, K top-k, E experts, N pairs (and, as a kernel's argument, outputs of a product).
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def plan_at_once(
    ids_ptr,
    cursor_ptr,
    sorted_ptr,
    expert_of_block_ptr,
    num_padded_ptr,
    num_pairs,
    max_padded,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """What plan_blocks and place_pairs do, by one program for up to CHUNK pairs."""
    at = tl.arange(0, CHUNK)
    is_pair = at < num_pairs
    ids = tl.load(ids_ptr + at, mask=is_pair, other=0)
    counts = tl.histogram(ids, NUM_EXPERTS, mask=is_pair)
    padded = (counts + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    ends = tl.cumsum(padded, 0)
    tl.store(cursor_ptr + tl.arange(0, NUM_EXPERTS), ends - padded)
    tl.store(num_padded_ptr, tl.sum(padded, 0))
    for begin in range(0, max_padded, CHUNK):
        tl.store(sorted_ptr + begin + at, tl.zeros([CHUNK], tl.int32) + num_pairs, mask=begin + at < max_padded)
    for begin in range(0, max_padded, BLOCKS * BLOCK_M):
        row = begin + tl.arange(0, BLOCKS) * BLOCK_M
        expert = tl.sum((ends[None, :] <= row[:, None]).to(tl.int32), 1)
        tl.store(expert_of_block_ptr + row // BLOCK_M, expert, mask=row < max_padded)
    tl.debug_barrier()  # of the program: cursors and padding are there before pairs are placed
    row = tl.atomic_add(cursor_ptr + ids, 1, mask=is_pair)
    tl.store(sorted_ptr + row, at, mask=is_pair)


@triton.jit
def plan_blocks(
    ids_ptr,
    cursor_ptr,
    ends_ptr,
    sorted_ptr,
    num_padded_ptr,
    num_pairs,
    max_padded,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program 0: where each expert's rows begin and end. The others: every row is padding, until a pair is placed there."""
    program = tl.program_id(0)
    if program > 0:
        at = (program - 1) * CHUNK + tl.arange(0, CHUNK)
        tl.store(sorted_ptr + at, tl.zeros([CHUNK], tl.int32) + num_pairs, mask=at < max_padded)
    else:
        counts = tl.zeros([NUM_EXPERTS], tl.int32)
        for begin in range(0, num_pairs, CHUNK):
            at = begin + tl.arange(0, CHUNK)
            ids = tl.load(ids_ptr + at, mask=at < num_pairs, other=0)
            counts += tl.histogram(ids, NUM_EXPERTS, mask=at < num_pairs)
        padded = (counts + BLOCK_M - 1) // BLOCK_M * BLOCK_M
        ends = tl.cumsum(padded, 0)
        experts = tl.arange(0, NUM_EXPERTS)
        tl.store(cursor_ptr + experts, ends - padded)
        tl.store(ends_ptr + experts, ends)
        tl.store(num_padded_ptr, tl.sum(padded, 0))


@triton.jit
def place_pairs(
    ids_ptr,
    cursor_ptr,
    ends_ptr,
    sorted_ptr,
    expert_of_block_ptr,
    num_pairs,
    max_blocks,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """First a program per CHUNK pairs, each pair to its expert's next row; then one per BLOCKS blocks, for their experts."""
    program = tl.program_id(0)
    num_placing = tl.cdiv(num_pairs, CHUNK)
    if program < num_placing:
        at = program * CHUNK + tl.arange(0, CHUNK)
        ids = tl.load(ids_ptr + at, mask=at < num_pairs, other=0)
        row = tl.atomic_add(cursor_ptr + ids, 1, mask=at < num_pairs)
        tl.store(sorted_ptr + row, at, mask=at < num_pairs)
    else:
        block = (program - num_placing) * BLOCKS + tl.arange(0, BLOCKS)
        ends = tl.load(ends_ptr + tl.arange(0, NUM_EXPERTS))
        expert = tl.sum((ends[None, :] <= block[:, None] * BLOCK_M).to(tl.int32), 1)
        tl.store(expert_of_block_ptr + block, expert, mask=block < max_blocks)


@triton.jit
def grouped_product(
    x_ptr,
    w_ptr,
    y_ptr,
    pair_weights_ptr,
    sorted_ptr,
    expert_of_block_ptr,
    num_padded_ptr,
    num_pairs,
    num_out,
    num_k,
    DIVISOR: tl.constexpr,
    IS_WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y[pair] = w[expert] x[pair // DIVISOR]. Programs that share weights run side by side, GROUP_M blocks of rows at once."""
    program = tl.program_id(0)
    num_padded = tl.load(num_padded_ptr)
    num_n = tl.cdiv(num_out, BLOCK_N)
    num_m = tl.num_programs(0) // num_n
    in_group = GROUP_M * num_n
    first_m = program // in_group * GROUP_M
    size_m = tl.minimum(num_m - first_m, GROUP_M)
    block_m = first_m + program % in_group % size_m
    block_n = program % in_group // size_m
    if block_m * BLOCK_M >= num_padded:
        return
    pair = tl.load(sorted_ptr + block_m * BLOCK_M + tl.arange(0, BLOCK_M))
    is_pair = pair < num_pairs
    expert = tl.load(expert_of_block_ptr + block_m).to(tl.int64)
    out = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + (pair // DIVISOR).to(tl.int64)[:, None] * num_k + k[None, :]
    w_at = w_ptr + expert * num_out * num_k + (out % num_out)[None, :].to(tl.int64) * num_k + k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, num_k, BLOCK_K):
        in_k = k < num_k - begin
        x = tl.load(x_at + begin, mask=is_pair[:, None] & in_k[None, :], other=0.0)
        w = tl.load(w_at + begin, mask=in_k[:, None], other=0.0)
        total = tl.dot(x, w, total)
    if IS_WEIGHTED:
        total = total * tl.load(pair_weights_ptr + pair, mask=is_pair, other=0.0)[:, None]
    y_at = y_ptr + pair.to(tl.int64)[:, None] * num_out + out[None, :]
    tl.store(y_at, total.to(y_ptr.dtype.element_ty), mask=is_pair[:, None] & (out < num_out)[None, :])


@triton.jit
def silu_mul(gate_up_ptr, out_ptr, ffn, BLOCK: tl.constexpr):
    """A program per row and BLOCK columns."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up_ptr + row * 2 * ffn + at, mask=at < ffn, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * ffn + ffn + at, mask=at < ffn, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * ffn + at, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=at < ffn)


@triton.jit
def sum_pairs(rows_ptr, out_ptr, hidden, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """A program per token and BLOCK columns."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        total += tl.load(rows_ptr + (token * TOP_K + k) * hidden + at, mask=at < hidden, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * hidden + at, total.to(out_ptr.dtype.element_ty), mask=at < hidden)


@triton.jit
def softmax_topk(logits_ptr, weights_ptr, ids_ptr, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr):
    """A program per token: the K best, and their softmax among themselves. TOP_K is a power of two."""
    token = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, NUM_EXPERTS)
    places = tl.arange(0, TOP_K)
    left = tl.load(logits_ptr + token * NUM_EXPERTS + experts).to(tl.float32)
    powers = tl.exp(left - tl.max(left, 0))
    ids = tl.zeros([TOP_K], tl.int32)
    weights = tl.zeros([TOP_K], tl.float32)
    for k in tl.static_range(TOP_K):
        best = tl.argmax(left, 0)
        ids = tl.where(places == k, best, ids)
        weights = tl.where(places == k, tl.sum(tl.where(experts == best, powers, 0.0), 0), weights)
        left = tl.where(experts == best, float("-inf"), left)
    tl.store(ids_ptr + token * TOP_K + places, ids)
    tl.store(weights_ptr + token * TOP_K + places, weights / tl.sum(weights, 0))
