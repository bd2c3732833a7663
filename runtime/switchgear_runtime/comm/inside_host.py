"""The ranks of one host of a HierarchicalTransport: `InsideHost`, a Transport of its own over their shared memory.

It waits for nobody on other hosts. The two are one channel all the same: an error in either ends both, and whom it blames
is told by the ranks' numbers among all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from switchgear_runtime.comm.transport import TransportStats

if TYPE_CHECKING:
    from switchgear_runtime.comm.hierarchical import HierarchicalTransport


class InsideHost:
    """A Transport by places: place p is rank ranks[p] among all. Closing it closes nothing."""

    is_one_host = True  # peer memory works

    def __init__(self, whole: HierarchicalTransport, ranks: Sequence[int]) -> None:
        self._whole = whole
        self.ranks = tuple(ranks)

    @property
    def rank(self) -> int:
        return self.ranks.index(self._whole.rank)

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    def all_gather(self, header: bytes, *, timeout_s: float) -> list[bytes]:
        return self._whole.call_inside(lambda inside: inside.all_gather(header, timeout_s=timeout_s))

    def all_to_all_v(self, send: Sequence[memoryview | bytes], *, timeout_s: float) -> list[memoryview]:
        return self._whole.call_inside(lambda inside: inside.all_to_all_v(send, timeout_s=timeout_s))

    def barrier(self, *, timeout_s: float) -> None:
        self._whole.call_inside(lambda inside: inside.barrier(timeout_s=timeout_s))

    def abort(self, reason: str) -> None:
        self._whole.abort(reason)

    def close(self) -> None:
        """The whole has an owner of its own."""

    def stats(self) -> TransportStats:
        """Nothing: the whole counts these bytes."""
        return TransportStats(num_calls=0, sent_bytes=0, received_bytes=0)
