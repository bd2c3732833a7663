"""Clock, randomness and threads as one argument, so that a simulation can replace them.

Everything in switchgear that waits, draws or spawns does so through a `System`. `RealSystem` is the operating
system; `tests/sim` has `SimSystem`, where one thread runs at a time and a seed chooses the next at every call, so that a
failing run replays exactly (FoundationDB's and TigerBeetle's method).
"""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections.abc import Callable
from typing import Protocol


class Task(Protocol):
    """A spawned thread."""

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; False when `timeout_s` passed first."""
        ...


class Condition(Protocol):
    """What threads wait on: a lock with predicates. `with condition:` guards the state that `ready` reads."""

    def __enter__(self) -> object: ...

    def __exit__(self, *exc: object) -> None: ...

    def wait_for(self, ready: Callable[[], bool], timeout_s: float | None) -> bool:
        """Call with the lock held. True once `ready()`; False when `timeout_s` passed first."""
        ...

    def notify_all(self) -> None:
        """Call with the lock held."""
        ...


class System(Protocol):
    """The outside world of one process (or of a whole simulated cluster)."""

    def now(self) -> float:
        """Monotonic seconds."""
        ...

    def sleep(self, duration_s: float) -> None: ...

    def condition(self) -> Condition: ...

    def spawn(self, name: str, run: Callable[[], None]) -> Task: ...

    def randbits(self, num_bits: int) -> int: ...


class _RealCondition:
    def __init__(self) -> None:
        self._condition = threading.Condition()

    def __enter__(self) -> object:
        return self._condition.__enter__()

    def __exit__(self, *exc: object) -> None:
        self._condition.release()

    def wait_for(self, ready: Callable[[], bool], timeout_s: float | None) -> bool:
        return self._condition.wait_for(ready, timeout_s)

    def notify_all(self) -> None:
        self._condition.notify_all()


class _RealTask:
    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread

    def join(self, timeout_s: float | None = None) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


class RealSystem:
    """The operating system. `seed` makes `randbits` repeatable (tests)."""

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed) if seed is not None else None

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, duration_s: float) -> None:
        time.sleep(duration_s)

    def condition(self) -> Condition:
        return _RealCondition()

    def spawn(self, name: str, run: Callable[[], None]) -> Task:
        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        return _RealTask(thread)

    def randbits(self, num_bits: int) -> int:
        return self._random.getrandbits(num_bits) if self._random else secrets.randbits(num_bits)
