"""The API key: `Bearer` middleware over every route but /health, compared in constant time."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from switchgear.server.errors import response_of
from switchgear_runtime.errors import RequestError

OPEN_PATHS = frozenset({"/health"})


class RequireKey:
    """ASGI middleware; refuses with 401 before anything else is looked at."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = b"Bearer " + api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not hmac.compare_digest(given, self._expected):
                message = "wrong API key" if given else "no API key; send the header Authorization: Bearer KEY"
                await response_of(RequestError(message, status=401))(scope, receive, send)
                return
        await self._app(scope, receive, send)
