"""The contenders of `bench placement`: the product's policies, and kinder versions of EPLB.

EPLB as it is shipped plans from the last counts and says nothing of bytes. So that a comparison is fair it also comes
with a longer memory, with its packs laid on the ranks that hold most of them already, and planned less often.

Letters: L MoE layers, E logical experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from switchgear.placement.eplb import Eplb, eplb_presence
from switchgear.placement.outcome import planned
from switchgear.placement.plan import PlacementPlan, presence
from switchgear.placement.policy import POLICIES, PlacementPolicy
from switchgear.placement.problem import Int64, PlacementProblem
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.placement import planner
from switchgear_runtime.placement.planner import Int32


class EplbOfMean:
    """EPLB on the sum of the windows it is given."""

    name = "eplb, 8 windows"

    def plan(self, windows_WLE: Int64, current: ExpertMap, problem: PlacementProblem) -> PlacementPlan:
        return Eplb().plan(windows_WLE.sum(axis=0), current, problem)


class EplbMatched:
    """EPLB's packs go to ranks so that many experts stay: the largest overlap first. As even as EPLB, fewer bytes."""

    name = "eplb, packs matched"

    def plan(self, windows_WLE: Int64, current: ExpertMap, problem: PlacementProblem) -> PlacementPlan:
        load_LE = windows_WLE[-1]
        wanted_LRE = eplb_presence(load_LE, problem)
        had_LRE = presence(current)
        for wanted_RE, had_RE in zip(wanted_LRE, had_LRE, strict=True):
            overlap_RR = had_RE.astype(np.int64) @ wanted_RE.T.astype(np.int64)
            packs_of_ranks = np.zeros(len(had_RE), np.int64)
            for _ in range(len(had_RE)):
                rank, pack = divmod(int(overlap_RR.argmax()), len(had_RE))
                packs_of_ranks[rank] = pack
                overlap_RR[rank, :] = overlap_RR[:, pack] = -1
            wanted_RE[:] = wanted_RE[packs_of_ranks]
        return planned(self.name, wanted_LRE, current, load_LE.astype(np.float64), problem)


class EplbWithoutReplicas:
    """EPLB packs each expert once: in decode a replica is weights to read."""

    name = "eplb, no replicas"

    def plan(self, windows_WLE: Int64, current: ExpertMap, problem: PlacementProblem) -> PlacementPlan:
        return Eplb().plan(windows_WLE, current, replace(problem, replica_budget_per_layer=0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """`budgeted`: gets half of EPLB's mean bytes a window, at most. `every`: windows from one plan to the next."""

    name: str
    policy: PlacementPolicy
    budgeted: bool = False
    every: int = 1
    published: Callable[[Int64, PlacementProblem], Int32] | None = None  # slots as EPLB gives them, duplicates and all


def as_published(windows_WLE: Int64, problem: PlacementProblem) -> Int32:
    """[L, P] from the last window. A rank may have an expert twice, which our maps refuse."""
    ranks = problem.topology.num_ranks
    return planner.eplb(windows_WLE[-1], ranks * problem.slots_per_rank, 1, 1, ranks)


def contenders() -> list[Contender]:
    """EPLB first: it sets the budget."""
    return [
        Contender(name="eplb", policy=Eplb(), published=as_published),
        Contender(
            name="eplb, 8 windows",
            policy=EplbOfMean(),
            published=lambda windows, problem: as_published(windows.sum(axis=0)[None], problem),
        ),
        Contender(name="eplb, packs matched", policy=EplbMatched(), published=as_published),
        Contender(name="eplb, every 8th window", policy=Eplb(), every=8, published=as_published),
        Contender(name="eplb, no replicas", policy=EplbWithoutReplicas()),
        Contender(name="static", policy=POLICIES["static"]()),
        Contender(name="incremental", policy=POLICIES["incremental"](), budgeted=True),
        Contender(name="adaptive", policy=POLICIES["adaptive"](), budgeted=True),
    ]
