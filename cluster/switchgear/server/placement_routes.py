"""The admin routes of placement: show, plan, apply, rebalance, load-expert, pin. The key is checked in auth.py."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from switchgear.placement.events import Outcome
from switchgear.placement.report import reply_of, status_of
from switchgear.placement.service import PlacementService
from switchgear.server.containers import check_json
from switchgear.server.frontend import Frontend
from switchgear_runtime.errors import ConfigError, RequestError
from switchgear_runtime.moe.expert_map import ExpertMap

PINS_MAX = 4096


class Pin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """This expert lies on exactly these ranks."""

    layer: int
    expert: int
    ranks: tuple[int, ...]


class Pins(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All pins from now on."""

    pins: list[Pin]


class LoadExpert(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`path`: of a safetensors file, absolute, as the server and every rank see it."""

    layer: int
    expert: int
    path: str


class PlacementRoutes:
    def __init__(self, frontend: Frontend, placement: PlacementService) -> None:
        self._frontend = frontend
        self._placement = placement

    def routes(self) -> list[Route]:
        base = "/admin/placement"
        return [
            Route(base, self.show),
            Route(f"{base}/plan", self.plan, methods=["POST"]),
            Route(f"{base}/rebalance", self.rebalance, methods=["POST"]),
            Route(f"{base}/apply", self.apply, methods=["POST"]),
            Route(f"{base}/load-expert", self.load_expert, methods=["POST"]),
            Route(f"{base}/pin", self.pin, methods=["PUT"]),
        ]

    async def show(self, _: Request) -> Response:
        return self._status()

    async def plan(self, _: Request) -> Response:
        """What the policy would do now; nothing is done."""
        return _reply(await self._placement.rebalance(dry=True), dry=True)

    async def rebalance(self, _: Request) -> Response:
        """Answers once the map is in force."""
        return _reply(await self._placement.rebalance())

    async def apply(self, request: Request) -> Response:
        """The body is an expert map (ExpertMap.to_json); answers once it is in force."""
        body = await self._frontend.read(request)
        await check_json(body)
        try:
            value = msgspec.json.decode(body)
            _check_shape(value, self._placement.controller.shape)
            expert_map = ExpertMap.from_json(value)
        except (ConfigError, msgspec.DecodeError) as error:
            raise RequestError(str(error)) from None
        return _reply(await self._placement.apply(expert_map))

    async def load_expert(self, request: Request) -> Response:
        """Answers once new sequences get the file's weights; running ones keep those they began with."""
        body = await self._frontend.read_json(request, LoadExpert)
        return _reply(await self._placement.load_expert(body.layer, body.expert, body.path))

    async def pin(self, request: Request) -> Response:
        """The body has all pins; none of the earlier ones stays."""
        pins = (await self._frontend.read_json(request, Pins)).pins
        if len(pins) > PINS_MAX:
            raise RequestError(f"pins: {len(pins)} of at most {PINS_MAX}", param="pins")
        try:
            self._placement.controller.pin({(pin.layer, pin.expert): pin.ranks for pin in pins})
        except ConfigError as error:
            raise RequestError(str(error), param="pins") from None
        return self._status()

    def _status(self) -> Response:
        return _json(status_of(self._placement.controller))


def _check_shape(value: Any, shape: tuple[int, int]) -> None:
    """Before a map of another model's size is built."""
    match value:
        case {"num_experts": int(num_experts), "physical_to_logical": list(rows)} if (len(rows), num_experts) != shape:
            raise RequestError(
                f"expert map is for (layers, experts) = {(len(rows), num_experts)}; this cluster's model has {shape}",
                status=409,
            )


def _reply(outcome: Outcome, *, dry: bool = False) -> Response:
    if outcome.error:
        raise RequestError(outcome.error, status=409)
    return _json(reply_of(outcome, dry=dry))


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
