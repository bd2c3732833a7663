"""Our policy: minimises the predicted step time of the next window, moves charged.

1. It foretells the next window's load, and how that may miss: scenarios (forecast.py).
2. It searches each layer from today's placement, where moves cost, and without a byte budget from EPLB's too
   (search.py), and takes from all layers' paths the moves that save most per byte, while they pay (choice.py).
3. Slots that are still free get replicas, so that the router can level what was not foretold (insurance_reference.py),
   in layers where that costs next to nothing: in prefill; in decode a replica is weights to read. Replicas are swapped
   where a rank has little slack (slack_reference.py).

Without a byte budget, and given one window, no layer's predicted maximum is above that of EPLB's placement.

Letters: L MoE layers, E logical experts, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from switchgear.placement.eplb import eplb_presence
from switchgear.placement.forecast import SCENARIOS_MAX, Float64, forecast, scenarios_around
from switchgear.placement.limits import pinned, pool_room, start_presence
from switchgear.placement.outcome import kept, planned
from switchgear.placement.plan import Bool, PlacementPlan, presence
from switchgear.placement.problem import Int64, PlacementProblem, checked_windows
from switchgear.placement.search import Scenarios, SearchSettings, chosen_presence, search_from, with_replicas
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.placement import planner

SCENARIOS_MIN = 4
SCENARIO_SLOTS = 80_000  # of all layers and scenarios, that a plan looks at: so that planning keeps its pace


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptiveSettings:
    gain_over_cost: float = 1.5  # what a move must save within the horizon, over what it costs
    horizon_windows: float = 30.0  # for how long a plan pays, where the problem does not say
    target: float = 1.002  # a layer is even enough when its slowest rank is within this factor of the mean
    steps_max: int = 96  # of a layer's search
    near_steps_max: int = 12  # of those with all scenarios
    insurance: float = 0.03  # of a layer's predicted time, which filling its free slots may cost
    slack: float = 0.002  # and which swapping replicas to where loads may move may cost
    stale_max: int = 16  # replicas of a layer that are replaced by those of hotter experts in one plan


class Adaptive:
    """The default."""

    name = "adaptive"

    def __init__(self, settings: AdaptiveSettings | None = None) -> None:
        self.settings = settings or AdaptiveSettings()

    def plan(self, windows_WLE: Int64, current: ExpertMap, problem: PlacementProblem) -> PlacementPlan:
        windows = checked_windows(windows_WLE, current)
        problem.check(current)
        start_LRE = start_presence(current, problem)
        load_LE = forecast(windows)
        if not load_LE.any() and not problem.pinned:
            return kept(self.name, "no load", current, load_LE, problem)
        num_slots = current.num_layers * problem.topology.num_ranks * problem.slots_per_rank
        scenarios = scenarios_around(
            load_LE, windows, min(max(SCENARIOS_MIN, SCENARIO_SLOTS // num_slots), SCENARIOS_MAX)
        )
        searches = [search_from(start_LRE, current, scenarios, problem, self._settings).paths()]
        limit_L = None
        if problem.byte_budget is None:
            searches.append(self._from_eplb(current, scenarios, problem))
            limit_L = searches[1].level_max_LN[:, 0]
        mandatory = int((start_LRE & ~presence(current)).sum())
        moves_max = planner.UNLIMITED
        if problem.byte_budget is not None:
            moves_max = max(problem.byte_budget // problem.cost.expert_bytes, mandatory)
        present_LRE = chosen_presence(
            searches,
            current,
            moves_max=moves_max,
            gain_per_move_s=0.0 if problem.byte_budget is None else self._gain_per_move_s(problem),
            room_R=pool_room(current, problem),
        )
        present_LRE = self._insured(present_LRE, current, scenarios, problem, moves_max, limit_L)
        return planned(self.name, present_LRE, current, load_LE, problem)

    @property
    def _settings(self) -> SearchSettings:
        return SearchSettings(
            steps_max=self.settings.steps_max,
            near_steps_max=self.settings.near_steps_max,
            target=self.settings.target,
            per_move=True,
        )

    def _gain_per_move_s(self, problem: PlacementProblem) -> float:
        """What a move must save of each step."""
        horizon_steps = problem.horizon_steps or self.settings.horizon_windows * problem.num_steps
        return self.settings.gain_over_cost * problem.cost.move_s(problem.cost.expert_bytes) / horizon_steps

    def _from_eplb(self, current: ExpertMap, scenarios: Scenarios, problem: PlacementProblem) -> planner.Paths:
        likeliest_LE = np.rint(scenarios[0][1]).astype(np.int64)
        eplb_LRE = pinned(eplb_presence(likeliest_LE, problem), problem)
        settings = replace(self._settings, per_move=False)
        return search_from(eplb_LRE, current, scenarios, problem, settings).paths()

    def _insured(
        self,
        present_LRE: Bool,
        current: ExpertMap,
        scenarios: Scenarios,
        problem: PlacementProblem,
        moves_max: int,
        limit_L: Float64 | None,
    ) -> Bool:
        """With free slots filled, where that costs little, as far as the budget and the pools go."""
        had_LRE = presence(current)
        moves_L = (present_LRE & ~had_LRE).sum(axis=(1, 2))
        left = min(moves_max, 1 << 30) - int(moves_L.sum())
        shares_L = left // len(moves_L) + (np.arange(len(moves_L)) < left % len(moves_L))
        settings = SearchSettings(steps_max=self.settings.stale_max, target=1.0, per_move=False)
        filled_LRE, before_L, after_L = with_replicas(
            search_from(present_LRE, current, scenarios, problem, settings, moves_L + np.maximum(shares_L, 0)),
            filling=self.settings.insurance,
            swapping=self.settings.slack,
        )
        accepted_L = np.ones(len(before_L), np.bool_)
        if limit_L is not None:
            accepted_L = (after_L <= limit_L) | (after_L <= before_L)
        room_R = pool_room(current, problem)
        used_R = (present_LRE & ~had_LRE).sum(axis=(0, 2))
        for layer in np.flatnonzero(accepted_L).tolist():
            more_R = (filled_LRE[layer] & ~had_LRE[layer]).sum(axis=1)
            more_R = more_R - (present_LRE[layer] & ~had_LRE[layer]).sum(axis=1)
            if room_R is None or (used_R + more_R <= np.maximum(room_R, 0)).all():
                present_LRE[layer], used_R = filled_LRE[layer], used_R + more_R
        return present_LRE
