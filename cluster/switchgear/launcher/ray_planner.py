"""The planner as a Ray actor: `RayPlanner`, a `Planner` that asks through the Ray driver process."""

from __future__ import annotations

import logging
from typing import Protocol

from switchgear.launcher.base import LaunchError
from switchgear.placement.events import PlanReply, PlanRequest
from switchgear.placement.planner_process import PlannerLost
from switchgear.placement.planner_protocol import PREFIX, decode_reply, encode_request
from switchgear_runtime.errors import WireError

log = logging.getLogger(__name__)


class _Driver(Protocol):
    """What it needs of the RayLauncher."""

    async def plan(self, body: bytes) -> bytes: ...

    async def end_planner(self) -> None: ...


class RayPlanner:
    """A `Planner`."""

    def __init__(self, driver: _Driver) -> None:
        self._driver = driver

    async def ask(self, request: PlanRequest) -> PlanReply:
        try:
            return decode_reply(await self._driver.plan(encode_request(request)[PREFIX.size :]))
        except (LaunchError, WireError) as error:
            raise PlannerLost(str(error)) from None

    async def restart(self) -> None:
        try:
            await self._driver.end_planner()
        except LaunchError as error:
            log.warning("the planner's actor could not be ended: %s", error)

    async def close(self) -> None:
        """It ends with the Ray driver, which ends all its actors."""
