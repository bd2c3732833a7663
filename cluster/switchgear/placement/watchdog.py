"""Is the placement controller alive: `Watchdog` knows when a decision was due and says when it is overdue.

A *round* is due at the end of each window of load: plan, and either keep the map or commit another. A balancer that
silently stopped looks just like one that is content, so readiness must show the difference. A round that failed is tried
again, even when no load brings another window: else one failure would be an alarm for ever on an idle cluster.
"""

from __future__ import annotations

FAILURES_MAX = 3  # in a row, until the alarm


class Watchdog:
    """`patience_s`: how long a round may take; `retry_s`: from a failure until the next attempt. Times are the
    caller's."""

    def __init__(self, patience_s: float, retry_s: float) -> None:
        self._patience_s = patience_s
        self._retry_s = retry_s
        self._due_s: float | None = None  # of the oldest round without an end
        self._stalled_s = 0.0
        self.retry_at_s: float | None = None  # None: no round has failed and is still due
        self._failures: list[str] = []  # since the last round that ended well
        self._broken: str | None = None
        self.num_rounds = 0  # that ended well

    def due(self, now_s: float) -> None:
        if self._due_s is None:
            self._due_s = now_s

    def done(self, now_s: float) -> None:
        """The round ended well: a map was committed, or there was no reason for another."""
        self._settle(now_s)
        self._failures.clear()
        self.num_rounds += 1

    def failed(self, now_s: float, reason: str) -> None:
        """The round is still due."""
        if self._due_s is not None:
            self.retry_at_s = now_s + self._retry_s
        self._failures = [*self._failures[-FAILURES_MAX + 1 :], reason]

    def broke(self, reason: str) -> None:
        """A bug: nothing is decided any more, and experts stay where they are."""
        self._broken = reason

    def pause(self, now_s: float) -> None:
        """No generation is whole: nobody could place anything."""
        self._settle(now_s)

    @property
    def overdue_at_s(self) -> float | None:
        return None if self._due_s is None else self._due_s + self._patience_s

    def stalled_s(self, now_s: float) -> float:
        """Seconds, since the start, in which a decision was overdue."""
        return self._stalled_s + self._overdue_s(now_s)

    def alarm(self, now_s: float) -> str | None:
        if self._broken is not None:
            return f"the placement controller broke: {self._broken}"
        last = f"; the last failure: {self._failures[-1]}" if self._failures else ""
        if self._overdue_s(now_s) > 0:
            assert self._due_s is not None
            return f"no placement decision for {now_s - self._due_s:.0f} s{last}"
        if len(self._failures) >= FAILURES_MAX:
            return f"the last {len(self._failures)} placement rounds failed{last}"
        return None

    def _overdue_s(self, now_s: float) -> float:
        return 0.0 if self._due_s is None else max(0.0, now_s - self._due_s - self._patience_s)

    def _settle(self, now_s: float) -> None:
        self._stalled_s += self._overdue_s(now_s)
        self._due_s = None
        self.retry_at_s = None
