"""The ExpertGroup of a rank that is alone: `LocalGroup`, where rows go nowhere and the host learns nothing.

Rows are rounded and grouped as they are when they come from afar, so the bits are those of any number of ranks.

Letters: T tokens, D hidden, K top-k, N pairs, M rows.
"""

from __future__ import annotations

from torch import Tensor

from switchgear_runtime.cuda.expert_group import Received
from switchgear_runtime.cuda.kernels import Grouping, Kernels
from switchgear_runtime.cuda.row_payload import RowPayload


class LocalGroup:
    """Only enqueues, so that a step of it can be captured."""

    def __init__(self, kernels: Kernels, payload: RowPayload) -> None:
        self._kernels = kernels
        self._payload = payload

    def create_handle(self, slot_ids_TK: Tensor, slots_per_rank: int) -> Grouping:
        return self._kernels.group_local(slot_ids_TK, None, slots_per_rank)

    def dispatch(self, h_TD: Tensor, handle: Grouping, *, timeout_s: float) -> Received:  # noqa: ARG002
        return Received(x_MX=self._payload.written(h_TD), groups=handle)

    def combine(
        self,
        y_ND: Tensor,
        weights_TK: Tensor,
        handle: Grouping,  # noqa: ARG002
        *,
        timeout_s: float,  # noqa: ARG002
    ) -> Tensor:
        """A pair's place is its number. What pads a step has no pairs; its rows are garbage, and nobody's."""
        return self._kernels.combine(y_ND, None, weights_TK)

    def close(self) -> None:
        """It holds nothing."""
