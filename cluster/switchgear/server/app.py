"""The ASGI application: routes, the API key, and one shape for every error. Knows a ServerCore and nothing of ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from switchgear.placement.service import PlacementService
from switchgear.server.auth import RequireKey
from switchgear.server.batch_route import BatchRoute
from switchgear.server.chat import Chat
from switchgear.server.completions import Completions
from switchgear.server.core import ServerCore
from switchgear.server.errors import ErrorResponse, error_body, on_bug, on_http_exception, on_switchgear_error
from switchgear.server.frontend import Frontend
from switchgear.server.metrics import Metrics
from switchgear.server.placement_metrics import PlacementCollector
from switchgear.server.placement_routes import PlacementRoutes
from switchgear.server.tokenization_routes import TokenizationRoutes
from switchgear_runtime.errors import SwitchgearError


def create_app(
    core: ServerCore,
    *,
    model_name: str,
    api_key: str | None = None,
    admin_key: str | None = None,
    why_not_ready: Callable[[], str | None] = lambda: None,
    placement: PlacementService | None = None,
    admin_routes: Sequence[Route] = (),
) -> Starlette:
    """The app around `core`, whose observer it becomes. `why_not_ready`: what /ready says then. `admin_routes`: more
    routes under /admin/."""
    metrics = Metrics(core, model_name)
    if placement is not None:
        metrics.add(PlacementCollector(placement.controller, model_name))
    core.observer = metrics
    frontend = Frontend(core=core, model_name=model_name, created_s=int(time.time()))
    small = _SmallRoutes(frontend, metrics, why_not_ready, placement)
    tokenization = TokenizationRoutes(frontend)
    return Starlette(
        routes=[
            Route("/health", small.health),
            Route("/ready", small.ready),
            Route("/metrics", small.metrics),
            Route("/v1/models", small.models),
            Route("/v1/models/{name:path}", small.model),
            Route("/v1/expert_load", small.expert_load),
            Route("/v1/completions", Completions(frontend).post, methods=["POST"]),
            Route("/v1/chat/completions", Chat(frontend).post, methods=["POST"]),
            Route("/tokenize", tokenization.tokenize, methods=["POST"]),
            Route("/detokenize", tokenization.detokenize, methods=["POST"]),
            Route("/tokenizer_info", tokenization.info),
            Route("/version", small.version),
            Route("/v1/batch", BatchRoute(frontend).post, methods=["POST"]),
            *(PlacementRoutes(frontend, placement).routes() if placement is not None else ()),
            *admin_routes,
        ],
        middleware=[Middleware(RequireKey, api_key=api_key, admin_key=admin_key)],
        exception_handlers={
            SwitchgearError: on_switchgear_error,
            HTTPException: on_http_exception,
            Exception: on_bug,
        },
    )


class _SmallRoutes:
    def __init__(
        self,
        frontend: Frontend,
        metrics: Metrics,
        why_not_ready: Callable[[], str | None],
        placement: PlacementService | None,
    ) -> None:
        self._frontend = frontend
        self._metrics = metrics
        self._why_not_ready = why_not_ready
        self._placement = placement

    async def health(self, _: Request) -> Response:
        """Alive, whether or not the ranks are."""
        return _json({"status": "alive"})

    async def ready(self, _: Request) -> Response:
        core = self._frontend.core
        if not core.ready:
            why = "the server is shutting down" if core.draining else self._why_not_ready() or "the ranks are not ready"
            return ErrorResponse(error_body(why, 503), 503)
        alarm = None if self._placement is None else self._placement.controller.alarm()
        answer = {"ranks": core.ranks.num_serving, "generation": core.generation, "epoch": core.epoch}
        if alarm is not None:  # it serves, so 200; but not green
            return _json({"status": "degraded", "placement": alarm, **answer})
        return _json({"status": "ready", **answer})

    async def version(self, _: Request) -> Response:
        return _json({"version": version("switchgear")})

    async def metrics(self, _: Request) -> Response:
        return Response(self._metrics.render(), media_type=CONTENT_TYPE_LATEST)

    async def models(self, _: Request) -> Response:
        return _json({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._frontend.check_model(request.path_params["name"])
        return _json(self._card())

    async def expert_load(self, _: Request) -> Response:
        """Sums since the start: tokens routed [layer][expert], rows computed [rank][layer][expert]."""
        return _json(self._frontend.core.expert_load())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._frontend.model_name,
            "object": "model",
            "created": self._frontend.created_s,
            "owned_by": "switchgear",
            "max_model_len": self._frontend.core.max_model_len,
        }


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
