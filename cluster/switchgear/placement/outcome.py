"""From the experts that each rank shall hold to a checked `PlacementPlan`.

Letters: L MoE layers, E logical experts, R ranks.
"""

from __future__ import annotations

from switchgear.placement.plan import Bool, PlacementPlan, arrange, moves_between
from switchgear.placement.problem import PlacementProblem
from switchgear.placement.score import Float64, balanced_split, step_time_s
from switchgear_runtime.moe.expert_map import ExpertMap


def kept(policy: str, why: str, current: ExpertMap, load_LE: Float64, problem: PlacementProblem) -> PlacementPlan:
    """The plan that changes nothing."""
    predicted_s = step_time_s(balanced_split(load_LE, current), problem)
    return PlacementPlan(
        expert_map=current,
        moves=(),
        moved_bytes=0,
        predicted_before_s=predicted_s,
        predicted_after_s=predicted_s,
        reason=f"{policy}: {why}",
    )


def planned(
    policy: str, present_LRE: Bool, current: ExpertMap, load_LE: Float64, problem: PlacementProblem
) -> PlacementPlan:
    """The plan to hold `present_LRE`."""
    new = arrange(present_LRE, current, problem.slots_per_rank)
    if new is current:
        return kept(policy, "the map is as it should be", current, load_LE, problem)
    moves = moves_between(current, new, problem.topology)
    before_s = step_time_s(balanced_split(load_LE, current), problem)
    after_s = step_time_s(balanced_split(load_LE, new), problem)
    return PlacementPlan(
        expert_map=new,
        moves=moves,
        moved_bytes=len(moves) * problem.cost.expert_bytes,
        predicted_before_s=before_s,
        predicted_after_s=after_s,
        reason=f"{policy}: {len(moves)} moves, a step's experts {before_s * 1e3:.3g} ms -> {after_s * 1e3:.3g} ms",
    )
