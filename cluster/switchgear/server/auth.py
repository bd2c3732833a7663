"""The keys: `Bearer` middleware over every route but /health, compared in constant time.

Admin routes have a key of their own and no other opens them. Without one they are closed: whoever may send prompts, or
runs a process on this host, may not on that account move experts or change the cluster's size.
"""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from switchgear.server.errors import response_of
from switchgear_runtime.errors import RequestError

OPEN_PATHS = frozenset({"/health"})
ADMIN_PREFIX = "/admin/"
CLOSED = "the admin routes are closed; start the server with --admin-key or SWITCHGEAR_ADMIN_KEY"


class RequireKey:
    """ASGI middleware; refuses before anything else is looked at: 401, or 403 where no key would help."""

    def __init__(self, app: ASGIApp, api_key: str | None, admin_key: str | None) -> None:
        self._app = app
        self._api_key = None if api_key is None else b"Bearer " + api_key.encode()
        self._admin_key = None if admin_key is None else b"Bearer " + admin_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._refusal(scope) if scope["type"] == "http" else None
        if error is not None:
            await response_of(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> RequestError | None:
        is_admin = scope["path"].startswith(ADMIN_PREFIX)
        expected = self._admin_key if is_admin else self._api_key
        if is_admin and expected is None:
            return RequestError(CLOSED, status=403)
        if expected is None or scope["path"] in OPEN_PATHS:
            return None
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if hmac.compare_digest(given, expected):
            return None
        name = "admin key" if is_admin else "API key"
        message = f"wrong {name}" if given else f"no {name}; send the header Authorization: Bearer KEY"
        return RequestError(message, status=401)
