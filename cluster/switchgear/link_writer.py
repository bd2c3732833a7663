"""The server's writing half of a rank's link: `LinkWriter`, which notices when the rank has stopped reading."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from switchgear_runtime.system import System

UNREAD_TIMEOUT_S = 20.0  # no byte taken for so long: a rank reads on a thread that nothing else holds up
_LOOK_S = 1.0


class LinkWriter:
    """Never blocks; how much may be unsent is the caller's to bound. `on_stuck(reason)` comes at most once."""

    def __init__(self, writer: asyncio.StreamWriter, *, system: System, on_stuck: Callable[[str], None]) -> None:
        self._writer = writer
        self._system = system
        self._on_stuck = on_stuck
        self._num_written = 0
        self._num_taken = 0  # by the kernel, when last looked
        self._progress_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_closing(self) -> bool:
        return self._writer.is_closing()

    def belongs_to(self, writer: asyncio.StreamWriter) -> bool:
        return self._writer is writer

    def write(self, data: bytes) -> None:
        self._writer.write(data)
        self._num_written += len(data)
        if self._timer is None and self._num_unsent:
            self._num_taken, self._progress_s = self._num_written - self._num_unsent, self._system.now()
            self._arm()

    def abort(self) -> None:
        """Close at once, whatever is unsent. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._writer.transport.abort()

    @property
    def _num_unsent(self) -> int:
        return self._writer.transport.get_write_buffer_size()

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(min(_LOOK_S, UNREAD_TIMEOUT_S / 2), self._look)

    def _look(self) -> None:
        self._timer = None
        num_unsent = self._num_unsent
        if num_unsent == 0 or self._writer.is_closing():
            return
        now_s = self._system.now()
        num_taken = self._num_written - num_unsent
        if num_taken > self._num_taken:
            self._num_taken, self._progress_s = num_taken, now_s
        elif now_s - self._progress_s >= UNREAD_TIMEOUT_S:
            self._on_stuck(
                f"it does not read its link: {num_unsent} bytes wait and none went in {UNREAD_TIMEOUT_S:g} s"
            )
            return
        self._arm()
