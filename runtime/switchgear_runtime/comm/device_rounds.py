"""Waiting for all ranks' devices at once: `until_all_done`, rounds of marks over the hosts' transport.

A device's wait names nobody. So each rank watches its own for a short time, tells the others how it stands, and does so
again until all are done: who has died or hangs is named by the round itself, a device that is late by its rank's mark.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.errors import TransportTimeout

ROUND_S = 0.2  # a rank whose part is not complete asks the others so often
LATE, DONE, FAILED, EXPIRED = 0, 1, 2, 3  # a rank's mark in a round; EXPIRED: late, and its deadline has passed


def until_all_done(
    control: Transport, what: str, watch: Callable[[float], int], *, deadline_s: float, timeout_s: float
) -> list[int]:
    """Ranks whose part failed, after the first round in which any did; none: all are done. `watch(until_s)`: this rank's
    mark as soon as it is not LATE. TransportTimeout names the late at the deadline, by their numbers among all."""
    (own,) = among_all(control, [control.rank])
    while True:
        mark = watch(min(deadline_s, time.monotonic() + ROUND_S))
        if mark == LATE and time.monotonic() >= deadline_s:
            mark = EXPIRED  # told, so that all ranks stop in the same round
        remaining_s = max(1.0, deadline_s - time.monotonic())
        marks = [given[0] for given in control.all_gather(bytes([mark]), timeout_s=remaining_s)]
        if all(given == DONE for given in marks):
            return []
        failed = among_all(control, (place for place, given in enumerate(marks) if given == FAILED))
        if failed:
            return failed
        late = among_all(control, (place for place, given in enumerate(marks) if given in (LATE, EXPIRED)))
        if EXPIRED in marks:
            names = ", ".join(map(str, late))
            text = f"rank {own}: {what}: waited {timeout_s:.2f} s for the GPU of rank {names}"
            raise TransportTimeout(text, rank=own, peers=[peer for peer in late if peer != own])


def watch_event(is_done: Callable[[], bool]) -> Callable[[float], int]:
    """A `watch` of work that cannot fail on its own."""

    def watch(until_s: float) -> int:
        while not is_done():
            if time.monotonic() >= until_s:
                return LATE
            time.sleep(0)
        return DONE

    return watch


def among_all(control: Transport, places: Iterable[int]) -> list[int]:
    """Ranks as everybody knows them, also where `control` joins those of one host only (InsideHost)."""
    ranks: Sequence[int] = getattr(control, "ranks", range(control.world_size))
    return [ranks[place] for place in places]
