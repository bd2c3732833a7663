"""Subjects of `bench kernels`: attention over the paged cache, prefill of one prompt and decode of batches."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from switchgear_bench.kernel_subject import (
    Baseline,
    Subject,
    assert_near,
    call_rows,
    spoil,
    words,
)
from switchgear_runtime import ops_reference

PREFILL_TOKENS = (512, 2048)
DECODE_CONTEXTS = (128, 512, 1024, 4096)
DECODE_BATCHES = (1, 8, 32)
_BLOCK_SIZE = 16
_TOLERANCE = 2e-2  # the softmax's weights are rounded to bf16
_BF16 = 1  # Dtype of csrc/kernels/table.h
_NUM_CALLS_MAX = 4096  # places in the cache that calls take turns with


class _Arguments(ctypes.Structure):
    """Mirror of sg_attention_args (csrc/kernels/ops.h)."""

    _fields_ = [
        ("q_THC", ctypes.c_void_p),
        ("k_cache", ctypes.c_void_p),
        ("v_cache", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("block_tables_SB", ctypes.c_void_p),
        ("seq_ids_T", ctypes.c_void_p),
        ("positions_T", ctypes.c_void_p),
        ("sinks_H", ctypes.c_void_p),
        ("out_THC", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("head_size", ctypes.c_int64),
        ("num_blocks", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("num_seqs", ctypes.c_int64),
        ("table_width", ctypes.c_int64),
        ("sliding_window", ctypes.c_int64),
        ("scale", ctypes.c_float),
    ]


@dataclass(frozen=True, slots=True)
class Heads:
    name: str
    num_heads: int
    num_kv_heads: int
    head_size: int

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.head_size)


HEADS = Heads("16 heads of 64, 4 of KV", 16, 4, 64)  # of the bench model


class _Cache:
    """Random keys and values, in blocks that lie anywhere; the same bytes also serve torch, which has no blocks."""

    def __init__(self, heads: Heads, arena_bytes: int) -> None:
        self.heads = heads
        self.num_blocks = arena_bytes // (2 * 2 * heads.num_kv_heads * _BLOCK_SIZE * heads.head_size)
        shape = (self.num_blocks, heads.num_kv_heads, _BLOCK_SIZE, heads.head_size)
        generator = torch.Generator().manual_seed(self.num_blocks)
        few = torch.randn(min(self.num_blocks, 1021), *shape[1:], generator=generator).bfloat16()
        repeats = -(-self.num_blocks // len(few))
        self.k, self.v = (few.repeat(repeats, 1, 1, 1)[: self.num_blocks].contiguous() for _ in range(2))
        self.order = torch.randperm(self.num_blocks, generator=generator).int()

    def tables(self, num_seqs: int, context: int) -> list[Tensor]:
        """[S, B] each, of other blocks than the one before."""
        width = -(-context // _BLOCK_SIZE)
        count = min(_NUM_CALLS_MAX, self.num_blocks // (num_seqs * width))
        if count < 1:
            raise ValueError(
                f"{num_seqs} sequences of {context} tokens do not fit the arena of {self.num_blocks} blocks"
            )
        used = self.order[: count * num_seqs * width]
        return list(used.view(count, num_seqs, width).contiguous())


def subjects(
    arena_bytes: int,
    heads: Heads = HEADS,
    prefill_tokens: Sequence[int] = PREFILL_TOKENS,
    decode: Sequence[tuple[int, int]] = tuple(itertools.product(DECODE_CONTEXTS, DECODE_BATCHES)),
) -> Iterator[Subject]:
    """`decode`: pairs of context and batch."""
    cache = _Cache(heads, arena_bytes)
    for tokens in prefill_tokens:
        yield _subject(cache, "prefill", 1, tokens, tokens)
    for context, batch in decode:
        yield _subject(cache, f"decode at {context}", batch, context, 1)


def _subject(cache: _Cache, what: str, num_seqs: int, context: int, tokens_each: int) -> Subject:
    heads = cache.heads
    num_tokens = num_seqs * tokens_each
    tables = cache.tables(num_seqs, context)
    generator = torch.Generator().manual_seed(context)
    q_THC = torch.randn(num_tokens, heads.num_heads, heads.head_size, generator=generator)
    out_THC = torch.empty_like(q_THC)
    seq_ids = torch.arange(num_seqs, dtype=torch.int32).repeat_interleave(tokens_each)
    positions = torch.arange(context - tokens_each, context, dtype=torch.int64).repeat(num_seqs)
    arguments = [
        _Arguments(
            q_THC.data_ptr(),
            cache.k.data_ptr(),
            cache.v.data_ptr(),
            _BF16,
            table.data_ptr(),
            seq_ids.data_ptr(),
            positions.data_ptr(),
            None,
            out_THC.data_ptr(),
            num_tokens,
            heads.num_heads,
            heads.head_size,
            cache.num_blocks,
            heads.num_kv_heads,
            _BLOCK_SIZE,
            num_seqs,
            table.shape[1],
            0,
            heads.scale,
        )
        for table in tables
    ]
    seen = int((positions + 1).sum())  # pairs of a query token and a position it sees
    kv_bytes = num_seqs * context * 2 * heads.num_kv_heads * heads.head_size * 2
    return Subject(
        kernel="attention",
        op="paged_attention",
        format="bf16",
        shape=f"{what}, {heads.name}",
        num_tokens=num_tokens,
        calls=call_rows([words(one) for one in arguments]),
        num_bytes=kv_bytes + 4.0 * (q_THC.numel() + out_THC.numel()),
        flops=4.0 * seen * heads.num_heads * heads.head_size,
        arithmetic="bfloat16",
        source="memory",
        prepare=lambda: spoil(out_THC),
        check=lambda: _check(cache, tables[0], q_THC, seq_ids, positions, out_THC),
        baseline=_baseline(cache, q_THC, num_seqs, context),
        keep=(cache, tables, arguments),
    )


def _check(cache: _Cache, table_SB: Tensor, q_THC: Tensor, seq_ids: Tensor, positions: Tensor, out_THC: Tensor) -> None:
    """The first and the last token, over a cache of their blocks alone."""
    for token in (0, len(q_THC) - 1):
        blocks = table_SB[int(seq_ids[token])].long()
        expected = ops_reference.paged_attention(
            q_THC[token : token + 1],
            cache.k[blocks],
            cache.v[blocks],
            torch.arange(len(blocks), dtype=torch.int32)[None],
            torch.zeros(1, dtype=torch.int32),
            positions[token : token + 1],
            cache.heads.scale,
        )
        assert_near(out_THC[token : token + 1], expected, _TOLERANCE)


def _baseline(cache: _Cache, q_THC: Tensor, num_seqs: int, context: int) -> Baseline:
    """Contiguous keys and values. In decode the heads that share a KV head are its query rows: far faster than
    `enable_gqa`."""
    heads = cache.heads
    g, c = heads.num_kv_heads, heads.head_size
    whole = context // _BLOCK_SIZE * _BLOCK_SIZE
    width = num_seqs * whole // _BLOCK_SIZE
    places = max(1, cache.num_blocks // width)

    def contiguous(blocks: Tensor, i: int) -> Tensor:
        begin = i % places * width
        return blocks[begin : begin + width].view(num_seqs, g, whole, c)

    if len(q_THC) == num_seqs:
        rows = q_THC.view(num_seqs, g, heads.num_heads // g, c).bfloat16()
        return Baseline(
            name="torch sdpa bf16, heads of a KV head as rows",
            run=lambda i: functional.scaled_dot_product_attention(rows, contiguous(cache.k, i), contiguous(cache.v, i)),
        )
    q = q_THC.view(num_seqs, -1, heads.num_heads, c).transpose(1, 2).bfloat16().contiguous()
    return Baseline(
        name="torch sdpa bf16, causal, enable_gqa",
        run=lambda i: functional.scaled_dot_product_attention(
            q, contiguous(cache.k, i), contiguous(cache.v, i), is_causal=True, enable_gqa=True
        ),
    )
