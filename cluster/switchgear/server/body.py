"""Reads a request's body up to a limit, never buffering more: `read_body`."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from switchgear_runtime.errors import RequestError

READ_TIMEOUT_S = 60.0


async def read_body(request: Request, max_bytes: int) -> bytes:
    """RequestError 413 at once if Content-Length says so, else as soon as `max_bytes` is passed; 408 if it stalls."""
    announced = request.headers.get("content-length", "0")
    if announced.isascii() and announced.isdigit() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            async for chunk in request.stream():
                if len(body) + len(chunk) > max_bytes:
                    raise _too_large(max_bytes)
                body += chunk
    except TimeoutError:
        raise RequestError(f"the body did not arrive within {READ_TIMEOUT_S:.0f} s", status=408) from None
    except ClientDisconnect:
        raise RequestError("the client went away while sending the body") from None
    return bytes(body)


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(f"the body is larger than the limit of {max_bytes} bytes", status=413)
