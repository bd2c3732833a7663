"""The policy of few moves: the hottest expert of the slowest rank gets a replica on the rank with most slack.

Letters: L MoE layers, E logical experts, R ranks.
"""

from __future__ import annotations

import numpy as np

from switchgear.placement.plan import PlacementPlan, arrange, moves_between, presence
from switchgear.placement.problem import Int64, PlacementProblem, checked_windows
from switchgear.placement.score import equal_split, step_time_s
from switchgear_runtime.moe.expert_map import ExpertMap

MOVES_MAX = 16


class Incremental:
    """Replicates into free slots only."""

    name = "incremental"

    def plan(self, windows_WLE: Int64, current: ExpertMap, problem: PlacementProblem) -> PlacementPlan:
        load_LE = checked_windows(windows_WLE, current)[-1]
        problem.check(current)
        before_s = step_time_s(equal_split(load_LE, current), problem)
        present_LRE = presence(current)
        budget = MOVES_MAX
        if problem.byte_budget is not None:
            budget = min(budget, problem.byte_budget // problem.cost.expert_bytes)
        extra_max = problem.replica_budget_per_layer
        for _ in range(budget):
            rows_LRE = present_LRE * (load_LE / present_LRE.sum(axis=1))[:, None, :]
            rows_LR = rows_LRE.sum(axis=2)
            layer = int((rows_LR.max(axis=1) - rows_LR.mean(axis=1)).argmax())
            if extra_max is not None and present_LRE[layer].sum() - load_LE.shape[1] >= extra_max:
                break
            source = int(rows_LR[layer].argmax())
            expert = int(rows_LRE[layer, source].argmax())
            fits = ~present_LRE[layer, :, expert] & (present_LRE[layer].sum(axis=1) < problem.slots_per_rank)
            if problem.pool_slots is not None:
                fits &= present_LRE.sum(axis=(0, 2)) < problem.pool_slots
            fits &= rows_LR[layer] < rows_LR[layer].max()
            if not fits.any() or (layer, expert) in problem.pinned:
                break
            present_LRE[layer, np.where(fits, rows_LR[layer], np.inf).argmin(), expert] = True
        new = arrange(present_LRE, current, problem.slots_per_rank)
        after_s = step_time_s(equal_split(load_LE, new), problem)
        moves = moves_between(current, new, problem)
        if not moves or after_s >= before_s:
            new, moves, after_s = current, (), before_s
        return PlacementPlan(
            expert_map=new,
            moves=moves,
            moved_bytes=len(moves) * problem.cost.expert_bytes,
            predicted_before_s=before_s,
            predicted_after_s=after_s,
            reason=f"incremental: {len(moves)} moves, {before_s:.3g} s -> {after_s:.3g} s a step",
        )
