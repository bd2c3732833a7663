"""A routing trace through a policy and the cost model, no ranks needed: `replay`.

Each window is scored on the map that the policy makes of the windows before it: a plan is worth what it does for the
load that comes, never for the load it was made of.

Letters: W windows, L MoE layers, E logical experts, R ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from switchgear.placement.policy import WINDOWS_MAX, CostModel, PlacementPolicy, PlacementProblem
from switchgear.placement.score import balanced_split, equal_split, rank_rows, step_time_s
from switchgear_runtime.model import footprint
from switchgear_runtime.model.spec import DecoderSpec
from switchgear_runtime.moe.expert_map import ExpertMap

Int64 = NDArray[np.int64]
COUNTED = ("waterfill", "lp")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayedWindow:
    """`step_s`: predicted, of the experts alone; `imbalance`: sum over layers of the largest rank's rows over that of
    the mean; `moved_bytes`: of the plan made before it; `plan_s`: what making it took."""

    step_s: float
    imbalance: float
    moved_bytes: int
    plan_s: float


def replay(
    routed_WLE: Int64,
    policy: PlacementPolicy,
    problem: PlacementProblem,
    *,
    replica_choice: str = "lp",
    progress: Callable[[int], None] | None = None,
) -> list[ReplayedWindow]:
    """One less than there are windows: before the second, the policy plans for the first time. `replica_choice`: the
    setting; what knows the counts is taken to balance perfectly, the others to split an expert's rows equally."""
    split = balanced_split if replica_choice in COUNTED else equal_split
    num_ranks = problem.topology.num_ranks
    current = ExpertMap.contiguous(routed_WLE.shape[1], routed_WLE.shape[2], num_ranks)
    replayed = []
    for window in range(1, len(routed_WLE)):
        start_s = time.perf_counter()
        plan = policy.plan(routed_WLE[max(0, window - WINDOWS_MAX) : window], current, problem)
        plan_s = time.perf_counter() - start_s
        current = plan.expert_map
        rows_LP = split(routed_WLE[window], current)
        replayed.append(
            ReplayedWindow(
                step_s=step_time_s(rows_LP, problem),
                imbalance=imbalance(rank_rows(rows_LP, num_ranks)),
                moved_bytes=plan.moved_bytes,
                plan_s=plan_s,
            )
        )
        if progress is not None:
            progress(window)
    return replayed


def imbalance(rows_LR: NDArray[np.float64]) -> float:
    """Sum over layers of the largest rank's rows, over that of the mean rank's; 1 is even."""
    mean = float(rows_LR.mean(axis=1).sum())
    return float(rows_LR.max(axis=1).sum()) / mean if mean else 1.0


def summary(replayed: Sequence[ReplayedWindow]) -> dict[str, float]:
    step_s = np.array([window.step_s for window in replayed])
    return {
        "num_windows": len(replayed),
        "step_s_mean": float(step_s.mean()),
        "step_s_p99": float(np.quantile(step_s, 0.99)),
        "imbalance_mean": float(np.mean([window.imbalance for window in replayed])),
        "imbalance_max": max(window.imbalance for window in replayed),
        "moved_bytes": sum(window.moved_bytes for window in replayed),
        "num_plans_with_moves": sum(window.moved_bytes > 0 for window in replayed),
        "plan_s_max": max(window.plan_s for window in replayed),
    }


def cost_of(spec: DecoderSpec, dtype: str, quantization: str) -> CostModel:
    """The cost model's own rates with this model's sizes."""
    item_bytes = 4 if dtype == "float32" else 2
    return CostModel(
        expert_bytes=footprint.slot_bytes(spec, dtype, quantization),
        row_flops=6.0 * spec.hidden_size * spec.moe.ffn,
        row_bytes=2.0 * spec.hidden_size * item_bytes,
    )
