"""What a map costs on a load: rows and touched experts of each rank, and the predicted time of a step.

A window of load spans `num_steps` steps. An expert that gets x rows a step on a rank is touched in a share
1 - exp(-x) of them: in prefill always, in decode for cold experts rarely.

Letters: L MoE layers, E logical experts, R ranks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from switchgear.placement.plan import presence
from switchgear.placement.problem import PlacementProblem
from switchgear_runtime.moe.expert_map import EMPTY, ExpertMap
from switchgear_runtime.placement import planner

Float64 = NDArray[np.float64]


def equal_split(load_LE: Float64 | NDArray[np.int64], expert_map: ExpertMap) -> Float64:
    """Rows [L, R, E] where the replicas of an expert share its rows equally, as `hash` does and EPLB assumes."""
    present_LRE = presence(expert_map)
    rows_LRE: Float64 = present_LRE * (load_LE / present_LRE.sum(axis=1))[:, None, :]
    return rows_LRE


def balanced_split(load_LE: Float64 | NDArray[np.int64], expert_map: ExpertMap) -> Float64:
    """Rows [L, R, E] where replicas share so that the largest sum of a rank is least, as the router's `lp` does."""
    num_layers, num_ranks, num_experts = expert_map.num_layers, expert_map.num_ranks, expert_map.num_experts
    held_LP = expert_map.physical_to_logical_LP
    rows_LP = planner.split(load_LE.astype(np.float64), held_LP, num_ranks)
    rows_LRE = np.zeros((num_layers, num_ranks, num_experts))
    layer, slot = np.nonzero(held_LP != EMPTY)
    rows_LRE[layer, slot // expert_map.slots_per_rank, held_LP[layer, slot]] = rows_LP[layer, slot]
    return rows_LRE


def step_time_s(rows_LRE: Float64, problem: PlacementProblem) -> float:
    """Mean predicted time of a step in a window with these rows."""
    per_step_LRE = rows_LRE / problem.num_steps
    touched_LR = -np.expm1(-per_step_LRE).sum(axis=2)
    return problem.cost.step_time_s(per_step_LRE.sum(axis=2), touched_LR)
