"""What the placement controller wants done, and what comes back: actions, outcomes and the planner's answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from switchgear.placement.plan import PlacementPlan
from switchgear.placement.problem import PlacementProblem
from switchgear_runtime.messages import ToRank
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.moe.model_versions import ModelVersions

Int64 = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PlanRequest:
    """For the planner, wherever it runs; it needs nothing else, so that one that was restarted answers the same.

    `windows_WLE`: the recent windows of load, the newest last. `previous`: the map before the current one, to be
    compared with it on the newest window.
    """

    request_id: int
    policy: str
    windows_WLE: Int64
    current: ExpertMap
    problem: PlacementProblem
    previous: ExpertMap | None = None

    @property
    def over_pool(self) -> str:
        """Why the current map cannot simply stay: a rank holds more than its pool has slots; empty if none does."""
        held_R, pool_slots = self.current.pairs_per_rank, self.problem.pool_slots
        if pool_slots is None or held_R.max() <= pool_slots:
            return ""
        return f"rank {int(held_R.argmax())} holds {held_R.max()} experts, its pool has {pool_slots} slots; no plan frees any"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PlanReply:
    """`current_s`, `previous_s`: predicted time of a step on the newest window with either map. `plan_s`: what planning
    took. Without a plan, `error` says why."""

    request_id: int
    plan: PlacementPlan | None
    current_s: float = 0.0
    previous_s: float | None = None
    plan_s: float = 0.0
    error: str = ""


# --- actions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TellRank:
    rank: int
    message: ToRank


@dataclass(frozen=True, slots=True)
class AskPlanner:
    """Answer by `on_plan`, or `on_planner_lost` if its process dies."""

    request: PlanRequest


@dataclass(frozen=True, slots=True)
class RestartPlanner:
    """It hangs: end its process. The next request starts another."""

    reason: str


@dataclass(frozen=True, slots=True)
class WakeRanks:
    """Every rank has staged the map. If all are parked, a step is needed, for they flip at its header."""


@dataclass(frozen=True, slots=True)
class Committed:
    """All ranks compute with this map and these model versions; new sequences get the latest of them."""

    expert_map: ExpertMap
    versions: ModelVersions


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an operator's order ended. `error` empty: as asked for. `version`: of the model, that new sequences get."""

    plan: PlacementPlan | None = None
    epoch: int = 0
    error: str = ""
    version: int = 0


@dataclass(frozen=True, slots=True)
class Settle:
    ticket: int
    outcome: Outcome


PlacementAction = TellRank | AskPlanner | RestartPlanner | WakeRanks | Committed | Settle
