"""One proposed map on its way to all ranks: `Migration`, from StageMap to the flip, or to its end without one.

    staging --every rank says MapStaged--> staged --a step on the new epoch--> flipped
       | a refusal, a deadline, the end of the generation: DropMap, and the old epoch stays in force

A dropped map may still flip: when every rank had staged it before the first heard DropMap. So its epoch is never given
to another map, and whoever sees a step on it knows which map that is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from switchgear.placement.plan import Move, PlacementPlan
from switchgear_runtime.messages import StageMap
from switchgear_runtime.moe.expert_map import ExpertMap


@dataclass(slots=True, eq=False)
class Migration:
    """`ticket`: of the operator who ordered it, if one did."""

    expert_map: ExpertMap
    rest: tuple[ExpertMap, ...]  # of the route, to follow
    plan: PlacementPlan | None
    moves: tuple[Move, ...]
    num_bytes: int
    begun_s: float
    deadline_s: float
    ticket: int | None = None
    staged: dict[int, float] = field(default_factory=dict)  # by rank: seconds it took
    moved_bytes: int = 0  # as the ranks say

    @property
    def epoch(self) -> int:
        return self.expert_map.epoch

    def orders(self, generation: int, bytes_per_s: int | None) -> list[tuple[int, StageMap]]:
        """(rank, message). The cluster's bytes per second are shared so that all ranks finish at about the same time."""
        num_ranks, total = self.expert_map.num_ranks, max(1, len(self.moves))
        owners = [move.slot // self.expert_map.slots_per_rank for move in self.moves]
        arrivals_R = np.bincount(owners, minlength=num_ranks).tolist()
        body = self.expert_map.to_json()
        shares = [
            None if bytes_per_s is None else max(1, round(bytes_per_s * arrivals / total)) for arrivals in arrivals_R
        ]
        return [
            (rank, StageMap(generation=generation, expert_map=body, bytes_per_s=share))
            for rank, share in enumerate(shares)
        ]

    def on_staged(self, rank: int, seconds: float, moved_bytes: int) -> bool:
        """True when this was the last rank."""
        if rank in self.staged:
            return False
        self.staged[rank] = seconds
        self.moved_bytes += moved_bytes
        return len(self.staged) == self.expert_map.num_ranks

    def waits_for(self) -> list[int]:
        return [rank for rank in range(self.expert_map.num_ranks) if rank not in self.staged]
