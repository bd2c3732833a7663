"""The links between server and ranks in simulation: in order per link, each message late by a seeded delay."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from hashlib import blake2b

from sim_system import SimSystem


class SimNetwork:
    """One thread delivers everything, when its time has come."""

    def __init__(self, system: SimSystem, *, delay_s_max: float = 0.003, spike_s_max: float = 0.2) -> None:
        self._system = system
        self._delay_s_max = delay_s_max
        self._spike_s_max = spike_s_max
        self._condition = system.condition()
        self._queue: list[tuple[float, int, str, Callable[[], None]]] = []
        self._num_sent = 0
        self._last_s: dict[str, float] = {}

    def start(self) -> None:
        with self._system.process("network"):
            self._system.spawn("network", self._deliver_all)

    def send(self, link: str, data: bytes, deliver: Callable[[bytes], None]) -> None:
        """Deliver later than everything sent on `link` before."""
        spike = self._system.random.random() < 0.01
        delay_s = self._system.random.random() * (self._spike_s_max if spike else self._delay_s_max)
        at_s = max(self._last_s.get(link, 0.0), self._system.now() + delay_s)
        self._last_s[link] = at_s
        self._put(at_s, f"{link} {blake2b(data, digest_size=6).hexdigest()}", lambda: deliver(data))

    def after(self, delay_s: float, what: str, act: Callable[[], None]) -> None:
        """An event of the outside world, `delay_s` from now."""
        self._put(self._system.now() + delay_s, what, act)

    def _put(self, at_s: float, what: str, act: Callable[[], None]) -> None:
        with self._condition:
            self._num_sent += 1
            heapq.heappush(self._queue, (at_s, self._num_sent, what, act))
            self._condition.notify_all()

    def _deliver_all(self) -> None:
        while True:
            with self._condition:
                seen, now_s = self._num_sent, self._system.now()
                if not self._queue or self._queue[0][0] > now_s:
                    timeout_s = self._queue[0][0] - now_s if self._queue else None
                    self._condition.wait_for(lambda seen=seen: self._num_sent != seen, timeout_s)  # type: ignore[misc]
                    continue
                _, _, what, act = heapq.heappop(self._queue)
            self._system.note(f"delivers {what}")
            act()
