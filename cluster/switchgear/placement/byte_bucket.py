"""The budget of migration: `ByteBucket`, a token bucket over bytes moved."""

from __future__ import annotations


class ByteBucket:
    """Fills at `bytes_per_s` up to what `horizon_s` gives; starts full. `bytes_per_s` None: no limit.

    Over any stretch of t seconds at most bytes_per_s * (t + horizon_s) are granted.
    """

    def __init__(self, bytes_per_s: int | None, horizon_s: float, now_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._capacity = 0.0 if bytes_per_s is None else bytes_per_s * horizon_s
        self._level = self._capacity
        self._at_s = now_s

    def available(self, now_s: float) -> int | None:
        """Bytes that may move now; None: any number."""
        if self._bytes_per_s is None:
            return None
        self._level = min(self._capacity, self._level + self._bytes_per_s * (now_s - self._at_s))
        self._at_s = now_s
        return max(0, int(self._level))

    def take(self, num_bytes: int, now_s: float) -> None:
        """Spend; an operator's own order may overdraw, and what follows waits for it."""
        if self.available(now_s) is not None:
            self._level -= num_bytes
