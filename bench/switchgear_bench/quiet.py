"""Holding an advisory lock while timing, for hosts where others time things too."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

_LOCK_HELD_S = 60.0
Item = TypeVar("Item")


def quietly(items: Iterable[Item], lock: Path | None) -> Iterator[Item]:
    """The items, one at a time, holding `lock` exclusively; let go of every minute, between two items, and at the end."""
    if lock is None:
        yield from items
        return
    with lock.open("a") as file:
        iterator = iter(items)
        held_until_s = 0.0
        while True:
            if time.monotonic() > held_until_s:
                fcntl.flock(file, fcntl.LOCK_UN)
                time.sleep(0.1)  # so that who waits for it gets it
                fcntl.flock(file, fcntl.LOCK_EX)
                held_until_s = time.monotonic() + _LOCK_HELD_S
            try:
                item = next(iterator)
            except StopIteration:
                return
            yield item
