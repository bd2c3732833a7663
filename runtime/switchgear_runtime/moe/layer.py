"""A mixture-of-experts layer over all ranks: `MoELayer.forward` is its five verbs.

Every rank calls it in every step, with no tokens if it has none: the others' dispatch waits for this one's message.

Letters: T tokens, D hidden, K top-k, E logical experts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from switchgear_runtime.moe.dispatcher import Dispatcher
from switchgear_runtime.moe.experts import ExpertSlots
from switchgear_runtime.moe.lent_experts import LentExperts
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
        self.experts: ExpertSlots | None = None
        self.slot_table_E: Tensor | None = None
        self.forced_ids_TK: Tensor | None = None  # of this step's tokens, in place of the router's (forced_routing.py)
        self.quotas: NativeQuotas | None = None
        self.lent: LentExperts | None = None
        self.step = StepBalance()  # the runner's, shared by all layers
        self._dispatcher: Dispatcher | None = None

    def place(self, experts: ExpertSlots, slot_table_E: Tensor, quotas: NativeQuotas | None = None) -> None:
        """The epoch's experts of this rank, and for each logical expert the slot this rank's tokens go to (int32)
        where no quotas split them."""
        self.experts = experts
        self.slot_table_E = slot_table_E
        self.quotas = quotas

    def lend(self, lent: LentExperts) -> None:
        """Any expert's weights, where this rank may compute with those of others."""
        self.lent = lent

    @property
    def all_slots(self) -> ExpertSlots:
        """Those of the map and those for lent experts."""
        assert self.experts is not None
        return self.experts if self.lent is None else self.lent.beside(self.experts)

    def connect(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def remap(self, topk_ids_TK: Tensor) -> Tensor:
        """Logical experts -> one physical replica each: static, or by the counts of this batch on all ranks."""
        assert self.slot_table_E is not None
        quotas, lends = self.quotas, self.step.mode == 2
        if quotas is not None and (quotas.is_hash or (self.step.mode and quotas.can_plan(lends=lends))):
            assert self._dispatcher is not None
            topk_ids = topk_ids_TK.numpy()
            if not quotas.is_hash:
                counts_E = np.bincount(topk_ids.reshape(-1), minlength=quotas.num_experts).astype(np.int32)
                counts_RE = self._dispatcher.all_gather_counts(counts_E)
                quotas.plan(counts_RE, self._dispatcher.transport.rank, lends=lends)
            return torch.from_numpy(quotas.choose(topk_ids))
        return torch.index_select(self.slot_table_E, 0, topk_ids_TK.reshape(-1)).view(topk_ids_TK.shape)

    def forward(self, x_TD: Tensor) -> Tensor:
        assert self._dispatcher is not None
        topk_weights_TK, topk_ids_TK = self.router(x_TD)
        if self.forced_ids_TK is not None:
            topk_ids_TK = self.forced_ids_TK
        slot_ids_TK = self.remap(topk_ids_TK)
        recv, handle = self._dispatcher.dispatch(x_TD, slot_ids_TK)
        slots = self.all_slots
        rows = slots(recv)
        y_TD = self._dispatcher.combine(rows, topk_weights_TK, handle)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)  # last, so that the order of the sum is one
        self.load.record_routed(self.index, topk_ids_TK.numpy())
        self.load.record_rows(self.index, slots.experts, rows.rows_per_slot_S.numpy())
        return y_TD
