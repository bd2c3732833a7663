"""One proposed map and its model versions, on the way to all ranks: `Migration`, from StageMap to the flip or the drop.

    staging --every rank says MapStaged--> staged --a step on the new epoch--> flipped
       | a refusal, a deadline, the end of the generation: DropMap, and the old epoch stays in force

A dropped map may still flip: when every rank had staged it before the first heard DropMap. So its epoch is never given
to another map, and whoever sees a step on it knows which map that is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

import numpy as np

from switchgear.placement.plan import Move, PlacementPlan
from switchgear_runtime.messages import StageMap
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.moe.model_versions import ModelVersions

STAGE_GRACE_S = 30.0  # beside what the bytes take, until it is dropped
FILE_TO_PACKED_MAX = 8  # a float32 file over the same expert packed to int4; ranks pace what they read
STAGE_SLOWNESS = 4.0  # times the budgeted rate: one slower than that is dropped


@dataclass(kw_only=True, slots=True, eq=False)
class Migration:
    """`price` gives it its deadline."""

    generation: int
    expert_map: ExpertMap
    versions: ModelVersions
    rest: tuple[ExpertMap, ...]  # of the route, to follow
    plan: PlacementPlan | None
    moves: tuple[Move, ...]
    num_read: int  # files that each rank reads for the versions
    ticket: int | None  # of the operator who ordered it, if one did
    begun_s: float
    deadline_s: float = inf
    num_bytes: int = 0
    bytes_per_s: int | None = None
    staged: dict[int, float] = field(default_factory=dict)  # by rank: seconds it took
    moved_bytes: int = 0  # as the ranks say

    @property
    def epoch(self) -> int:
        return self.expert_map.epoch

    def price(self, expert_bytes: int, bytes_per_s: int | None) -> int:
        """Bytes that it moves or reads. `bytes_per_s`: of all ranks; None: as fast as it goes."""
        num_read = self.num_read * self.expert_map.num_ranks
        self.num_bytes, self.bytes_per_s = (len(self.moves) + num_read) * expert_bytes, bytes_per_s
        most_bytes = self.num_bytes + num_read * (FILE_TO_PACKED_MAX - 1) * expert_bytes
        slowest_s = 0.0 if bytes_per_s is None else STAGE_SLOWNESS * most_bytes / bytes_per_s
        self.deadline_s = self.begun_s + STAGE_GRACE_S + slowest_s
        return self.num_bytes

    def orders(self) -> list[tuple[int, StageMap]]:
        """(rank, message). The cluster's bytes per second are shared so that all ranks finish at about the same time."""
        num_ranks = self.expert_map.num_ranks
        owners = [move.slot // self.expert_map.slots_per_rank for move in self.moves]
        arrivals_R = (np.bincount(owners, minlength=num_ranks) + self.num_read).tolist()
        total = max(1, sum(arrivals_R))
        body, versions = self.expert_map.to_json(), self.versions.to_json()
        shares = [
            None if self.bytes_per_s is None else max(1, round(self.bytes_per_s * arrivals / total))
            for arrivals in arrivals_R
        ]
        return [
            (rank, StageMap(generation=self.generation, expert_map=body, versions=versions, bytes_per_s=share))
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

    def late(self, now_s: float) -> str:
        """Why it is given up at its deadline."""
        late = self.waits_for()
        who = f"ranks {late} did not stage it" if late else "no step ran on it"
        return f"the map of epoch {self.epoch}: {who} within {now_s - self.begun_s:.0f} s"
