"""Every failure as OpenAI's error object: {"error": {message, type, param, code}}."""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from switchgear.server.body import BodyRefused
from switchgear.server.wire import status_of
from switchgear_runtime.errors import SwitchgearError

RETRY_AFTER_S = 2
LINGER_S = 2.0
_CODES = {401: "invalid_api_key", 413: "body_too_large", 429: "queue_full", 503: "unavailable"}
_log = logging.getLogger(__name__)


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    code = code or _CODES.get(status)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(error: SwitchgearError) -> dict[str, Any]:
    message = str(error)
    code = "context_length_exceeded" if message.startswith("This model's maximum context length") else None
    if status_of(error) == 404 and getattr(error, "param", None) == "model":
        code = "model_not_found"
    return error_body(message, status_of(error), getattr(error, "param", None), code)


class ErrorResponse(Response):
    """JSON; tells an overloaded client when to come back. If the body was refused, hears a little more of it out.

    A server that closes while the client still sends makes the client see a reset instead of the answer, so we read on
    for at most LINGER_S, keeping nothing.
    """

    media_type = "application/json"

    def __init__(self, body: dict[str, Any], status: int, *, linger: bool = False) -> None:
        headers = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else {}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if linger:
            headers["Connection"] = "close"
        super().__init__(msgspec.json.encode(body), status_code=status, headers=headers)
        self._linger = linger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        expects = any(name == b"expect" for name, _ in scope["headers"])  # such a client waits before it sends
        if not self._linger or expects:
            await super().__call__(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        try:
            async with asyncio.timeout(LINGER_S):
                while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                    pass
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b""})


def response_of(error: SwitchgearError) -> ErrorResponse:
    status = status_of(error)
    return ErrorResponse(body_of(error), status, linger=isinstance(error, BodyRefused))


async def on_switchgear_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, SwitchgearError)
    return response_of(error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own: 404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    messages = {
        404: f"there is no route {request.url.path}",
        405: f"{request.url.path} does not take {request.method}",
    }
    message = messages.get(error.status_code) or str(error.detail) or HTTPStatus(error.status_code).phrase
    response = ErrorResponse(error_body(message, error.status_code), error.status_code)
    response.headers.update(error.headers or {})
    return response


async def on_bug(_: Request, error: Exception) -> Response:
    """Nothing of our insides leaves the house; Starlette re-raises the error into the server's log."""
    _log.error("a request failed: %s: %s", type(error).__name__, error)
    return ErrorResponse(error_body("internal error", 500), 500)
