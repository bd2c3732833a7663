"""The real PlacementController in simulation: `FollowingPlacement`, with a planner that dies, hangs and is late.

Stands where `SimPlacement` proposes random maps, and loads experts; the oracle, `check`, is the same.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from expert_swaps import ExpertFile
from sim_placement import Send, SimPlacement
from sim_system import SimSystem

from switchgear.placement.controller import PlacementController
from switchgear.placement.cost_model import CostModel
from switchgear.placement.events import (
    AskPlanner,
    Committed,
    Outcome,
    PlacementAction,
    PlanRequest,
    RestartPlanner,
    Settle,
    TellRank,
    WakeRanks,
)
from switchgear.placement.in_force import InForce
from switchgear.placement.settings import PlacementSettings
from switchgear.placement.worker import answer
from switchgear_runtime.generation import GenerationDescriptor
from switchgear_runtime.messages import BeginGeneration, MapRefused, MapStaged, StepFrame
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.moe.model_versions import ExpertSwap, ModelVersions

PLAN_TIMEOUT_S = 0.5


class FollowingPlacement(SimPlacement):
    """All in the server's thread. `later(delay_s, act)` runs `act` there; `wake` wakes ranks if all are parked. The core
    gives new sequences what it hears by `in_force`."""

    def __init__(
        self,
        system: SimSystem,
        num_layers: int,
        num_experts: int,
        num_ranks: int,
        *,
        send: Send,
        later: Callable[[float, Callable[[], None]], None],
        wake: Callable[[], None],
        oldest_version: Callable[[], int],
        in_force: Callable[[ModelVersions], None],
    ) -> None:
        super().__init__(system, num_layers, num_experts, num_ranks)
        self.controller = PlacementController(
            PlacementSettings(policy="incremental", window_s=0.2, plan_timeout_s=PLAN_TIMEOUT_S),
            CostModel(expert_bytes=1000, row_flops=3e8),
            num_layers=num_layers,
            num_experts=num_experts,
            system=system,
            oldest_version=oldest_version,
        )
        self.history: dict[int, ExpertSwap] = {}  # by version: all that were ever in force
        self.num_settled = 0
        self._oldest = 0
        self.outcomes: dict[int, Outcome] = {}
        self.num_orders = 0
        self._send = send
        self._later = later
        self._wake = wake
        self._in_force = in_force
        self._first: InForce | None = None  # of the generation that begins

    @property
    def num_ranks(self) -> int:
        current = self.controller.expert_map
        return super().num_ranks if current is None else current.num_ranks

    def begin(self, message: BeginGeneration) -> BeginGeneration:
        if self._generation != message.descriptor.generation or self._first is None:
            self._generation = message.descriptor.generation
            self._first = InForce(self.controller.next_map(message.descriptor.world_size), self.controller.versions)
        return self._first.begin(msgspec.structs.replace(message.descriptor, epoch=self._first.expert_map.epoch))

    def ready(self, descriptor: GenerationDescriptor) -> None:
        self._perform(self.controller.on_generation(descriptor.generation, ("host",) * descriptor.world_size))

    def over(self, reason: str) -> None:
        self._perform(self.controller.on_generation_over(reason))

    def propose(self, _ranks: list[int], _send: Send) -> None:
        """An operator's order: plan now, or a map of the operator's own."""
        self.num_orders += 1
        if self._maps.random() < 0.5:
            self._perform(self.controller.rebalance(self.num_orders))
            return
        expert_map = ExpertMap.random(
            self._maps, *self._shape, self.num_ranks, num_redundant=int(self._maps.integers(3))
        )
        self._perform(self.controller.apply(self.num_orders, expert_map))

    def load_expert(self, file: ExpertFile) -> None:
        self.num_orders += 1
        order = (file.layer, file.expert, str(file.path), file.sha256)
        self._perform(self.controller.load_expert(self.num_orders, *order))

    def drop(self, _ranks: list[int], _send: Send) -> None:
        """The controller drops by itself; here it does when its deadline has come early."""
        migration = self.controller.migration
        if migration is not None:
            migration.deadline_s = self._system.now()
            self._perform(self.controller.tick())

    def on_message(self, message: StepFrame | MapStaged | MapRefused) -> None:
        match message:
            case StepFrame():
                self._perform(self.controller.on_frame(message))
            case MapStaged():
                self.answers[message.generation, message.epoch, message.rank] += 1
                self._perform(self.controller.on_staged(message))
            case MapRefused():
                self.answers[message.generation, message.epoch, message.rank] += 1
                self.refusals.append(message.reason)
                self._perform(self.controller.on_refused(message))

    def check(self) -> None:
        super().check()
        self._perform(self.controller.on_generation_over("the end"))
        assert set(self.outcomes) == set(range(1, self.num_orders + 1)), "an order without an end"
        ran = {maps for maps_of_step in self.maps_by_step.values() for maps in maps_of_step}
        last_epoch = max(epoch for epoch, _ in ran)
        assert self.controller.epoch >= last_epoch, "ranks ran on a map that the controller does not know"

    def _perform(self, actions: list[PlacementAction]) -> None:
        for action in actions:
            match action:
                case TellRank():
                    self._send(action.rank, action.message)
                case AskPlanner():
                    self._ask(action.request)
                case Committed():
                    self.flipped_epochs.add(action.expert_map.epoch)
                    self._committed(action.versions)
                case WakeRanks():
                    self._wake()
                case RestartPlanner():
                    self._system.note("the planner is restarted")
                case Settle():
                    assert action.ticket not in self.outcomes
                    self.outcomes[action.ticket] = action.outcome
        deadline_s = self.controller.next_deadline()
        if deadline_s is not None:
            self._later(max(0.0, deadline_s - self._system.now()) + 1e-6, self._tick)

    def _committed(self, versions: ModelVersions) -> None:
        for swap in versions.swaps:
            assert self.history.setdefault(swap.version, swap) == swap, "one number for two versions"
        self.num_settled += versions.oldest > self._oldest
        self._oldest = versions.oldest
        self._in_force(versions)

    def _tick(self) -> None:
        deadline_s = self.controller.next_deadline()
        if deadline_s is not None and deadline_s <= self._system.now():
            self._perform(self.controller.tick())

    def _ask(self, request: PlanRequest) -> None:
        """It answers after a while; or too late, or its process dies."""
        draw, delay_s = self._system.random.random(), self._system.random.random() * 0.1
        if draw < 0.1:
            self._later(delay_s, lambda: self._perform(self.controller.on_planner_lost(request.request_id, "killed")))
            return
        late_s = PLAN_TIMEOUT_S if draw < 0.2 else 0.0
        self._later(delay_s + late_s, lambda: self._perform(self.controller.on_plan(answer(request))))
