"""Rows by a library of others that keeps our bits: `PairDispatch`, an ExpertGroup over a `PairLibrary`.

Such libraries sum a token's results themselves: some of them where the experts are, so that placement gets into the sum,
all of them rounded to bf16. So each pair of a token and an expert is given to them as a token of its own, with that one
expert. Then nothing is summed, a result comes back as it was made, and the K of a token are summed here, in router order.
The price: a row crosses once for each of its experts, not once per rank.

Letters: T tokens, D hidden, K top-k, N pairs, M rows, S slots of this rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from switchgear_runtime.comm.device_rounds import until_all_done, watch_event
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.cuda.expert_group import Received
from switchgear_runtime.cuda.kernels import Grouping, Kernels

NO_SLOT = -1  # a pair that goes nowhere


@dataclass(frozen=True, slots=True, eq=False)
class Arrived:
    """What came for this rank's slots."""

    x_MD: Tensor  # bf16
    counts_S: list[int]
    rows_N: Tensor  # int32: by slot, where in x_MD each row is


class PairLibrary(Protocol):
    """One rank's end of a library. `send` and `give_back` only enqueue, on the current stream."""

    def send(self, x_ND: Tensor, slot_ids_N: Tensor, slots_per_rank: int) -> Any:
        """Row n, bf16, to the rank of its slot (int64, of all ranks, or NO_SLOT); at least one row."""
        ...

    def arrived(self, sent: Any) -> Arrived:
        """Once the device is through with it."""
        ...

    def give_back(self, y_ND: Tensor, sent: Any) -> Tensor:
        """[N, D] bf16, of the rows that this rank sent; `y_ND`: a result for each of Arrived.rows_N."""
        ...

    def close(self) -> None: ...


@dataclass(slots=True, eq=False)
class PairHandle:
    """A layer's slots; dispatch adds what the library needs for the way back."""

    slot_ids_TK: Tensor
    slots_per_rank: int
    sent: Any = None


class PairDispatch:
    """`mark()` tells whether what was enqueued before has finished. After each way the ranks wait for all devices, with a
    deadline: a library's own wait names nobody."""

    def __init__(
        self, kernels: Kernels, control: Transport, library: PairLibrary, mark: Callable[[], Callable[[], bool]]
    ) -> None:
        self._kernels = kernels
        self._control = control
        self._library = library
        self._mark = mark

    def create_handle(self, slot_ids_TK: Tensor, slots_per_rank: int) -> PairHandle:
        return PairHandle(slot_ids_TK, slots_per_rank)

    def dispatch(self, h_TD: Tensor, handle: PairHandle, *, timeout_s: float) -> Received:
        kernels, slot_ids_N = self._kernels, handle.slot_ids_TK.reshape(-1).to(torch.int64)
        top_k = handle.slot_ids_TK.shape[1]
        tokens_N = torch.arange(len(slot_ids_N), dtype=torch.int32, device=kernels.device) // top_k
        x_ND = kernels.gather_rows(h_TD, tokens_N)
        if not len(slot_ids_N):  # a rank takes part with a row for nobody
            x_ND = torch.zeros(1, h_TD.shape[1], dtype=torch.bfloat16, device=kernels.device)
            slot_ids_N = torch.full((1,), NO_SLOT, dtype=torch.int64, device=kernels.device)
        handle.sent = self._library.send(x_ND, slot_ids_N, handle.slots_per_rank)
        self._await("dispatch", timeout_s)
        arrived = self._library.arrived(handle.sent)
        begins = list(accumulate(arrived.counts_S, initial=0))
        groups = Grouping(
            begin_S1=torch.tensor(begins, dtype=torch.int32, device=kernels.device),
            x_rows_N=arrived.rows_N,
            y_rows_N=torch.arange(begins[-1], dtype=torch.int32, device=kernels.device),
        )
        return Received(x_MX=arrived.x_MD, groups=groups)

    def combine(self, y_ND: Tensor, weights_TK: Tensor, handle: PairHandle, *, timeout_s: float) -> Tensor:
        rows_ND = self._library.give_back(y_ND, handle.sent)
        self._await("combine", timeout_s)
        slot_ids_TK = handle.slot_ids_TK
        index_N = torch.arange(slot_ids_TK.numel(), dtype=torch.int32, device=self._kernels.device)
        pair_index_TK = torch.where(slot_ids_TK < 0, NO_SLOT, index_N.view(slot_ids_TK.shape)).to(torch.int32)
        return self._kernels.combine(rows_ND, pair_index_TK, weights_TK)

    def close(self) -> None:
        self._library.close()

    def _await(self, what: str, timeout_s: float) -> None:
        watch = watch_event(self._mark())
        until_all_done(self._control, what, watch, deadline_s=time.monotonic() + timeout_s, timeout_s=timeout_s)
