"""Subjects of `bench kernels`: the small ops on rows between the products, whose operands the op before just wrote."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from switchgear_bench.kernel_experts import EXPERTS, Experts, route
from switchgear_bench.kernel_subject import (
    Baseline,
    Subject,
    assert_near,
    call_rows,
    spoil,
    words,
)
from switchgear_runtime import ops, ops_reference
from switchgear_runtime.model.native_structs import Buffer

NUM_TOKENS = (1, 32, 512)
_NUM_HEADS, _HEAD_SIZE, _NUM_POSITIONS = 16, 64, 4096
_EPS = 1e-6
_BF16 = 1  # Dtype of csrc/kernels/table.h
_NUM_RANKS = 2
_TOLERANCE = 1e-5


def subjects(num_tokens: Sequence[int] = NUM_TOKENS, experts: Experts = EXPERTS) -> Iterator[Subject]:
    for tokens in num_tokens:
        generator = torch.Generator().manual_seed(tokens)
        yield _rms_norm(torch.randn(tokens, experts.hidden, generator=generator))
        yield _rope(torch.randn(tokens, _NUM_HEADS, _HEAD_SIZE, generator=generator))
        yield _router(torch.randn(tokens, experts.num_experts, generator=generator), experts.top_k)
        x_TD = torch.randn(tokens, experts.hidden, generator=generator)
        ids_TK = route(experts, tokens, "skewed", 0)
        yield _dispatch(x_TD, ids_TK, experts)
        yield _combine(x_TD, ids_TK, experts)


def _rms_norm(x_TD: Tensor) -> Subject:
    tokens, size = x_TD.shape
    weight, out = torch.rand(size), torch.empty_like(x_TD)
    return Subject(
        kernel="rms_norm",
        op="rms_norm",
        format="f32",
        shape=f"{size}",
        num_tokens=tokens,
        calls=call_rows([words(x_TD, weight, _EPS, tokens, size, out)]),
        num_bytes=4.0 * (2 * x_TD.numel() + size),
        flops=4.0 * x_TD.numel(),
        arithmetic="float32",
        source="cache",
        prepare=lambda: spoil(out),
        check=lambda: assert_near(out, ops_reference.rms_norm(x_TD, weight, _EPS), _TOLERANCE),
        baseline=Baseline(name="torch rms_norm", run=lambda _: functional.rms_norm(x_TD, (size,), weight, _EPS)),
        keep=(x_TD, weight, out),
    )


def _rope(start_THC: Tensor) -> Subject:
    """In place: repeated calls go on rotating."""
    tokens, num_heads, head_size = start_THC.shape
    x = start_THC.clone()
    positions = torch.arange(tokens, dtype=torch.int64) * 7 % _NUM_POSITIONS
    inverse = 10_000.0 ** (-torch.arange(head_size // 2) / (head_size // 2))
    angles = torch.arange(_NUM_POSITIONS)[:, None] * inverse
    cos, sin = angles.cos().contiguous(), angles.sin().contiguous()

    def check() -> None:
        expected = start_THC.clone()
        ops_reference.rope_(expected, positions, cos, sin)
        assert_near(x, expected, _TOLERANCE)

    return Subject(
        kernel="rope",
        op="rope",
        format="f32",
        shape=f"{num_heads} heads of {head_size}",
        num_tokens=tokens,
        calls=call_rows([words(x, positions, cos, sin, tokens, num_heads, head_size, _NUM_POSITIONS)]),
        num_bytes=8.0 * x.numel() + 4.0 * tokens * head_size,
        flops=3.0 * x.numel(),
        arithmetic="float32",
        source="cache",
        prepare=lambda: x.copy_(start_THC),
        check=check,
        keep=(x, positions, cos, sin),
    )


def _router(logits_TE: Tensor, top_k: int) -> Subject:
    tokens, num_experts = logits_TE.shape
    weights, ids = torch.empty(tokens, top_k), torch.empty(tokens, top_k, dtype=torch.int32)

    def check() -> None:
        expected, expected_ids = ops_reference.topk_router(logits_TE, top_k, "softmax", True)
        assert torch.equal(ids, expected_ids), "other experts were chosen"
        assert_near(weights, expected, _TOLERANCE)

    def torch_router(_: int) -> Tensor:
        best = logits_TE.softmax(-1).topk(top_k).values
        return best / best.sum(-1, keepdim=True)

    return Subject(
        kernel="router",
        op="topk_router",
        format="f32",
        shape=f"softmax, top {top_k} of {num_experts}",
        num_tokens=tokens,
        calls=call_rows([words(logits_TE, None, tokens, num_experts, top_k, 0, 1, weights, ids)]),
        num_bytes=4.0 * (logits_TE.numel() + 2 * weights.numel()),
        flops=4.0 * logits_TE.numel(),
        arithmetic="float32",
        source="cache",
        prepare=lambda: spoil(weights, ids),
        check=check,
        baseline=Baseline(name="torch softmax, topk, division", run=torch_router),
        keep=(logits_TE, weights, ids),
    )


def _dispatch(x_TD: Tensor, ids_TK: Tensor, experts: Experts) -> Subject:
    tokens, top_k = ids_TK.shape
    slots_per_rank = experts.num_experts // _NUM_RANKS
    expected = ops_reference.dispatch_pack(x_TD, ids_TK, slots_per_rank, _NUM_RANKS, torch.bfloat16)
    send = torch.empty(expected[0].numel(), dtype=torch.uint8)
    offsets, pair_index = torch.empty_like(expected[1]), torch.empty_like(expected[2])

    def check() -> None:
        assert torch.equal(offsets, expected[1]), "messages have other bounds"
        assert torch.equal(send, expected[0]), "messages have other bytes"
        assert torch.equal(pair_index, expected[2]), "pairs are in another order"

    arguments: list[int | Tensor] = [x_TD, ids_TK, tokens, experts.hidden, top_k, slots_per_rank, _NUM_RANKS, _BF16]
    return Subject(
        kernel="dispatch_pack",
        op="dispatch_pack",
        format="bf16",
        shape=f"{experts.hidden} to {_NUM_RANKS} ranks, top {top_k}",
        num_tokens=tokens,
        calls=call_rows([words(*arguments, send, offsets, pair_index)]),
        num_bytes=4.0 * (x_TD.numel() + 2 * ids_TK.numel()) + send.numel(),
        flops=float(x_TD.numel()),
        arithmetic="float32",
        source="cache",
        prepare=lambda: spoil(send, offsets, pair_index),
        check=check,
        keep=(x_TD, ids_TK, send, offsets, pair_index),
    )


def _combine(x_TD: Tensor, ids_TK: Tensor, experts: Experts) -> Subject:
    tokens, top_k = ids_TK.shape
    slots_per_rank = experts.num_experts // _NUM_RANKS
    send, offsets, pair_index = ops.dispatch_pack(x_TD, ids_TK, slots_per_rank, _NUM_RANKS, torch.bfloat16)
    generator = torch.Generator().manual_seed(tokens)
    pairs = [_num_pairs(send[offsets[r] : offsets[r + 1]]) for r in range(_NUM_RANKS)]
    rows = [torch.randn(n, experts.hidden, generator=generator).bfloat16() for n in pairs]
    returned = [row.view(torch.uint8).flatten() for row in rows]
    buffers = (Buffer * _NUM_RANKS)(*(Buffer(message.data_ptr(), message.numel()) for message in returned))
    weights = torch.rand(tokens, top_k, generator=generator)
    out = torch.empty(tokens, experts.hidden)
    joined = torch.cat(rows)

    def torch_combine(_: int) -> Tensor:
        return torch.bmm(weights[:, None], joined[pair_index.long()].float())[:, 0]

    arguments: list[int | Tensor] = [pair_index, weights, tokens, top_k, experts.hidden, _BF16, out]
    return Subject(
        kernel="combine",
        op="combine",
        format="bf16",
        shape=f"{experts.hidden}, top {top_k}, {_NUM_RANKS} ranks",
        num_tokens=tokens,
        calls=call_rows([[ctypes.addressof(buffers), _NUM_RANKS, *words(*arguments)]]),
        num_bytes=2.0 * joined.numel() + 4.0 * (out.numel() + 2 * weights.numel()),
        flops=2.0 * joined.numel(),
        arithmetic="float32",
        source="cache",
        prepare=lambda: spoil(out),
        check=lambda: assert_near(
            out, ops_reference.combine(returned, pair_index, weights, experts.hidden, torch.bfloat16), _TOLERANCE
        ),
        baseline=Baseline(name="torch gather, bmm", run=torch_combine),
        keep=(buffers, returned, rows, weights, pair_index, out),
    )


def _num_pairs(message: Tensor) -> int:
    return struct.unpack_from("<4I", message.numpy().tobytes())[1] if message.numel() else 0
