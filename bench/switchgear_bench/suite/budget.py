"""What is left of the suite's time: `Budget`."""

from __future__ import annotations

import time

RESERVE_S = 5.0  # to end processes and write what is known


class Budget:
    """None: there is no end."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._end_s = None if seconds is None else time.monotonic() + seconds - RESERVE_S

    def left_s(self) -> float | None:
        return None if self._end_s is None else self._end_s - time.monotonic()

    def has(self, seconds: float) -> bool:
        left_s = self.left_s()
        return left_s is None or left_s >= seconds

    def limit(self, timeout_s: float) -> float:
        """As much, or what is left."""
        left_s = self.left_s()
        return timeout_s if left_s is None else max(0.0, min(timeout_s, left_s))

    def cuts(self, timeout_s: float) -> bool:
        """Whether it, and not `timeout_s`, is the limit."""
        return not self.has(timeout_s)
