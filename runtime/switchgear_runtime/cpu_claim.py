"""CPUs for one rank alone: `claim_cpus` finds free ones and binds the calling thread, and all it starts, to them.

A claim is the name of an abstract Unix socket (`man 7 unix`): one owner on a host (more exactly, in a network
namespace), and gone with its process, however that ends. Two clusters on one host therefore never bind to the same CPU.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable

_NAME = "\0switchgear-cpu-{cpu}"


class CpuClaim:
    """Holds its CPUs until `release`, or until the process ends."""

    def __init__(self, sockets: dict[int, socket.socket], before: set[int]) -> None:
        """Use `claim_cpus`."""
        self._sockets = sockets
        self._before = before

    @property
    def cpus(self) -> set[int]:
        return set(self._sockets)

    def release(self) -> None:
        """The calling thread may run anywhere again that it could before."""
        for held in self._sockets.values():
            held.close()
        self._sockets = {}
        os.sched_setaffinity(0, self._before)


def claim_cpus(num_cpus: int, *, num_ranks: int) -> CpuClaim | None:
    """`num_cpus` for each of `num_ranks` ranks; None, and nothing bound, if the CPUs do not suffice for all of them, if
    there is no choice to make, or if others hold too many."""
    before = os.sched_getaffinity(0)
    if num_cpus * num_ranks > len(before) or num_cpus == len(before):
        return None
    sockets = _bind(sorted(before), num_cpus)
    if len(sockets) < num_cpus:
        for held in sockets.values():
            held.close()
        return None
    os.sched_setaffinity(0, set(sockets))
    return CpuClaim(sockets, before)


def _bind(cpus: Iterable[int], num_cpus: int) -> dict[int, socket.socket]:
    sockets: dict[int, socket.socket] = {}
    for cpu in cpus:
        if len(sockets) == num_cpus:
            break
        candidate = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            candidate.bind(_NAME.format(cpu=cpu))
        except OSError:  # another rank's
            candidate.close()
        else:
            sockets[cpu] = candidate
    return sockets
