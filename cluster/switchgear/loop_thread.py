"""An asyncio loop on its own thread: `LoopThread`.

So that synchronous callers, and notebooks, whose own loop is taken, can use a Cluster.
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401 - closing at the interpreter's end is too late to load it, and may need it
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")

JOIN_TIMEOUT_S = 10.0


class LoopThread:
    """`call` runs a coroutine there and waits for it here."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, Result], timeout_s: float) -> Result:
        """The result. TimeoutError when `timeout_s` passed; then, and on KeyboardInterrupt, `work` is cancelled."""
        future: Future[Result] = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Idempotent."""
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(JOIN_TIMEOUT_S)
        if not self._thread.is_alive():
            self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
