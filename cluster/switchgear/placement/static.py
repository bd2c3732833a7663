"""The policy that never moves anything."""

from __future__ import annotations

from switchgear.placement.plan import PlacementPlan
from switchgear.placement.problem import Int64, PlacementProblem, checked_windows
from switchgear.placement.score import balanced_split, step_time_s
from switchgear_runtime.moe.expert_map import ExpertMap


class Static:
    """Keeps the current map."""

    name = "static"

    def plan(self, windows_WLE: Int64, current: ExpertMap, problem: PlacementProblem) -> PlacementPlan:
        windows = checked_windows(windows_WLE, current)
        problem.check(current)
        predicted_s = step_time_s(balanced_split(windows[-1], current), problem)
        return PlacementPlan(
            expert_map=current,
            moves=(),
            moved_bytes=0,
            predicted_before_s=predicted_s,
            predicted_after_s=predicted_s,
            reason="static: nothing moves",
        )
