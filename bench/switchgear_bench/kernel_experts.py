"""Subjects of `bench kernels`: the grouped ffn of the experts that a batch chose, with even and with skewed loads."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from switchgear_bench.kernel_linear import PANEL
from switchgear_bench.kernel_subject import (
    Baseline,
    Subject,
    assert_near,
    call_rows,
    num_copies,
    spoil,
    words,
)
from switchgear_runtime import ops, ops_reference
from switchgear_runtime.model.native_structs import Buffer
from switchgear_runtime.packing import FORMATS

NUM_TOKENS = (1, 8, 32, 512)
_NUM_BASES = 8  # different experts; the others repeat them
_NUM_DRAWS = 16  # of routing
_SKEW = 1.5  # exponent of Zipf's law
_PAIRS_CHECKED = 8
_TOLERANCE = {"f32": 1e-4, "bf16": 2e-2, "int8": 2e-2, "int4": 2e-2}  # results are bf16 but for f32


class _Arguments(ctypes.Structure):
    """Mirror of sg_experts_args (csrc/kernels/ops.h)."""

    _fields_ = [
        ("recv", ctypes.c_void_p),
        ("num_ranks", ctypes.c_int64),
        ("w13_packed_S", ctypes.c_void_p),
        ("w2_packed_S", ctypes.c_void_p),
        ("format", ctypes.c_int),
        ("payload", ctypes.c_int),
        ("num_slots", ctypes.c_int64),
        ("first_slot", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("ffn", ctypes.c_int64),
        ("out_offsets_R1", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("rows_per_slot_S", ctypes.c_void_p),
    ]


@dataclass(frozen=True, slots=True)
class Experts:
    """Of one layer. `hidden` is a multiple of a panel, `ffn` of half of one."""

    name: str
    num_experts: int
    top_k: int
    hidden: int
    ffn: int


EXPERTS = Experts("64 of 256x1024, top 8", 64, 8, 1024, 256)  # of the bench model


class _Weights:
    """Packed experts of several layers, each of repeated panels; and the same experts as plain bf16 or fp32 for torch."""

    def __init__(self, experts: Experts, format: str, arena_bytes: int) -> None:
        generator = torch.Generator().manual_seed(experts.num_experts)
        half = PANEL // 2
        gates_ups = torch.randn(_NUM_BASES, PANEL, experts.hidden, generator=generator) * 0.03
        downs = torch.randn(_NUM_BASES, PANEL, experts.ffn, generator=generator) * 0.06
        self.gates_ups, self.downs = gates_ups.bfloat16(), downs.bfloat16()
        self.w13 = [ops.pack(base, format, gate_up=True).data for base in self.gates_ups]
        self.w2 = [ops.pack(base, format).data for base in self.downs]
        w13 = [base.repeat(experts.ffn // half) for base in self.w13]
        w2 = [base.repeat(experts.hidden // PANEL) for base in self.w2]
        chosen = [expert % _NUM_BASES for expert in range(experts.num_experts)]
        self.expert_bytes = w13[0].numel() + w2[0].numel()
        layers = num_copies(experts.num_experts * self.expert_bytes, arena_bytes)
        self.w13_layers = torch.stack([w13[i] for i in chosen]).repeat(layers, 1, 1)
        self.w2_layers = torch.stack([w2[i] for i in chosen]).repeat(layers, 1, 1)
        self.pointers = torch.tensor(
            [[[expert.data_ptr() for expert in layer] for layer in both] for both in (self.w13_layers, self.w2_layers)],
            dtype=torch.int64,
        )  # [2, layers, experts]
        dtype = torch.float32 if format == "f32" else torch.bfloat16
        repeats = experts.ffn // half
        gates, ups = self.gates_ups[:, :half].repeat(1, repeats, 1), self.gates_ups[:, half:].repeat(1, repeats, 1)
        self.plain_w13 = torch.cat([gates, ups], 1).to(dtype)[chosen].repeat(layers, 1, 1, 1)
        self.plain_w2 = self.downs.repeat(1, experts.hidden // PANEL, 1).to(dtype)[chosen].repeat(layers, 1, 1, 1)

    @property
    def num_layers(self) -> int:
        return len(self.w13_layers)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Draw:
    """One routing of a batch: the message of it, and for torch the rows sorted by expert."""

    ids_TK: Tensor
    message: Tensor
    sorted_rows: Tensor
    offsets_E: Tensor

    @property
    def num_distinct(self) -> int:
        return len(set(self.ids_TK.flatten().tolist()))


def subjects(arena_bytes: int, experts: Experts = EXPERTS, num_tokens: Sequence[int] = NUM_TOKENS) -> Iterator[Subject]:
    for format in FORMATS:
        weights = _Weights(experts, format, arena_bytes)
        for tokens in num_tokens:
            for routing in ("uniform", "skewed"):
                yield _subject(experts, format, weights, tokens, routing)


def route(experts: Experts, num_tokens: int, routing: str, index: int) -> Tensor:
    """[T, K] int32: experts without replacement, all alike or by Zipf's law.

    One token's uniform draws take turns, so that successive calls meet other experts.
    """
    generator = torch.Generator().manual_seed(1000 * num_tokens + index)
    if routing == "uniform" and num_tokens == 1:
        first = index * experts.top_k % experts.num_experts
        return (torch.arange(first, first + experts.top_k) % experts.num_experts).int()[None]
    ranks = torch.arange(1, experts.num_experts + 1, dtype=torch.float64)
    log_weights = torch.zeros_like(ranks) if routing == "uniform" else -_SKEW * ranks.log()
    noise = torch.rand(num_tokens, experts.num_experts, generator=generator, dtype=torch.float64)
    keys = log_weights - torch.log(-torch.log(noise))  # Gumbel's trick
    return keys.topk(experts.top_k).indices.int()


def _draw(experts: Experts, x_TD: Tensor, payload: torch.dtype, routing: str, index: int) -> _Draw:
    ids_TK = route(experts, len(x_TD), routing, index)
    message, _, _ = ops.dispatch_pack(x_TD, ids_TK, experts.num_experts, 1, payload)
    order = ids_TK.flatten().argsort(stable=True)
    counts = torch.bincount(ids_TK.flatten(), minlength=experts.num_experts)
    return _Draw(
        ids_TK=ids_TK,
        message=message,
        sorted_rows=x_TD.to(payload)[order // experts.top_k],
        offsets_E=counts.cumsum(0).int(),
    )


def _subject(experts: Experts, format: str, weights: _Weights, num_tokens: int, routing: str) -> Subject:
    payload = ops.payload_dtype(format)
    x_TD = torch.randn(num_tokens, experts.hidden, generator=torch.Generator().manual_seed(num_tokens))
    draws = [_draw(experts, x_TD, payload, routing, i) for i in range(_NUM_DRAWS)]
    num_pairs = num_tokens * experts.top_k
    row_bytes = experts.hidden * payload.itemsize
    out = torch.empty(num_pairs * row_bytes, dtype=torch.uint8)
    offsets = torch.tensor([0, out.numel()], dtype=torch.int64)
    rows_per_slot = torch.empty(experts.num_experts, dtype=torch.int64)
    buffers = [Buffer(draw.message.data_ptr(), draw.message.numel()) for draw in draws]
    arguments = [
        _Arguments(
            ctypes.addressof(buffers[i % _NUM_DRAWS]),
            1,
            weights.pointers[0, i % weights.num_layers].data_ptr(),
            weights.pointers[1, i % weights.num_layers].data_ptr(),
            FORMATS.index(format),
            0 if payload == torch.float32 else 1,
            experts.num_experts,
            0,
            experts.hidden,
            experts.ffn,
            offsets.data_ptr(),
            out.data_ptr(),
            rows_per_slot.data_ptr(),
        )
        for i in range(_NUM_DRAWS * weights.num_layers)
    ]
    distinct = sum(draw.num_distinct for draw in draws) / len(draws)
    return Subject(
        kernel="experts",
        op="experts_forward",
        format=format,
        shape=f"{experts.name}, {routing}",
        num_tokens=num_tokens,
        calls=call_rows([words(one) for one in arguments]),
        num_bytes=distinct * weights.expert_bytes + x_TD.numel() * payload.itemsize + out.numel(),
        flops=6.0 * num_pairs * experts.hidden * experts.ffn,
        arithmetic="float32" if format == "f32" else "bfloat16",
        source="memory",
        prepare=lambda: spoil(out, rows_per_slot),
        check=lambda: _check(experts, format, weights, draws[0], x_TD, out.view(payload).view(num_pairs, -1)),
        baseline=_baseline(weights, draws),
        keep=(arguments, buffers, rows_per_slot, offsets, draws, weights),
    )


def _check(experts: Experts, format: str, weights: _Weights, draw: _Draw, x_TD: Tensor, out_PD: Tensor) -> None:
    """Pairs, in (token, k) order, against the twin on one panel of each matrix."""
    panels = out_PD.view(len(out_PD), -1, PANEL)
    assert torch.equal(panels, panels[:, :1].expand_as(panels)), "equal panels of weights gave different results"
    half = PANEL // 2
    for pair in range(0, len(out_PD), max(1, len(out_PD) // _PAIRS_CHECKED)):
        token, k = divmod(pair, experts.top_k)
        base = int(draw.ids_TK[token, k]) % _NUM_BASES
        act = ops_reference.gated_linear(x_TD[token : token + 1], weights.w13[base], format, half)
        act = act.repeat(1, experts.ffn // half)
        expected = ops_reference.linear(act, weights.w2[base], format, PANEL)
        assert_near(panels[pair, 0].float(), expected[0], _TOLERANCE[format])


def _baseline(weights: _Weights, draws: list[_Draw]) -> Baseline:
    """Rows come sorted by expert, which spares torch the grouping."""

    def run(i: int) -> Tensor:
        draw, layer = draws[i % len(draws)], i % weights.num_layers
        w13, w2 = weights.plain_w13[layer].transpose(1, 2), weights.plain_w2[layer].transpose(1, 2)
        gate, up = functional.grouped_mm(draw.sorted_rows, w13, offs=draw.offsets_E).chunk(2, -1)
        return functional.grouped_mm(functional.silu(gate) * up, w2, offs=draw.offsets_E)

    kind = "fp32" if weights.plain_w13.dtype == torch.float32 else "bf16"
    return Baseline(name=f"torch grouped_mm {kind}, rows sorted before", run=run)
