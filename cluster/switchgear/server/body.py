"""Reads a request's body up to a limit, never buffering more: `BodyReader`."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from switchgear.server.limits import ServerLimits
from switchgear_runtime.errors import RequestError

READ_TIMEOUT_S = 60.0
SMALL_BODY_BYTES = 64 << 10  # of each body; free, so that a few clients that stall keep no ordinary request out


class BodyRefused(RequestError):
    """The client may still be sending."""


class BodyReader:
    """`num_held`: bytes of all bodies that are being read, beyond the free ones."""

    def __init__(self) -> None:
        self.num_held = 0

    async def read(self, request: Request, limits: ServerLimits) -> bytes:
        """413 at once if Content-Length says so, else as soon as the limit is passed; 408 if the body stalls; 503 if
        there are too many large ones at a time."""
        announced = request.headers.get("content-length", "0")
        if announced.isascii() and announced.isdigit() and int(announced) > limits.max_body_bytes:
            raise _too_large(limits)
        body = bytearray()
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                async for chunk in request.stream():
                    if len(body) + len(chunk) > limits.max_body_bytes:
                        raise _too_large(limits)
                    self._hold(len(body), len(chunk), limits)
                    body += chunk
            return bytes(body)
        except TimeoutError:
            raise RequestError(f"the body did not arrive within {READ_TIMEOUT_S:.0f} s", status=408) from None
        except ClientDisconnect:
            raise RequestError("the client went away while sending the body") from None
        finally:
            self.num_held -= _counted(len(body))
            body.clear()  # an error's traceback keeps it for as long as the answer takes

    def _hold(self, num_read: int, num_more: int, limits: ServerLimits) -> None:
        num_held = self.num_held + _counted(num_read + num_more) - _counted(num_read)
        if num_held > limits.max_total_body_bytes:
            raise BodyRefused(
                f"the bodies that are being read take {limits.max_total_body_bytes} bytes, the limit for all together; "
                "retry later",
                status=503,
            )
        self.num_held = num_held


def _counted(num_bytes: int) -> int:
    return max(0, num_bytes - SMALL_BODY_BYTES)


def _too_large(limits: ServerLimits) -> BodyRefused:
    return BodyRefused(f"the body is larger than the limit of {limits.max_body_bytes} bytes", status=413)
