"""Telling whether a machine was ours alone while timing, and an advisory lock for hosts where others time things too."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil

_LOCK_HELD_S = 60.0
_IDLE_KINDS = {"idle", "iowait", "guest", "guest_nice"}  # of processor time; guests are within user time already
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


class OthersUse:
    """How much of a core all other processes of the machine, and those who share its host, took since this was made."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()
        self._others_s = _others_cpu_s()

    def cores(self) -> float:
        return max(0.0, (_others_cpu_s() - self._others_s) / max(time.monotonic() - self._start_s, 1e-3))


def _others_cpu_s() -> float:
    times = psutil.cpu_times()
    busy_s = sum(float(value) for kind, value in times._asdict().items() if kind not in _IDLE_KINDS)
    mine = psutil.Process().cpu_times()
    return busy_s - float(mine.user) - float(mine.system)
