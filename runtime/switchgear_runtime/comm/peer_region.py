"""Memory of this rank that all ranks of a generation write to, and theirs as mapped here: `PeerRegion`.

For what crosses between devices without the host's doing (csrc/cuda/peer.cu), which needs addresses before the first step
and keeps them to the generation's end, and for the inboxes of peer_transport.py. Each generation has new regions. What
outlives one is a rank's `PeerRegions`.
"""

from __future__ import annotations

import logging

from switchgear_runtime.comm.peer_memory import PeerMemory
from switchgear_runtime.comm.transport import Transport

log = logging.getLogger(__name__)


class PeerRegion:
    """`own`: this rank's, zeros at first; `addresses`: of all ranks', as this rank sees them."""

    def __init__(self, memory: PeerMemory, rank: int) -> None:
        self._memory = memory
        self._rank = rank
        self.own = 0
        self.addresses: list[int] = []

    def meet(self, control: Transport, num_bytes: int, *, timeout_s: float) -> bool:
        """A rendezvous over `control`, whose errors pass through; all ranks ask for as much. False, on all ranks, where one
        cannot allocate or map: it has logged why."""
        handle = self._allocate(num_bytes)
        told = num_bytes.to_bytes(8, "little") + handle
        views = control.all_to_all_v([told] * control.world_size, timeout_s=timeout_s)
        can = bool(handle) and self._map_all([bytes(view) for view in views], num_bytes)
        # Also a barrier: nobody gives up a region that a peer is about to map.
        if all(given[0] for given in control.all_gather(bytes([can]), timeout_s=timeout_s)):
            return True
        self.close()
        control.barrier(timeout_s=timeout_s)
        self.free()
        return False

    def close(self) -> None:
        """Unmaps the others' regions, waiting for nobody, once this rank's device is through with them. Its own is `free`d
        when no peer maps it any more. Idempotent; what the driver raises passes through, and may be tried again."""
        while self.addresses:
            if len(self.addresses) - 1 != self._rank:
                self._memory.unmap(self.addresses[-1])
            self.addresses.pop()

    def free(self) -> None:
        """When nobody maps it: to free what another process still maps is undefined (CUDA, cudaIpcGetMemHandle).
        Idempotent."""
        own, self.own = self.own, 0
        if own:
            self._memory.free(own)

    def _allocate(self, num_bytes: int) -> bytes:
        """Its handle; empty: there is none."""
        try:
            self.own = self._memory.allocate(num_bytes)
            return self._memory.handle(self.own)
        except Exception as error:  # noqa: BLE001 - whatever a driver raises: other ways are left
            log.warning("rank %d: %d bytes of memory for its peers are not to be had: %s", self._rank, num_bytes, error)
            return b""

    def _map_all(self, told: list[bytes], num_bytes: int) -> bool:
        for peer, text in enumerate(told):
            theirs, handle = int.from_bytes(text[:8], "little"), text[8:]
            if theirs != num_bytes or not handle:
                log.warning("rank %d: rank %d has %d bytes for its peers, not %d", self._rank, peer, theirs, num_bytes)
                return False
            try:
                self.addresses.append(self.own if peer == self._rank else self._memory.map(handle, writable=True))
            except Exception as error:  # noqa: BLE001
                log.warning("rank %d: the device memory of rank %d cannot be mapped: %s", self._rank, peer, error)
                return False
        return True
