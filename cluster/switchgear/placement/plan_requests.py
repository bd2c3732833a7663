"""What the planner is asked: `PlanRequests` makes each request of recent windows of load, pins and prices."""

from __future__ import annotations

from collections import deque

import numpy as np

from switchgear.placement.cost_model import CostModel
from switchgear.placement.events import PlanRequest
from switchgear.placement.observer import Window
from switchgear.placement.problem import PlacementProblem
from switchgear.placement.settings import PlacementSettings
from switchgear.placement.topology import Topology
from switchgear_runtime.moe.expert_map import ExpertMap

WINDOWS_KEPT = 8  # that policies forecast from
Pins = dict[tuple[int, int], tuple[int, ...]]


class PlanRequests:
    """`windows`: the closed ones, the newest last. `shape`: MoE layers, experts."""

    def __init__(self, settings: PlacementSettings, cost: CostModel, shape: tuple[int, int]) -> None:
        self.windows: deque[Window] = deque(maxlen=WINDOWS_KEPT)
        self.pinned: Pins = {}
        self._settings = settings
        self._cost = cost
        self._shape = shape
        self._num_requests = 0

    def make(
        self,
        current: ExpertMap,
        hosts: tuple[str, ...],
        byte_budget: int | None,
        *,
        open_window: Window | None,
        previous: ExpertMap | None,
    ) -> PlanRequest:
        """`open_window`: the load that no closed window has yet."""
        self._num_requests += 1
        windows = [*self.windows, *([] if open_window is None else [open_window])][-WINDOWS_KEPT:]
        loads = [window.routed_LE for window in windows] or [np.zeros(self._shape, np.int64)]
        pins = {at: on for at, on in self.pinned.items() if max(on) < len(hosts)}
        num_steps = windows[-1].num_steps if windows else 1
        return PlanRequest(
            request_id=self._num_requests,
            policy=self._settings.planning_policy,
            windows_WLE=np.stack(loads),
            current=current,
            problem=self._problem(hosts, byte_budget, pins, num_steps),
            previous=previous,
        )

    def pin(self, pins: Pins, current: ExpertMap, hosts: tuple[str, ...], byte_budget: int | None) -> None:
        """Replace all pins. ConfigError if no map could obey these."""
        self._problem(hosts, byte_budget, pins, 1).check(current)
        self.pinned = dict(pins)

    def _problem(self, hosts: tuple[str, ...], byte_budget: int | None, pins: Pins, num_steps: int) -> PlacementProblem:
        num_ranks, settings = len(hosts), self._settings
        return PlacementProblem(
            topology=Topology(num_ranks=num_ranks, hosts=hosts),
            slots_per_rank=settings.columns(*self._shape, num_ranks),
            pool_slots=settings.pool_slots(*self._shape, num_ranks),
            cost=self._cost,
            byte_budget=byte_budget,
            replica_budget_per_layer=settings.replicas_per_layer,
            pinned=pins,
            num_steps=num_steps,
        )
