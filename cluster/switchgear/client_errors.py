"""What a client raises, beside RequestError for what the caller can fix: `ServerError` and its kinds."""

from __future__ import annotations

from typing import Any

import msgspec

from switchgear_runtime.errors import RankFailed, RequestError, SwitchgearError


class ServerError(SwitchgearError, RuntimeError):
    """The server answered with an error of its own, or with something that is not its protocol."""

    def __init__(self, message: str, *, status: int | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


class ServerBusy(ServerError):
    """429 or 503: retry after `retry_after_s`."""


class ServerUnreachable(SwitchgearError, ConnectionError):
    """No answer: nothing listens there, the connection broke, or a deadline passed."""


class AuthenticationFailed(RequestError):
    """401: the API key is missing or wrong."""


def error_of_response(status: int, body: bytes, retry_after: str | None) -> SwitchgearError:
    """The typed exception of an HTTP error response, with the server's message."""
    try:
        return error_of(msgspec.json.decode(body), status, retry_after)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ServerError(f"the server answered {status} with no error object: {body[:200]!r}", status=status)


def error_of(value: Any, status: int, retry_after: str | None = None) -> SwitchgearError:
    fields = value.get("error") if isinstance(value, dict) else None
    fields = fields if isinstance(fields, dict) else {}
    message = str(fields.get("message") or f"the server answered {status}")
    param = fields.get("param")
    if status == 401:
        return AuthenticationFailed(message, status=401)
    if status in (429, 503):
        seconds = float(retry_after) if retry_after and retry_after.isdecimal() else None
        return ServerBusy(message, status=status, retry_after_s=seconds)
    if 400 <= status < 500:
        return RequestError(message, param=param if isinstance(param, str) else None, status=status)
    return ServerError(message, status=status)


def error_of_sequence(message: str, status: int | None) -> SwitchgearError:
    """Why one sequence of an accepted request failed."""
    if status is not None and 400 <= status < 500:
        return RequestError(message, status=status)
    return RankFailed(message)
