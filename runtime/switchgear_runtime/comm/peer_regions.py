"""All regions of one rank, of all its generations: `PeerRegions`.

A region is here before it is allocated, so that a generation which fails, in its rendezvous or later, leaves nothing
behind. Freed is what ended before the present generation, whose members have all unmapped it by the time they have met.
Ranks that are in it no more have died, and were seen gone, or were told to leave and may still map it: then it waits for
a generation after they have gone.
"""

from __future__ import annotations

from switchgear_runtime.comm.peer_region import PeerRegion


class PeerRegions:
    """For one thread."""

    def __init__(self) -> None:
        self._regions: list[PeerRegion] = []

    def add(self, region: PeerRegion) -> None:
        self._regions.append(region)

    def close(self) -> None:
        """At a generation's end, once this rank's device is through with it; waits for no peer."""
        for region in self._regions:
            region.close()

    def free(self) -> None:
        """When all ranks of the next have met, each of which has called `close`, and nobody else is left."""
        for region in self._regions:
            region.free()
        self._regions = []
