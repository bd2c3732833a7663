"""Which replica a token takes: `ReplicaChoice`, the settings' part of it, and `StepBalance`, this step's.

A layer's slots are those of the expert map and, where experts may be lent, one more per logical expert on every rank:
slot s of rank r is then r * stride + s, and expert e lent to it r * stride + S + e. So messages, grouped products and
combine know nothing of lending. The last slots of each rank are those of newer model versions (Variants).

Letters: L MoE layers, E logical experts, R ranks, S slots a rank has of one layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from switchgear_runtime.config import LIBRARY_DISPATCHES, EngineConfig
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.moe.lent_experts import LentExperts
from switchgear_runtime.moe.native_quotas import NativeQuotas
from switchgear_runtime.moe.quotas import Balance

Int32 = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPrices:
    """What a step's balance charges, in rows of one expert.

    `expert_rows`: one read of an expert's weights, where they are this rank's own: a row's FLOPs follow the weights'
    number, so this is a property of machine and format, not of the model. `lent_expert_rows`: one read where another rank
    has them. `exchange_rows`: an exchange of counts and a plan; a step whose slowest rank could not save them does
    without.
    """

    expert_rows: int
    lent_expert_rows: int
    exchange_rows: int


# By the weights' format: 206 GFLOP/s in bf16 and 17 GB/s a core, whichever rank's the pages are.
HOST_PRICES = {
    format: StepPrices(expert_rows=rows, lent_expert_rows=rows, exchange_rows=32)
    for format, rows in {"f32": 11, "bf16": 11, "int8": 6, "int4": 3, "fp8": 6}.items()
}


@dataclass(slots=True)
class StepBalance:
    """What the layers of the running step do; all ranks the same. 0: static slots, 1: by counts, 2: and lend."""

    mode: int = 0


class ReplicaChoice:
    """Of one run: all ranks have the same."""

    def __init__(self, choice: str, lending: int, *, prices: StepPrices, num_experts: int, top_k: int) -> None:
        self.balance = Balance(
            choice=choice,
            lending=lending,
            expert_rows=prices.expert_rows,
            lent_expert_rows=prices.lent_expert_rows,
        )
        self._exchange_rows = prices.exchange_rows
        self.num_experts = num_experts
        self.top_k = top_k
        self.step = StepBalance()

    @classmethod
    def of(cls, config: EngineConfig, prices: StepPrices, *, num_experts: int, top_k: int) -> ReplicaChoice:
        """`prices`: of the machine, where the settings name no others."""
        if config.lent_expert_rows is not None:
            prices = replace(prices, lent_expert_rows=config.lent_expert_rows)
        # A library that dispatches has room for every slot, and an expert that may be lent is one more.
        lending = 0 if config.dispatch in LIBRARY_DISPATCHES else config.lending
        return cls(config.replica_choice, lending, prices=prices, num_experts=num_experts, top_k=top_k)

    @property
    def lends(self) -> bool:
        """Whether experts may be lent, as far as the settings go."""
        return self.balance.exact and self.balance.lending > 0

    def stride(self, expert_map: ExpertMap, num_variants: int = 0) -> int:
        return expert_map.slots_per_rank + (self.num_experts if self._lends_among(expert_map) else 0) + num_variants

    def slots_for_lent(self, expert_map: ExpertMap, lent: LentExperts | None) -> LentExperts | None:
        """A layer's, also where this rank has no weights for them; None: nothing is ever lent."""
        return (lent or LentExperts.none(self.num_experts)) if self._lends_among(expert_map) else None

    def _lends_among(self, expert_map: ExpertMap) -> bool:
        return self.lends and expert_map.num_ranks > 1

    def strided(self, expert_map: ExpertMap, slots: Int32, num_variants: int = 0) -> Int32:
        """The map's slots as slots that are `stride` a rank."""
        ranks, slots = np.divmod(slots, expert_map.slots_per_rank)
        return np.ascontiguousarray(ranks * self.stride(expert_map, num_variants) + slots, np.int32)

    def quotas(self, expert_map: ExpertMap, layer: int, num_variants: int = 0) -> NativeQuotas | None:
        """None: every token takes its static slot."""
        if self.balance.choice == "static" or expert_map.num_ranks == 1:
            return None
        held_RS = expert_map.physical_to_logical_LP[layer].reshape(expert_map.num_ranks, -1)
        return NativeQuotas(held_RS, self.num_experts, self.balance, num_variants=num_variants)

    def begin_step(self, num_tokens: int, num_ranks: int, *, lends: bool) -> None:
        """`num_tokens`: of all ranks. `lends`: whether every rank can."""
        rows = num_tokens * self.top_k
        saved = rows * (1 + self.balance.expert_rows) * (num_ranks - 1) // num_ranks
        pays = self.balance.exact and saved > self._exchange_rows
        self.step.mode = (2 if lends and self.lends else 1) if pays else 0
