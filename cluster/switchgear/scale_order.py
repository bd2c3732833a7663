"""One change of the number of ranks, for the caller who waits for its end: `ScaleOrder`."""

from __future__ import annotations

import asyncio

from switchgear.actions import Scaled, ScaleFailed
from switchgear_runtime.errors import RankFailed


class ScaleOrder:
    """The controller refuses a second one while one is under way, and ends each with Scaled or ScaleFailed, within
    deadlines of its own: to load, to enter a generation, to leave."""

    def __init__(self) -> None:
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def take(self, result: Scaled | ScaleFailed) -> None:
        if self._done.done():
            return
        if isinstance(result, Scaled):
            self._done.set_result(None)
        else:
            self._done.set_exception(RankFailed(result.reason))
            self._done.exception()  # seen, should the caller have gone

    async def wait(self) -> None:
        """RankFailed if the number of ranks stays another. A caller that goes away changes nothing."""
        await asyncio.shield(self._done)
