"""Placement in a running cluster: `PlacementService` joins PlacementController, planner and links on the event loop.

It decides nothing: what a rank or the planner says goes to the controller, what the controller wants is done here.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from switchgear.placement.controller import PlacementController
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
from switchgear.placement.expert_file import check_place, sha256_of
from switchgear.placement.in_force import InForce
from switchgear.placement.planner_process import Planner, PlannerLost
from switchgear_runtime.generation import GenerationDescriptor
from switchgear_runtime.messages import FromRank, MapRefused, MapStaged, StepFrame, ToRank
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.system import System

log = logging.getLogger(__name__)


class PlacementService:
    """`send`, `wake` and `committed` are the cluster's; all calls come on its event loop's thread. `file_bytes_max`: of an
    expert's weights."""

    def __init__(
        self,
        controller: PlacementController,
        planner: Planner,
        *,
        system: System,
        send: Callable[[int, ToRank], None],
        wake: Callable[[], None],
        committed: Callable[[Committed], None],
        file_bytes_max: int = 0,
    ) -> None:
        self.controller = controller
        self._planner = planner
        self._system = system
        self._send = send
        self._wake = wake
        self._committed = committed
        self._file_bytes_max = file_bytes_max
        self._tickets = itertools.count(1)
        self._orders: dict[int, asyncio.Future[Outcome]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._broken = False

    # --- events -----------------------------------------------------------------------------------------------------

    def begin(self, num_ranks: int) -> InForce:
        """What a generation that begins now computes with."""
        return InForce(self.controller.next_map(num_ranks), self.controller.versions)

    @property
    def map_in_force(self) -> dict[str, Any] | None:
        """For a rank that loads now; the generation it joins most likely begins with it."""
        expert_map = self.controller.expert_map
        return None if expert_map is None else expert_map.to_json()

    def on_ready(self, descriptor: GenerationDescriptor) -> None:
        hosts = descriptor.hosts or ("",) * descriptor.world_size
        self._guarded(lambda: self.controller.on_generation(descriptor.generation, hosts))

    def on_not_ready(self, reason: str) -> None:
        self._guarded(lambda: self.controller.on_generation_over(reason))

    def on_message(self, message: FromRank) -> None:
        """Everything a rank says may come here."""
        match message:
            case StepFrame():
                self._guarded(lambda: self.controller.on_frame(message), arm=message.expert_load is not None)
            case MapStaged():
                self._guarded(lambda: self.controller.on_staged(message))
            case MapRefused():
                log.warning("rank %d refuses the map of epoch %d: %s", message.rank, message.epoch, message.reason)
                self._guarded(lambda: self.controller.on_refused(message))

    # --- operators' orders --------------------------------------------------------------------------------------------

    async def rebalance(self, *, dry: bool = False) -> Outcome:
        """Ends when its map is in force, or when it is known that it will not be."""
        return await self._order(lambda ticket: self.controller.rebalance(ticket, dry=dry))

    async def apply(self, expert_map: ExpertMap) -> Outcome:
        return await self._order(lambda ticket: self.controller.apply(ticket, expert_map))

    async def load_expert(self, layer: int, expert: int, path: str) -> Outcome:
        """Ends when new sequences get the weights of this file for this expert, or when it is known that they will not.
        RequestError if the file cannot be an expert's."""
        check_place(layer, expert, self.controller.shape)
        sha256 = await asyncio.to_thread(sha256_of, path, self._file_bytes_max)
        return await self._order(lambda ticket: self.controller.load_expert(ticket, layer, expert, path, sha256))

    async def _order(self, give: Callable[[int], list[PlacementAction]]) -> Outcome:
        """The controller settles every ticket, each of its states having a deadline."""
        if self._broken:
            return Outcome(error=self.controller.alarm() or "the placement controller broke")
        ticket = next(self._tickets)
        order: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._orders[ticket] = order
        try:
            self._perform(give(ticket))
            return await order
        finally:
            self._orders.pop(ticket, None)

    def _guarded(self, event: Callable[[], list[PlacementAction]], *, arm: bool = True) -> None:
        """A bug in placement harms no link and no request: it ends placement, with an alarm. `arm`: whether the event
        may have changed a deadline without wanting anything done."""
        if self._broken:
            return
        try:
            actions = event()
            if actions or arm:
                self._perform(actions)
        except Exception as error:
            log.exception("the placement controller broke")
            self._broken = True
            reason = f"{type(error).__name__}: {error}"
            self.controller.watchdog.broke(reason)
            for order in self._orders.values():
                if not order.done():
                    order.set_result(Outcome(error=f"the placement controller broke: {reason}"))

    # --- actions ----------------------------------------------------------------------------------------------------

    def _perform(self, actions: list[PlacementAction]) -> None:
        for action in actions:
            match action:
                case TellRank():
                    self._send(action.rank, action.message)
                case AskPlanner():
                    self._spawn(self._ask(action.request))
                case RestartPlanner():
                    log.error("the planner is restarted: %s", action.reason)
                    self._spawn(self._planner.restart())
                case WakeRanks():
                    self._wake()
                case Committed():
                    epoch, version = action.expert_map.epoch, action.versions.latest
                    log.info("epoch %d, model version %d: %s", epoch, version, self.controller.last_reason)
                    self._committed(action)
                case Settle():
                    order = self._orders.get(action.ticket)
                    if order is not None and not order.done():
                        order.set_result(action.outcome)
        self._arm()

    async def _ask(self, request: PlanRequest) -> None:
        try:
            reply = await self._planner.ask(request)
        except PlannerLost as error:
            if not self._closed:
                log.error("the planner died: %s", error)
                reason = str(error)
                self._guarded(lambda: self.controller.on_planner_lost(request.request_id, reason))
        else:
            self._guarded(lambda: self.controller.on_plan(reply))

    def _arm(self) -> None:
        """One timer, at the controller's next deadline."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline_s = self.controller.next_deadline()
        if deadline_s is not None and not self._closed:
            delay_s = max(0.0, deadline_s - self._system.now())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_tick)

    def _on_tick(self) -> None:
        self._timer = None
        self._guarded(self.controller.tick)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Ends the planner; orders that are open end with an error."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._perform(self.controller.on_generation_over("the cluster stops"))
        await self._planner.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
