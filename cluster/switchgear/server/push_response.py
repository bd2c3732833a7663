"""Responses that end when the client goes away: `PushResponse`; `unless_disconnected` for those sent whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

Result = TypeVar("Result")


class PushResponse(Response):
    """Sends each chunk as it comes. `on_end` runs once: at the last chunk, a disconnect, an error or a shutdown."""

    def __init__(self, chunks: AsyncGenerator[bytes, None], *, media_type: str, on_end: Callable[[], None]) -> None:
        super().__init__(media_type=media_type, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 (ASGI)
        try:
            await _first(self._push(send), _disconnected(receive))
        finally:
            self._on_end()
            await self._chunks.aclose()

    async def _push(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self._chunks:
            # Waits for a slow reader, so that nothing piles up here.
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, Result]) -> Result | None:
    """The result of `work`, or None (and `work` cancelled) if the client goes away first. Read the body before."""
    return await _first(work, _disconnected(request.receive))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _first(work: Coroutine[Any, Any, Result], watch: Coroutine[Any, Any, None]) -> Result | None:
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(watch)
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
