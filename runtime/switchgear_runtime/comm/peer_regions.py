"""All regions of one rank, of all its generations: `PeerRegions`.

A region is here before it is allocated, so that a generation which fails, in its rendezvous or later, leaves nothing
behind. Once the ranks of a generation have met, each has unmapped what ended before. Of those that are in it no more, the
dead were seen gone; one that was told to leave may still run and map the regions of the generation that it was in last,
so these wait for a generation that begins when it is gone.
"""

from __future__ import annotations

from switchgear_runtime.comm.peer_region import PeerRegion
from switchgear_runtime.generation import GenerationDescriptor


class PeerRegions:
    """For one thread."""

    def __init__(self) -> None:
        self._regions: list[PeerRegion] = []
        self._kept: list[tuple[int, PeerRegion]] = []  # with the generation in which all that map it have met since

    def add(self, region: PeerRegion) -> None:
        self._regions.append(region)

    def close(self) -> None:
        """At a generation's end, once this rank's device is through with it; waits for no peer. As PeerRegion's."""
        for region in self._regions:
            region.close()

    def free(self, descriptor: GenerationDescriptor | None) -> None:
        """When all ranks of a generation have met, each of which has called `close` before. None: who knows who is left;
        everything is kept."""
        if descriptor is None:
            return
        ended = [*self._kept, *((descriptor.generation, region) for region in self._regions)]
        self._kept = [(generation, region) for generation, region in ended if generation > descriptor.settled]
        self._regions = []
        for generation, region in ended:
            if generation <= descriptor.settled:
                region.free()
