"""A mixture-of-experts layer over all ranks: `MoELayer.forward` is its five verbs.

Every rank calls it in every step, with no tokens if it has none: the others' dispatch waits for this one's message.

Letters: T tokens, D hidden, K top-k, E logical experts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from switchgear_runtime.moe.dispatcher import Dispatcher
from switchgear_runtime.moe.experts import ExpertSlots
from switchgear_runtime.moe.layer_placement import LayerPlacement
from switchgear_runtime.moe.load import ExpertLoad
from switchgear_runtime.moe.native_quotas import NativeQuotas
from switchgear_runtime.moe.replica_choice import StepBalance
from switchgear_runtime.moe.router import TopKRouter


class MoELayer:
    """Layer `index` among MoE layers. `place` and `connect` come before the first forward, later between steps.

    `shared`: the expert that every token takes, which is no expert to the map: each rank has it for its own tokens.
    """

    def __init__(
        self,
        index: int,
        router: TopKRouter,
        load: ExpertLoad,
        shared: Callable[[Tensor], Tensor] | None = None,
        *,
        expert_format: str = "bf16",
    ) -> None:
        self.index = index
        self.router = router
        self.expert_format = expert_format  # of the experts' packed weights
        self.load = load
        self.shared = shared
        self.placement: LayerPlacement | None = None
        self.forced_ids_TK: Tensor | None = None  # of this step's tokens, in place of the router's (forced_routing.py)
        self.versions_T: NDArray[np.int32] | None = (
            None  # of this step's tokens (Variants.slots_NE); None: all the oldest
        )
        self.step = StepBalance()  # the runner's, shared by all layers
        self._dispatcher: Dispatcher | None = None

    def place(self, placement: LayerPlacement) -> None:
        """The epoch's experts of this rank, and where its tokens go."""
        self.placement = placement

    @property
    def experts(self) -> ExpertSlots | None:
        """Those of the map."""
        return None if self.placement is None else self.placement.experts

    @property
    def slots_per_rank(self) -> int:
        """As slot ids count them."""
        assert self._dispatcher is not None
        return self._dispatcher.slots_per_rank

    def connect(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def remap(self, topk_ids_TK: Tensor) -> Tensor:
        """Logical experts -> one physical replica each, and there the weights of the token's model version."""
        assert self.placement is not None
        slot_ids_TK = self._replicas(self.placement, topk_ids_TK)
        variants = self.placement.variants
        if variants is None or self.versions_T is None:
            return slot_ids_TK
        assert self._dispatcher is not None
        slots_per_rank = self._dispatcher.slots_per_rank
        slots = variants.choose(slot_ids_TK.numpy(), topk_ids_TK.numpy(), self.versions_T, slots_per_rank)
        return torch.from_numpy(slots)

    def splits(self, quotas: NativeQuotas) -> bool:
        """Whether this step's tokens may take other slots than the static ones."""
        return quotas.is_hash or (self.step.mode > 0 and quotas.can_plan(lends=self.step.mode == 2))

    def plan_quotas(self, counts_E: NDArray[np.int32]) -> NativeQuotas:
        """This layer's quotas, planned for this rank's tokens by what all ranks count: an exchange."""
        assert self._dispatcher is not None
        assert self.placement is not None
        quotas = self.placement.quotas
        assert quotas is not None
        counts_RE = self._dispatcher.all_gather_counts(counts_E)
        quotas.plan(counts_RE, self._dispatcher.transport.rank, lends=self.step.mode == 2)
        return quotas

    def _replicas(self, placement: LayerPlacement, topk_ids_TK: Tensor) -> Tensor:
        """Static, or by the counts of this batch on all ranks."""
        quotas = placement.quotas
        if quotas is not None and self.splits(quotas):
            topk_ids = topk_ids_TK.numpy()
            if not quotas.is_hash:
                self.plan_quotas(np.bincount(topk_ids.reshape(-1), minlength=quotas.num_experts).astype(np.int32))
            return torch.from_numpy(quotas.choose(topk_ids))
        return torch.index_select(placement.slot_table_E, 0, topk_ids_TK.reshape(-1)).view(topk_ids_TK.shape)

    def forward(self, x_TD: Tensor) -> Tensor:
        assert self._dispatcher is not None
        assert self.placement is not None
        topk_weights_TK, topk_ids_TK = self.router(x_TD)
        if self.forced_ids_TK is not None:
            topk_ids_TK = self.forced_ids_TK
        slot_ids_TK = self.remap(topk_ids_TK)
        recv, handle = self._dispatcher.dispatch(x_TD, slot_ids_TK)
        slots = self.placement.all_slots
        rows = slots(recv)
        y_TD = self._dispatcher.combine(rows, topk_weights_TK, handle)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)  # last, so that the order of the sum is one
        self.load.record_routed(self.index, topk_ids_TK.numpy())
        self.load.record_rows(self.index, slots.experts, rows.rows_per_slot_S.numpy())
        return y_TD
