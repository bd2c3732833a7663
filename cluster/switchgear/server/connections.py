"""How many clients may be connected: `http_config`, uvicorn's settings with a bound it answers in OpenAI's shape.

A connection over the bound hears 503 (but may ask for /health) and is closed; from twice the bound on it is not heard.
"""

from __future__ import annotations

import asyncio

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from switchgear.server.auth import OPEN_PATHS
from switchgear.server.errors import ErrorResponse, error_body

FIRST_BYTE_S = 10.0  # a connection that says nothing for so long is closed


def http_config(app: ASGIApp, *, max_connections: int, close_timeout_s: int) -> uvicorn.Config:
    """`close_timeout_s`: how long a shutdown waits for responses."""

    class BoundedProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            num_connected = len(self.connections)
            if num_connected >= 2 * max_connections:
                assert isinstance(transport, asyncio.WriteTransport)
                transport.set_protocol(asyncio.Protocol())
                transport.abort()
                return
            super().connection_made(transport)
            if num_connected >= max_connections:
                self.app: ASGIApp = _Busy(app, max_connections)
            # uvicorn's own timer of idle connections starts only after a first response.
            self.timeout_keep_alive_task = self.loop.call_later(FIRST_BYTE_S, self.timeout_keep_alive_handler)

    return uvicorn.Config(
        app,
        http=BoundedProtocol,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=close_timeout_s,
    )


class _Busy:
    """ASGI app in the place of ours, for one connection."""

    def __init__(self, app: ASGIApp, max_connections: int) -> None:
        self._app = app
        self._message = f"over {max_connections} clients are connected; retry later"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
        else:
            await ErrorResponse(error_body(self._message, 503), 503, linger=True)(scope, receive, send)
