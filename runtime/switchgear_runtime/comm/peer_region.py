"""Memory of this rank that all ranks of a generation write to, and theirs as mapped here: `PeerRegion`.

What crosses between devices without the host's doing (csrc/cuda/peer.cu) needs addresses before the first step and keeps
them to the generation's end. Each generation has new regions: a rank that was declared dead has been seen gone by then.
"""

from __future__ import annotations

from switchgear_runtime.comm.peer_memory import PeerMemory
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.errors import TransportError


class PeerRegion:
    """Constructing it is a rendezvous over `control`, whose errors pass through; all ranks give the same `num_bytes`."""

    def __init__(self, control: Transport, memory: PeerMemory, num_bytes: int, *, timeout_s: float) -> None:
        self._memory = memory
        self._rank = control.rank
        self.own = memory.allocate(num_bytes)  # zeros
        self.addresses: list[int] = []  # of all ranks' regions, as this rank sees them
        try:
            handle = memory.handle(self.own)
            handles = [bytes(view) for view in control.all_to_all_v([handle] * control.world_size, timeout_s=timeout_s)]
            for peer, given in enumerate(handles):
                self.addresses.append(self.own if peer == self._rank else self._map(peer, given))
            control.barrier(timeout_s=timeout_s)  # nobody gives up a region that a peer is about to map
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unmaps the others' regions, waiting for nobody, once this rank's kernels have finished. Idempotent. Its own is
        `free`d when no peer maps it any more."""
        for peer, address in enumerate(self.addresses):
            if peer != self._rank:
                self._memory.unmap(address)
        self.addresses = []

    def free(self) -> None:
        """After a later rendezvous of all who are left, each of which closed its end before: to free what another process
        still maps is undefined (CUDA, cudaIpcGetMemHandle). Idempotent."""
        own, self.own = self.own, 0
        if own:
            self._memory.free(own)

    def _map(self, peer: int, handle: bytes) -> int:
        try:
            return self._memory.map(handle, writable=True)
        except (OSError, RuntimeError) as error:
            text = f"rank {self._rank}: the device memory of rank {peer} cannot be mapped: {error}"
            raise TransportError(text, rank=self._rank, peers=[peer]) from error
