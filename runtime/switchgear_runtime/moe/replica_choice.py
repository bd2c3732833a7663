"""Which replica a token takes: `ReplicaChoice`, the settings' part of it, and `StepBalance`, this step's.

A layer's slots are those of the expert map and, where experts may be lent, one more per logical expert on every rank:
slot s of rank r is then r * stride + s, and expert e lent to it r * stride + S + e. So messages, grouped products and
combine know nothing of lending. The last slots of each rank are those of newer model versions (Variants).

Letters: L MoE layers, E logical experts, R ranks, S slots a rank has of one layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.moe.lent_experts import LentExperts
from switchgear_runtime.moe.native_quotas import NativeQuotas
from switchgear_runtime.moe.quotas import Balance

Int32 = NDArray[np.int32]

# Rows of one expert that take as long as one read of its weights, by their format: a row's FLOPs follow the weights'
# number, so this is a property of machine and format, not of the model. Here: 206 GFLOP/s in bf16 and 17 GB/s a core.
EXPERT_ROWS = {"f32": 11, "bf16": 11, "int8": 6, "int4": 3}
# An exchange of counts and a plan take as long as about so many rows of a small expert; a step whose slowest rank could
# not save them does without.
EXCHANGE_ROWS = 32


@dataclass(slots=True)
class StepBalance:
    """What the layers of the running step do; all ranks the same. 0: static slots, 1: by counts, 2: and lend."""

    mode: int = 0


class ReplicaChoice:
    """Of one run: all ranks have the same."""

    def __init__(self, choice: str, lending: int, *, expert_format: str, num_experts: int, top_k: int) -> None:
        self.balance = Balance(choice=choice, lending=lending, expert_rows=EXPERT_ROWS[expert_format])
        self.num_experts = num_experts
        self.top_k = top_k
        self.step = StepBalance()

    @property
    def lends(self) -> bool:
        """Whether experts may be lent, as far as the settings go."""
        return self.balance.exact and self.balance.lending > 0

    def stride(self, expert_map: ExpertMap, num_variants: int = 0) -> int:
        return expert_map.slots_per_rank + (self.num_experts if self.lends else 0) + num_variants

    def slots_for_lent(self, lent: LentExperts | None) -> LentExperts | None:
        """A layer's, also where this rank has no weights for them; None: nothing is ever lent."""
        return (lent or LentExperts.none(self.num_experts)) if self.lends else None

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
        pays = self.balance.exact and saved > EXCHANGE_ROWS
        self.step.mode = (2 if lends and self.lends else 1) if pays else 0
