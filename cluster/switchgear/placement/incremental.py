"""The policy of few moves: on the last window's counts, each layer makes its best moves, a bounded number of them.

Replicate the hottest into free slots, swap hot for cold, as SwiftBalancer (vLLM pull request 37656) does it; here by
the same search as the adaptive policy's (search.py), but with no forecast, no price, no other start.
"""

from __future__ import annotations

import numpy as np

from switchgear.placement.limits import pool_room, start_presence
from switchgear.placement.outcome import planned
from switchgear.placement.plan import PlacementPlan, presence
from switchgear.placement.problem import Int64, PlacementProblem, checked_windows
from switchgear.placement.search import SearchSettings, chosen_presence, search_from
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.placement import planner

MOVES_PER_LAYER = 4
TARGET = 1.05


class Incremental:
    name = "incremental"

    def plan(self, windows_WLE: Int64, current: ExpertMap, problem: PlacementProblem) -> PlacementPlan:
        load_LE = checked_windows(windows_WLE, current)[-1].astype(np.float64)
        problem.check(current)
        start_LRE = start_presence(current, problem)
        mandatory_L = (start_LRE & ~presence(current)).sum(axis=(1, 2))
        settings = SearchSettings(
            steps_max=2 * MOVES_PER_LAYER,
            target=TARGET,
            per_move=True,
        )
        moves_max_L = MOVES_PER_LAYER + mandatory_L
        moves_max = planner.UNLIMITED
        if problem.byte_budget is not None:
            moves_max = max(problem.byte_budget // problem.cost.expert_bytes, int(mandatory_L.sum()))
        present_LRE = chosen_presence(
            [search_from(start_LRE, current, [(1.0, load_LE)], problem, settings, moves_max_L).paths()],
            current,
            moves_max=moves_max,
            gain_per_move_s=0.0,
            room_R=pool_room(current, problem),
        )
        return planned(self.name, present_LRE, current, load_LE, problem)
