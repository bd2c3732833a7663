"""Moves tokens to the ranks of their experts and the experts' rows back: `Dispatcher`, over a `Transport` and two ops.

It knows tokens and slots and no sockets; the transport knows bytes and no tokens. A token's row crosses at most once
per destination rank, whatever the number of its experts there. The K rows of a token come back one by one, and
`combine` sums them at the source in router order, so that placement and ranks cannot change a bit.

Letters: T tokens, D hidden, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from switchgear_runtime import ops
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.moe.experts import ExpertRows


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DispatchHandle:
    """Everything the way back needs."""

    pair_index_TK: Tensor  # which of the returned rows, over all ranks in order, is token t's k-th
    hidden: int


class Dispatcher:
    """One rank's two all-to-alls per MoE layer. `payload`: the dtype of all rows, also of those that stay here."""

    def __init__(self, transport: Transport, *, slots_per_rank: int, payload: torch.dtype, timeout_s: float) -> None:
        self.transport = transport
        self.slots_per_rank = slots_per_rank
        self.payload = payload
        self.timeout_s = timeout_s

    def dispatch(self, x_TD: Tensor, slot_ids_TK: Tensor) -> tuple[list[Tensor], DispatchHandle]:
        """What each rank sent here (uint8, valid through this layer's combine), and the handle for the way back."""
        data, offsets, pair_index_TK = ops.dispatch_pack(
            x_TD, slot_ids_TK, self.slots_per_rank, self.transport.world_size, self.payload
        )
        recv = self._exchange(data, offsets.tolist())
        return recv, DispatchHandle(pair_index_TK=pair_index_TK, hidden=x_TD.shape[1])

    def combine(self, rows: ExpertRows, topk_weights_TK: Tensor, handle: DispatchHandle) -> Tensor:
        """y_TD: each token's K rows, weighted, summed in fp32 in the order k = 0..K-1."""
        returned = self._exchange(rows.data, rows.offsets)
        return ops.combine(returned, handle.pair_index_TK, topk_weights_TK, handle.hidden, self.payload)

    def all_gather_counts(self, counts_E: NDArray[np.int32]) -> NDArray[np.int64]:
        """counts_RE: how many tokens of each rank want each expert."""
        received = self.transport.all_to_all_v(
            [counts_E.data.cast("B")] * self.transport.world_size, timeout_s=self.timeout_s
        )
        for rank, view in enumerate(received):
            if view.nbytes != counts_E.nbytes:
                raise ValueError(f"counts of rank {rank} have {view.nbytes} bytes, expected {counts_E.nbytes}")
        return np.stack([np.frombuffer(view, np.int32) for view in received]).astype(np.int64)

    def _exchange(self, data: Tensor, offsets: list[int]) -> list[Tensor]:
        view = data.numpy().data
        send = [view[begin:end] for begin, end in pairwise(offsets)]
        return [_as_tensor(received) for received in self.transport.all_to_all_v(send, timeout_s=self.timeout_s)]


class _Writable:
    """A read-only view's memory, told to NumPy as writable: torch has no read-only tensors, and warns."""

    __slots__ = ("__array_interface__", "view")

    def __init__(self, view: memoryview) -> None:
        self.view = view  # keeps the memory alive as long as an array or tensor looks at it
        address = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
        self.__array_interface__ = {"data": (address, False), "shape": (view.nbytes,), "typestr": "|u1", "version": 3}


def _as_tensor(view: memoryview) -> Tensor:
    """The bytes of a received message as uint8, not copied. The ops only read them."""
    if view.nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.from_numpy(np.asarray(_Writable(view)))
