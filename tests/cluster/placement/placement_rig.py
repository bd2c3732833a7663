"""A PlacementController with its clock, its ranks and a planner in the same thread, for tests."""

from __future__ import annotations

import numpy as np

from switchgear.placement.controller import PlacementController
from switchgear.placement.cost_model import CostModel
from switchgear.placement.events import (
    AskPlanner,
    Committed,
    Outcome,
    PlacementAction,
    PlanReply,
    PlanRequest,
    RestartPlanner,
    Settle,
    TellRank,
    WakeRanks,
)
from switchgear.placement.settings import PlacementSettings
from switchgear.placement.worker import answer
from switchgear_runtime.messages import DropMap, MapRefused, MapStaged, RankStats, StageMap, StepFrame
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.moe.model_versions import ModelVersions
from switchgear_runtime.system import RealSystem

COST = CostModel(expert_bytes=1000, row_flops=3e5)
NO_STATS = RankStats(0, 0, 0, 0, 0, 0, 0, 0)


class HandSystem(RealSystem):
    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.time = 100.0

    def now(self) -> float:
        return self.time


class Rig:
    """`replies`: what the planner says instead of planning; None in it: it hangs."""

    def __init__(
        self,
        num_ranks: int = 2,
        num_layers: int = 1,
        num_experts: int = 4,
        *,
        initial: ExpertMap | None = None,
        settings: PlacementSettings | None = None,
    ) -> None:
        self.system = HandSystem()
        self.settings = settings or PlacementSettings(policy="incremental", window_s=10.0)
        self.controller = PlacementController(
            self.settings,
            COST,
            num_layers=num_layers,
            num_experts=num_experts,
            system=self.system,
            initial=initial,
            oldest_version=lambda: self.oldest_live,
        )
        self.oldest_live = 0  # model version that a sequence needs
        self.num_ranks = num_ranks
        self.shape = (num_layers, num_experts)
        self.generation = 0
        self.step = 0
        self.obedient = True  # ranks stage and flip
        self.planner_hangs = False
        self.requests: list[PlanRequest] = []
        self.told: list[tuple[int, object]] = []
        self.committed: list[ExpertMap] = []
        self.versions: list[ModelVersions] = []  # of each commit
        self.outcomes: dict[int, Outcome] = {}
        self.num_restarts = 0
        self.rank_epoch = 0

    def begin(self, num_ranks: int | None = None) -> ExpertMap:
        self.num_ranks = num_ranks or self.num_ranks
        self.generation += 1
        self.step = 0
        expert_map = self.controller.next_map(self.num_ranks)
        self.rank_epoch = expert_map.epoch
        self.perform(self.controller.on_generation(self.generation, ("host",) * self.num_ranks))
        return expert_map

    def frame(self, rank: int = 0, routed: list[int] | None = None, epoch: int | None = None) -> None:
        self.step += 1
        self.perform(
            self.controller.on_frame(
                StepFrame(
                    rank=rank,
                    generation=self.generation,
                    step=self.step,
                    tokens=[],
                    stats=NO_STATS,
                    expert_load=routed,
                    epoch=self.rank_epoch if epoch is None else epoch,
                )
            )
        )

    def window(self, routed: list[int]) -> None:
        """One whole window of this load."""
        self.frame(0, routed)
        self.wait(self.settings.window_s)

    def wait(self, duration_s: float) -> None:
        self.system.time += duration_s
        self.perform(self.controller.tick())

    def staged(self, rank: int, epoch: int, moved_bytes: int = 0) -> None:
        message = MapStaged(
            rank=rank, generation=self.generation, epoch=epoch, num_experts=1, moved_bytes=moved_bytes, seconds=0.1
        )
        self.perform(self.controller.on_staged(message))

    def refused(self, rank: int, epoch: int) -> None:
        self.perform(
            self.controller.on_refused(MapRefused(rank=rank, generation=self.generation, epoch=epoch, reason="no"))
        )

    def plan(self, request: PlanRequest) -> PlanReply:
        return answer(request)

    def perform(self, actions: list[PlacementAction]) -> None:
        for action in actions:
            match action:
                case AskPlanner():
                    self.requests.append(action.request)
                    if not self.planner_hangs:
                        self.perform(self.controller.on_plan(self.plan(action.request)))
                case TellRank():
                    self.told.append((action.rank, action.message))
                    if isinstance(action.message, StageMap) and self.obedient:
                        self.staged(action.rank, action.message.expert_map["epoch"])
                case WakeRanks():
                    migration = self.controller.migration
                    assert migration is not None
                    if self.obedient:
                        self.rank_epoch = migration.epoch
                        self.frame()
                case Committed():
                    self.committed.append(action.expert_map)
                    self.versions.append(action.versions)
                case RestartPlanner():
                    self.num_restarts += 1
                case Settle():
                    assert action.ticket not in self.outcomes
                    self.outcomes[action.ticket] = action.outcome

    def dropped(self) -> list[int]:
        return [message.epoch for _, message in self.told if isinstance(message, DropMap)]


def skewed(num_layers: int, num_experts: int, hot: list[int], tokens: int = 4000) -> list[int]:
    """Nearly everything goes to the hot experts of each layer."""
    load_LE = np.full((num_layers, num_experts), 4, np.int64)
    load_LE[:, hot] = tokens
    return load_LE.reshape(-1).tolist()
