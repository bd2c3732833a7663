"""The kernels that only move rows, in `bench gpu`: how near to the copy bandwidth that torch reaches on the same device?

Dispatch is everything between the router and the wire (slots, plan, rounded rows), combine what follows it; then the same in
fp8. Each is compared with torch before it is timed, and takes turns with it. Bytes are the fewest that can move: a token's
row is read once, however many ranks it goes to.

Letters: T tokens, D hidden, K top-k, E experts, R ranks, N pairs, M rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from switchgear_bench.gpu_clock import Bounds, Clock
from switchgear_bench.gpu_layer import DEEPSEEK, TINY, UNIFORM, Routing, Shape
from switchgear_bench.gpu_subject import Subject, measure
from switchgear_runtime.cuda.kernels import Kernels
from switchgear_runtime.cuda.library import FP8

NUM_RANKS = 8
_SCALED = 128  # values of a scale


def moving_rows(kernels: Kernels, bounds: Bounds, clock: Clock, *, is_small: bool) -> Iterator[dict[str, Any]]:
    """A row for each kernel at each number of tokens; the largest first."""
    shape = TINY if is_small else DEEPSEEK
    for num_tokens in (32,) if is_small else (4096, 128):
        routing = Routing.draw(shape, num_tokens, UNIFORM, num_tokens, kernels.device)
        for make in (dispatch, combine, pack_fp8, unpack_fp8):
            subject = make(kernels, shape, routing)
            head = {"kernel": subject.kernel, "shape": shape.name, "variant": "", "num_tokens": num_tokens}
            yield {**head, **measure(subject, bounds, clock)}


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """Where a batch's rows go, of as many ranks, and the same by torch."""

    num_ranks: int
    per_rank: int
    slot_of_E: Tensor
    num_rows: int
    tokens_M: Tensor

    @classmethod
    def of(cls, kernels: Kernels, shape: Shape, routing: Routing) -> _Plan:
        num_ranks = min(NUM_RANKS, shape.num_experts)
        per_rank = shape.num_experts // num_ranks
        slot_of_E = torch.randperm(shape.num_experts, dtype=torch.int32).to(kernels.device)
        plan = kernels.plan_dispatch(routing.ids_TK, num_ranks, per_rank, slot_of_E)
        num_rows = int(plan.rows_begin_R1[-1])
        return cls(num_ranks, per_rank, slot_of_E, num_rows, plan.row_tokens_M[:num_rows].long())

    def tokens_by_torch(self, ids_TK: Tensor) -> Tensor:
        ranks_TK = self.slot_of_E[ids_TK.long()].long() // self.per_rank
        goes_TR = torch.zeros(ids_TK.shape[0], self.num_ranks, dtype=torch.bool, device=ids_TK.device)
        return goes_TR.scatter_(1, ranks_TK, True).T.nonzero()[:, 1]


def dispatch(kernels: Kernels, shape: Shape, routing: Routing) -> Subject:
    plan = _Plan.of(kernels, shape, routing)

    def ours() -> Tensor:
        fresh = kernels.plan_dispatch(routing.ids_TK, plan.num_ranks, plan.per_rank, plan.slot_of_E)
        return kernels.spread_rows(routing.h_TD, fresh, plan.num_rows)

    def baseline() -> Tensor:
        return routing.h_TD.index_select(0, plan.tokens_by_torch(routing.ids_TK)).bfloat16()

    def check() -> None:
        assert plan.num_rows > routing.h_TD.shape[0], "no token goes to two ranks"
        assert torch.equal(ours(), baseline())

    return Subject(
        kernel="dispatch",
        num_bytes=(4 * routing.h_TD.shape[0] + 2 * plan.num_rows) * shape.hidden,
        ours=ours,
        baseline=baseline,
        baseline_name="torch index_select",
        check=check,
        baseline_captures=False,  # how many rows there are is known only after nonzero
    )


def combine(kernels: Kernels, shape: Shape, routing: Routing) -> Subject:
    device, num_pairs = kernels.device, routing.ids_TK.numel()
    rows_ND = torch.randn(num_pairs, shape.hidden, device=device).bfloat16()
    index_TK = torch.randperm(num_pairs, device=device).int().view(routing.ids_TK.shape)
    index_N = index_TK.long().view(-1)

    def ours() -> Tensor:
        return kernels.combine(rows_ND, index_TK, routing.weights_TK)

    def baseline() -> Tensor:
        gathered_TKD = rows_ND.index_select(0, index_N).view(*index_TK.shape, -1)
        return (gathered_TKD * routing.weights_TK[..., None]).sum(1)

    def check() -> None:
        torch.testing.assert_close(ours(), baseline(), rtol=1e-4, atol=1e-4)

    return Subject(
        kernel="combine",
        num_bytes=(2 * num_pairs + 4 * index_TK.shape[0]) * shape.hidden,
        ours=ours,
        baseline=baseline,
        baseline_name="torch index_select, mul, sum",
        check=check,
    )


def pack_fp8(kernels: Kernels, shape: Shape, routing: Routing) -> Subject:
    """To all ranks that want the token, as dispatch, quantised on the way."""
    plan = _Plan.of(kernels, shape, routing)
    fresh = kernels.plan_dispatch(routing.ids_TK, plan.num_ranks, plan.per_rank, plan.slot_of_E)

    def ours() -> Tensor:
        return kernels.spread_rows(routing.h_TD, fresh, plan.num_rows, kind=FP8)

    def baseline() -> tuple[Tensor, Tensor]:
        codes_TD, scales_TX = quantized(routing.h_TD)
        return codes_TD.index_select(0, plan.tokens_M), scales_TX.index_select(0, plan.tokens_M)

    def check() -> None:
        found, (codes, scales) = ours(), baseline()
        at = -(-shape.hidden // 16) * 16
        assert torch.equal(found[:, : shape.hidden], codes)
        assert torch.equal(found[:, at : at + 4 * scales.shape[1]].contiguous().view(torch.float32), scales)

    row_bytes = shape.hidden + 4 * -(-shape.hidden // _SCALED)
    return Subject(
        kernel="pack fp8",
        num_bytes=4 * routing.h_TD.numel() + plan.num_rows * row_bytes,
        ours=ours,
        baseline=baseline,
        baseline_name="torch amax, div, index_select",
        check=check,
    )


def unpack_fp8(kernels: Kernels, shape: Shape, routing: Routing) -> Subject:
    """Of as many rows as there are pairs."""
    plan = _Plan.of(kernels, shape, routing)
    fresh = kernels.plan_dispatch(routing.ids_TK, plan.num_ranks, plan.per_rank, plan.slot_of_E)
    packed = kernels.spread_rows(routing.h_TD, fresh, plan.num_rows, kind=FP8)
    codes_TD, scales_TX = quantized(routing.h_TD)
    codes_MD, scales_MX = codes_TD[plan.tokens_M].view(torch.float8_e4m3fn), scales_TX[plan.tokens_M]

    def ours() -> Tensor:
        return kernels.unpack_rows(packed, shape.hidden, kind=FP8)

    def baseline() -> Tensor:
        wide = codes_MD.float().view(plan.num_rows, -1, min(_SCALED, shape.hidden)) * scales_MX[..., None]
        return wide.view(plan.num_rows, -1).bfloat16()

    def check() -> None:
        assert torch.equal(ours(), baseline())

    row_bytes = 3 * shape.hidden + 4 * -(-shape.hidden // _SCALED)
    return Subject(
        kernel="unpack fp8",
        num_bytes=plan.num_rows * row_bytes,
        ours=ours,
        baseline=baseline,
        baseline_name="torch float, mul",
        check=check,
    )


def quantized(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) by torch, of rows of whole scales (or of one that is shorter)."""
    parts = x_TD.view(x_TD.shape[0], -1, min(_SCALED, x_TD.shape[1]))
    scales_TX = parts.abs().amax(-1) / 448.0
    codes = (parts / scales_TX[..., None]).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8).view(x_TD.shape), scales_TX
