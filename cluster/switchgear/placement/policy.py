"""The one interface of all placement policies, and their names.

A policy is a pure function: equal arguments give equal plans, so a planner process can be killed and restarted at any
time. It gets the last windows of load (counts at the router, oldest first) and may look at as many as there are.

>>> policy = POLICIES["static"]()
>>> plan = policy.plan(windows_WLE, current, problem)      # doctest: +SKIP
>>> plan.expert_map.epoch, plan.moves, plan.reason         # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from switchgear.placement.adaptive import Adaptive
from switchgear.placement.cost_model import CostModel
from switchgear.placement.eplb import Eplb
from switchgear.placement.incremental import Incremental
from switchgear.placement.plan import Move, PlacementPlan
from switchgear.placement.problem import Int64, PlacementProblem
from switchgear.placement.robust import Robust
from switchgear.placement.static import Static
from switchgear.placement.topology import Topology
from switchgear_runtime.moe.expert_map import ExpertMap

__all__ = ["POLICIES", "CostModel", "Move", "PlacementPlan", "PlacementPolicy", "PlacementProblem", "Topology"]

WINDOWS_MAX = 16  # more history than any policy looks at


class PlacementPolicy(Protocol):
    """`plan` has no side effect and no memory."""

    name: str

    def plan(self, windows_WLE: Int64, current: ExpertMap, problem: PlacementProblem) -> PlacementPlan:
        """`windows_WLE`: the last windows, oldest first; [L, E] is a single one. ConfigError if no map is legal."""


POLICIES: Mapping[str, Callable[[], PlacementPolicy]] = {
    "static": Static,
    "eplb": Eplb,
    "incremental": Incremental,
    "adaptive": Adaptive,
    "robust": Robust,
}
