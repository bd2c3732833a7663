"""What the user's settings mean for placement: `PlacementSettings`, with the sizes that follow from `survive`.

Letters: L MoE layers, E logical experts, R ranks, F deaths to survive.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from switchgear_runtime.errors import ConfigError
from switchgear_runtime.moe.expert_map import EMPTY, ExpertMap

OFF, STATIC = "off", "static"
PATIENCE_WINDOWS = 3
PATIENCE_S_MIN = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementSettings:
    """`bytes_per_s`: of migration, over all ranks; None: as fast as it goes. `survive`: deaths that leave slots for every
    expert."""

    policy: str = "adaptive"
    window_s: float = 10.0
    bytes_per_s: int | None = None
    survive: int = 1
    replicas_per_layer: int | None = None
    plan_timeout_s: float = 10.0

    @property
    def plans(self) -> bool:
        """By itself, window by window."""
        return self.policy not in (OFF, STATIC)

    @property
    def can_plan(self) -> bool:
        return self.policy != OFF

    @property
    def planning_policy(self) -> str:
        """`static` plans only when an operator says rebalance, and then something must come of it."""
        return "adaptive" if self.policy in (OFF, STATIC) else self.policy

    @property
    def patience_s(self) -> float:
        """How late a decision may be until that is an alarm."""
        return max(PATIENCE_S_MIN, PATIENCE_WINDOWS * self.window_s)

    def pool_slots(self, num_layers: int, num_experts: int, num_ranks: int) -> int:
        """Of a rank, over all layers: any R - F ranks hold every expert, and there is room to stage one more a layer."""
        holders = max(1, num_ranks - self.survive)
        return num_layers * min(num_experts, -(-num_experts // holders) + 1)

    def columns(self, num_layers: int, num_experts: int, num_ranks: int) -> int:
        """Slots of a rank in one layer at most. The pool is the true limit: a hot layer may take more than its share."""
        return min(num_experts, 2 * (self.pool_slots(num_layers, num_experts, num_ranks) // num_layers))

    def check_map(self, expert_map: ExpertMap, num_layers: int, num_experts: int, *, num_ranks: int) -> None:
        """ConfigError unless these ranks of this model can take it."""
        actual = (expert_map.num_ranks, expert_map.num_layers, expert_map.num_experts)
        if actual != (num_ranks, num_layers, num_experts):
            raise ConfigError(
                f"expert map is for (ranks, layers, experts) = {actual}; this cluster has "
                f"{(num_ranks, num_layers, num_experts)}"
            )
        pool_slots = self.pool_slots(num_layers, num_experts, num_ranks)
        held_RS = expert_map.physical_to_logical_LP.reshape(num_layers, num_ranks, -1).transpose(1, 0, 2) != EMPTY
        used_R = np.count_nonzero(held_RS, axis=(1, 2))
        if used_R.max() > pool_slots:
            raise ConfigError(
                f"expert map: rank {int(used_R.argmax())} would hold {int(used_R.max())} experts; with "
                f"survive={self.survive} its pool has {pool_slots} slots: place fewer there, or raise survive"
            )
