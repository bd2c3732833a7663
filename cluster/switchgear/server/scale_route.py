"""`POST /admin/scale {"ranks": N}`: grow or shrink the running cluster; answers once it is done. The key: auth.py."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from switchgear.outputs import ScaleReply
from switchgear.server.core import ServerCore
from switchgear.server.frontend import Frontend


class ScaleBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    ranks: int


class ScaleRoute:
    """`scale` is Cluster.scale."""

    def __init__(self, core: ServerCore, scale: Callable[[int], Awaitable[None]]) -> None:
        self._frontend = Frontend(core=core, model_name="", created_s=0)
        self._scale = scale

    def routes(self) -> list[Route]:
        return [Route("/admin/scale", self.post, methods=["POST"])]

    async def post(self, request: Request) -> Response:
        body = await self._frontend.read_json(request, ScaleBody)
        await self._scale(body.ranks)
        core = self._frontend.core
        reply = ScaleReply(ranks=core.ranks.num_serving, generation=core.generation, num_carried=core.num_carried)
        return Response(msgspec.json.encode(reply), media_type="application/json")
