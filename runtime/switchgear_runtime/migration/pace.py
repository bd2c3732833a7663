"""A bound on what a background reader takes a second, and its way out: `Pace`. Imports no torch."""

from __future__ import annotations

from switchgear_runtime.system import System

# Shorter debts are let grow: every wait is a wake-up, with cold caches, that a step may have to make way for. What is
# copied meanwhile is bounded, since it takes memory bandwidth from the steps.
WAIT_S_MIN, WAIT_S_MAX, WAIT_BYTES = 0.01, 0.05, 4 << 20
BURST_S = 0.05  # what was not used for so long is lost, or a pause would be followed by a flood


class StagingCancelled(Exception):
    """Nobody wants these experts any more."""


class Pace:
    """Called after every piece that was read: waits until the next one is due. `cancel` ends the waits at once."""

    def __init__(self, system: System, bytes_per_s: int | None) -> None:
        self._system = system
        self._bytes_per_s = bytes_per_s
        self._condition = system.condition()
        self._due_s = system.now()
        self._cancelled = False
        self._unwaited_bytes = 0
        self.total_bytes = 0

    def __call__(self, num_bytes: int) -> None:
        """`num_bytes` were just read. Raises StagingCancelled."""
        self.total_bytes += num_bytes
        delay_s = 0.0
        if self._bytes_per_s:
            now_s = self._system.now()
            self._due_s = max(self._due_s, now_s - BURST_S) + num_bytes / self._bytes_per_s
            delay_s = self._due_s - now_s
        self._unwaited_bytes += num_bytes
        if delay_s >= (WAIT_S_MIN if self._unwaited_bytes >= WAIT_BYTES else WAIT_S_MAX):
            self._unwaited_bytes = 0
            with self._condition:
                self._condition.wait_for(lambda: self._cancelled, delay_s)
        if self._cancelled:
            raise StagingCancelled

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        """From any thread."""
        with self._condition:
            self._cancelled = True
            self._condition.notify_all()
