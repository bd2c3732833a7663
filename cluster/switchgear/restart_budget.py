"""How much trouble a cluster puts up with: `RestartBudget`, setbacks within a sliding window."""

from __future__ import annotations

from collections import deque

from switchgear_runtime.system import System


class RestartBudget:
    """A setback is a restart, or a generation broken without a death."""

    def __init__(self, *, max_restarts: int, window_s: float, system: System) -> None:
        self._max_restarts = max_restarts
        self._window_s = window_s
        self._system = system
        self.setbacks: deque[float] = deque()  # times

    def take(self) -> bool:
        """Count one more; False when there have been too many."""
        now = self._system.now()
        while self.setbacks and self.setbacks[0] < now - self._window_s:
            self.setbacks.popleft()
        if len(self.setbacks) >= self._max_restarts:
            return False
        self.setbacks.append(now)
        return True

    def verdict(self, last: str) -> str:
        return (
            f"gave up after {self._max_restarts} restarts within {self._window_s:g} s "
            f"(max_restarts, restart_window_s); the last: {last}"
        )
