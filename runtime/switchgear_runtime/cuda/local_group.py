"""The ExpertGroup of a rank that is alone: `LocalGroup`, where rows go nowhere and the host learns nothing.

Rows are rounded and grouped as they are when they come from afar, so the bits are those of any number of ranks.

Letters: T tokens, K top-k, N pairs.
"""

from __future__ import annotations

from torch import Tensor

from switchgear_runtime.cuda.expert_group import Received
from switchgear_runtime.cuda.kernels import DispatchPlan, Kernels


class LocalGroup:
    """Only enqueues, so that a step of it can be captured."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def create_handle(self, slot_ids_TK: Tensor, slots_per_rank: int) -> tuple[DispatchPlan, int]:
        return self._kernels.plan_dispatch(slot_ids_TK, 1, slots_per_rank), slots_per_rank

    def dispatch(self, h_TD: Tensor, handle: tuple[DispatchPlan, int], *, timeout_s: float) -> Received:  # noqa: ARG002
        plan, num_slots = handle
        kernels = self._kernels
        return Received(
            x_MD=kernels.gather_rows(h_TD, plan.row_tokens_M, num_now=plan.rows_begin_R1[1:]),
            groups=kernels.group(plan.pairs_N2, plan.rows_begin_R1, plan.pairs_begin_R1, 0, num_slots),
        )

    def combine(
        self,
        y_ND: Tensor,
        weights_TK: Tensor,
        handle: tuple[DispatchPlan, int],
        *,
        timeout_s: float,  # noqa: ARG002
    ) -> Tensor:
        return self._kernels.combine(y_ND, handle[0].pair_index_TK, weights_TK)

    def close(self) -> None:
        """It holds nothing."""
