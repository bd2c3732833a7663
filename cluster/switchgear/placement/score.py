"""What a map costs on a load: rows of each slot, and the predicted time of a step.

A window of load spans `num_steps` steps. An expert that gets x rows a step on a rank is touched in a share
1 - exp(-x) of them: in prefill always, in decode for cold experts rarely.

Letters: L MoE layers, E logical experts, R ranks, P slots.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from switchgear.placement.problem import PlacementProblem
from switchgear_runtime.moe.expert_map import EMPTY, ExpertMap
from switchgear_runtime.placement import planner

Float64 = NDArray[np.float64]
Load = Float64 | NDArray[np.int64]


def equal_split(load_LE: Load, expert_map: ExpertMap) -> Float64:
    """Rows [L, P] where the replicas of an expert share its rows equally, as `hash` does and EPLB assumes."""
    held_LP = expert_map.physical_to_logical_LP
    layers = np.arange(len(held_LP))[:, None]
    counts_LE = np.zeros((expert_map.num_layers, expert_map.num_experts + 1))
    np.add.at(counts_LE, (layers, held_LP), 1.0)  # EMPTY is the last column
    rows_LP: Float64 = np.where(held_LP == EMPTY, 0.0, load_LE[layers, held_LP] / counts_LE[layers, held_LP])
    return rows_LP


def balanced_split(load_LE: Load, expert_map: ExpertMap) -> Float64:
    """Rows [L, P] where replicas share so that the largest sum of a rank is least, as the router's `lp` does."""
    return planner.split(load_LE.astype(np.float64), expert_map.physical_to_logical_LP, expert_map.num_ranks)


def rank_rows(rows_LP: Float64, num_ranks: int) -> Float64:
    """[L, R]"""
    rows_LR: Float64 = rows_LP.reshape(len(rows_LP), num_ranks, -1).sum(axis=2)
    return rows_LR


def step_time_s(rows_LP: Float64, problem: PlacementProblem) -> float:
    """Mean predicted time of a step in a window with these rows."""
    per_step_LP = rows_LP / problem.num_steps
    num_ranks = problem.topology.num_ranks
    touched_LR = rank_rows(-np.expm1(-per_step_LP), num_ranks)
    return problem.cost.step_time_s(rank_rows(per_step_LP, num_ranks), touched_LR)
