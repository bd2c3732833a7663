"""The inbox: order, deadlines, and the early look at each message."""

from __future__ import annotations

import time
from collections import deque

from switchgear_runtime.inbox import Inbox
from switchgear_runtime.system import RealSystem


def test_order_and_deadline() -> None:
    system = RealSystem()
    inbox: Inbox[int] = Inbox(system)
    started = time.monotonic()
    assert not inbox.wait(0.05)
    assert time.monotonic() - started >= 0.05
    queue: deque[int] = deque()
    assert not inbox.drain_into(queue)
    seen: list[int] = []
    inbox.on_arrival = seen.append
    task = system.spawn("writer", lambda: [inbox.put(number) for number in range(1000)] and None)
    while len(queue) < 1000:
        assert inbox.wait(5.0)
        assert inbox.drain_into(queue)
    assert task.join(5.0)
    assert list(queue) == seen == list(range(1000))
