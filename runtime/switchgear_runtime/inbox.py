"""The messages for one rank's engine: filled by the link's reader thread, drained between steps. Imports no torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from switchgear_runtime.system import System

M = TypeVar("M")


class Inbox(Generic[M]):
    """A queue with a deadline. `on_arrival`, when set, also sees each message at once, in the thread that put it:
    so the end of a generation can wake an engine that waits for a dead peer inside a collective."""

    def __init__(self, system: System) -> None:
        self._condition = system.condition()
        self._messages: list[M] = []
        self.on_arrival: Callable[[M], None] | None = None

    def put(self, message: M) -> None:
        with self._condition:
            self._messages.append(message)
            self._condition.notify_all()
        if self.on_arrival is not None:
            self.on_arrival(message)

    def drain_into(self, queue: deque[M]) -> bool:
        """Move all messages so far to the end of `queue`, oldest first; False when there are none."""
        if not self._messages:  # the common case of a busy step takes no lock
            return False
        with self._condition:
            messages, self._messages = self._messages, []
        queue.extend(messages)
        return True

    def wait(self, timeout_s: float) -> bool:
        """True once there is a message to drain; False when `timeout_s` passed first."""
        with self._condition:
            return self._condition.wait_for(lambda: bool(self._messages), timeout_s)
