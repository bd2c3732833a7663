"""Rows straight from rank to rank: `FlatDispatch`, an ExpertGroup of one exchange each way.

A token's row crosses once per destination rank, beside (row, slot) pairs; back come the K rows of a token one by one.
The host learns how much goes where by one small copy per layer.

Letters: T tokens, D hidden, K top-k, N pairs, M rows, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from switchgear_runtime.comm.device_exchange import DeviceExchange, Parts
from switchgear_runtime.cuda.expert_group import Received
from switchgear_runtime.cuda.kernels import DispatchPlan, Kernels
from switchgear_runtime.cuda.row_parts import PAIR_BYTES, Senders, as_bytes, group_pairs, result_bytes, returned_parts
from switchgear_runtime.cuda.row_payload import RowPayload


@dataclass(slots=True, eq=False)
class FlatHandle:
    """A layer's plan; dispatch adds what it sent, and where results go."""

    plan: DispatchPlan
    slots_per_rank: int
    pairs_begin_R1: list[int] = field(default_factory=list)  # sent
    back: list[int] = field(default_factory=list)  # offsets of what returns to each rank


class FlatDispatch:
    """Over any DeviceExchange."""

    def __init__(
        self, kernels: Kernels, exchange: DeviceExchange, payload: RowPayload, *, rank: int, num_ranks: int
    ) -> None:
        self._kernels = kernels
        self._payload = payload
        self._exchange = exchange
        self._rank = rank
        self._num_ranks = num_ranks
        self._senders = Senders(rank, range(num_ranks))

    def create_handle(self, slot_ids_TK: Tensor, slots_per_rank: int) -> FlatHandle:
        return FlatHandle(self._kernels.plan_dispatch(slot_ids_TK, self._num_ranks, slots_per_rank), slots_per_rank)

    def dispatch(self, h_TD: Tensor, handle: FlatHandle, *, timeout_s: float) -> Received:
        plan = handle.plan
        rows_begin, handle.pairs_begin_R1 = torch.stack([plan.rows_begin_R1, plan.pairs_begin_R1]).tolist()
        payload = self._payload
        send = (
            Parts(
                as_bytes(payload.spread(h_TD, plan, rows_begin[-1])),
                [payload.row_bytes * begin for begin in rows_begin],
            ),
            Parts(as_bytes(plan.pairs_N2), [PAIR_BYTES * begin for begin in handle.pairs_begin_R1]),
        )
        rows, pairs = self._exchange.exchange(send, timeout_s=timeout_s)
        slots = handle.slots_per_rank
        groups = group_pairs(
            self._kernels,
            rows,
            pairs,
            self._senders,
            length=payload.row_bytes,
            first_slot=self._rank * slots,
            num_slots=slots,
        )
        handle.back = [result_bytes(h_TD) * (begin // PAIR_BYTES) for begin in pairs.offsets]
        return Received(x_MX=payload.rows_of(rows.data), groups=groups)

    def combine(self, y_ND: Tensor, weights_TK: Tensor, handle: FlatHandle, *, timeout_s: float) -> Tensor:
        (back,) = self._exchange.exchange([Parts(as_bytes(y_ND), handle.back)], timeout_s=timeout_s)
        rows_ND = returned_parts(back, handle.pairs_begin_R1, y_ND.shape[1], self._senders)
        return self._kernels.combine(rows_ND, handle.plan.pair_index_TK, weights_TK)

    def close(self) -> None:
        """It holds nothing: the exchange is the transport's."""
