"""Our policy: minimises the predicted step time of the next window, moves charged.

It foretells the next window's load (forecast.py), searches each layer from today's placement, where moves cost, and,
if the budget allows that many, from EPLB's (search.py), and takes from all layers' paths the moves that save most per
byte (choice.py). Hysteresis: a move must save a multiple of what it costs within the horizon, a layer is left alone
once it is as even as its forecast is sure, and a plan that saves little in all is not made.

Without a byte budget no layer's predicted maximum is above that of EPLB's placement for the same load.

Letters: L MoE layers, E logical experts, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from switchgear.placement.eplb import eplb_presence
from switchgear.placement.forecast import forecast
from switchgear.placement.limits import pinned, pool_room, start_presence
from switchgear.placement.outcome import kept, planned
from switchgear.placement.plan import PlacementPlan, presence
from switchgear.placement.problem import Int64, PlacementProblem, checked_windows
from switchgear.placement.search import SearchSettings, chosen_presence, paths_from
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.placement import planner


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptiveSettings:
    gain_over_cost: float = 1.5  # what a move must save within the horizon, over what it costs
    gain_min: float = 0.01  # of the predicted step: a plan that saves less is not made
    target: float = 1.002  # even enough, with a perfect forecast
    sureness: float = 0.0  # of the forecast's error in a rank's load, that need not be evened out
    steps_max: int = 96


class Adaptive:
    """The default."""

    name = "adaptive"

    def __init__(self, settings: AdaptiveSettings | None = None) -> None:
        self.settings = settings or AdaptiveSettings()

    def plan(self, windows_WLE: Int64, current: ExpertMap, problem: PlacementProblem) -> PlacementPlan:
        windows = checked_windows(windows_WLE, current)
        problem.check(current)
        start_LRE = start_presence(current, problem)
        foretold = forecast(windows)
        load_LE = foretold.load_LE
        if not load_LE.any() and not problem.pinned:
            return kept(self.name, "no load", current, load_LE, problem)
        cost = problem.cost
        mandatory = int((start_LRE & ~presence(current)).sum())
        moves_max = planner.UNLIMITED
        if problem.byte_budget is not None:
            moves_max = max(problem.byte_budget // cost.expert_bytes, mandatory)
        rank_error_L = foretold.error_L * np.sqrt(current.num_experts / current.num_ranks)
        rank_load_L = np.maximum(load_LE.sum(axis=1) / current.num_ranks, 1e-300)
        unsure = float(np.median(rank_error_L / rank_load_L)) * self.settings.sureness
        settings = SearchSettings(
            steps_max=self.settings.steps_max, target=max(self.settings.target, 1.0 + unsure), per_move=True
        )
        searches = [paths_from(start_LRE, current, load_LE, problem, settings)]
        if problem.byte_budget is None:
            eplb_LRE = pinned(eplb_presence(np.rint(load_LE).astype(np.int64), problem), problem)
            free = SearchSettings(steps_max=self.settings.steps_max, target=self.settings.target, per_move=False)
            searches.append(paths_from(eplb_LRE, current, load_LE, problem, free))
        horizon = problem.horizon_steps or problem.num_steps
        gain_per_move_s = self.settings.gain_over_cost * cost.move_s(cost.expert_bytes) / horizon
        present_LRE, before_s, after_s = chosen_presence(
            searches,
            current,
            moves_max=moves_max,
            gain_per_move_s=gain_per_move_s if problem.byte_budget is not None else 0.0,
            room_R=pool_room(current, problem),
        )
        if before_s - after_s < self.settings.gain_min * before_s and not mandatory and problem.byte_budget is not None:
            saving = 100 * (1 - after_s / before_s) if before_s else 0.0
            why = f"nothing to gain: {saving:.1f} % of {before_s * 1e3:.3g} ms a step"
            return kept(self.name, why, current, load_LE, problem)
        return planned(self.name, present_LRE, current, load_LE, problem)
