"""Ranks whose processes map each other's device memory: `PeerTransport`, over CUDA IPC by CuPy, on one host.

What NCCL refuses, several ranks on one GPU, works here, and so does any pair of GPUs that are peers. Each rank has an inbox
with a place for every source, twice: exchange n writes into its half while n - 1's may still be read. An exchange is
lengths over the hosts' transport (everybody is there; all see the largest, and grow their inboxes together when it does
not fit), copies straight into the peers' inboxes, and a barrier once this rank's copies have finished.

STATUS: has run on no GPU yet; its tests run over host memory that passes for a device's.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Protocol

import torch

from switchgear_runtime.comm.beside_hosts import BesideHosts, part_of
from switchgear_runtime.comm.device_exchange import Parts
from switchgear_runtime.comm.device_rounds import among_all
from switchgear_runtime.comm.host_memory import HostPeerMemory
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.errors import TransportTimeout

ALIGNMENT = 256
IPC_BYTES = 1 << 21  # smaller allocations may share a block, and a handle would give others what lies beside them
PLACE_BYTES_MIN = 1 << 16
NUM_HALVES = 2
ZEROED_S = 10.0
_DEVICE_TO_DEVICE = 3  # of cudaMemcpyKind
_LAZY_PEER_ACCESS = 1  # of cudaIpcMemLazyEnablePeerAccess


class PeerMemory(Protocol):
    """What is needed of a device and its driver; tests have one of host memory."""

    device: torch.device

    def allocate(self, num_bytes: int) -> int:
        """Zeros."""
        ...

    def free(self, address: int) -> None: ...

    def handle(self, address: int) -> bytes:
        """By which another process maps it."""
        ...

    def map(self, handle: bytes, *, writable: bool = False, num_bytes: int | None = None) -> int:
        """`num_bytes`: what it must have, where that can be told."""
        ...

    def unmap(self, address: int) -> None: ...

    def copy(self, to: int, source: int, num_bytes: int) -> None:
        """On the current stream."""
        ...

    def mark(self) -> Callable[[], bool]:
        """Tells whether what was enqueued before has finished."""
        ...


class CudaPeerMemory:
    """CuPy's runtime calls, on torch's current stream. Its pools are not used: IPC handles are of whole allocations."""

    _of_process: ClassVar[dict[bytes, tuple[torch.device, int]]] = {}  # by handle: a process cannot map its own
    _lock: ClassVar[threading.Lock] = threading.Lock()  # of it: ranks may be threads

    def __init__(self, device: torch.device) -> None:
        import cupy

        self.device = device
        self._runtime: Any = cupy.cuda.runtime

    def allocate(self, num_bytes: int) -> int:
        with torch.cuda.device(self.device):
            address = int(self._runtime.malloc(-(-num_bytes // IPC_BYTES) * IPC_BYTES))
            self._runtime.memsetAsync(address, 0, num_bytes, torch.cuda.current_stream(self.device).cuda_stream)
            is_done, deadline_s = self.mark(), time.monotonic() + ZEROED_S
            while not is_done():  # before a peer can write there
                if time.monotonic() >= deadline_s:
                    raise TimeoutError(f"{self.device} did not clear {num_bytes} bytes within {ZEROED_S:g} s")
                time.sleep(0.0001)
            return address

    def free(self, address: int) -> None:
        with self._lock:
            for handle in [handle for handle, (_, own) in self._of_process.items() if own == address]:
                del self._of_process[handle]
        with torch.cuda.device(self.device):
            self._runtime.free(address)

    def handle(self, address: int) -> bytes:
        with torch.cuda.device(self.device):
            handle = bytes(self._runtime.ipcGetMemHandle(address))
        with self._lock:
            self._of_process[handle] = (self.device, address)
        return handle

    def map(
        self,
        handle: bytes,
        *,
        writable: bool = False,  # noqa: ARG002 - IPC knows no other access
        num_bytes: int | None = None,  # noqa: ARG002 - nor a size
    ) -> int:
        """OSError for memory of this process on another device, which only ranks as threads could ask for."""
        with self._lock:
            device, address = self._of_process.get(handle, (self.device, 0))
        if device != self.device:
            raise OSError(f"it is this process's own, on {device}")
        if address:
            return address
        with torch.cuda.device(self.device):
            return int(self._runtime.ipcOpenMemHandle(handle, _LAZY_PEER_ACCESS))

    def unmap(self, address: int) -> None:
        with self._lock:
            is_own = any(address == own for _, own in self._of_process.values())
        if not is_own:
            with torch.cuda.device(self.device):  # any thread
                self._runtime.ipcCloseMemHandle(address)

    def copy(self, to: int, source: int, num_bytes: int) -> None:
        stream = torch.cuda.current_stream(self.device).cuda_stream
        self._runtime.memcpyAsync(to, source, num_bytes, _DEVICE_TO_DEVICE, stream)

    def mark(self) -> Callable[[], bool]:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event.query


def peer_memory_over(transport: Transport, device: torch.device, *, timeout_s: float) -> PeerMemory | None:
    """By which the ranks of this transport map each other's memory, if all can; all ranks decide the same."""
    control = transport.control if isinstance(transport, BesideHosts) else transport
    kind = type(control).__name__
    if device.type != "cuda":
        return HostPeerMemory() if kind.startswith(("Shm", "Loopback")) else None
    can = kind.startswith("Shm") and find_spec("cupy") is not None and _all_are_peers(device)
    have = control.all_gather(bytes([can]), timeout_s=timeout_s)
    return CudaPeerMemory(device) if all(given[0] for given in have) else None


def _all_are_peers(device: torch.device) -> bool:
    """Those that this process sees; of the others mapping tells."""
    others = [index for index in range(torch.cuda.device_count()) if index != device.index]
    return all(torch.cuda.can_device_access_peer(device, other) for other in others)


def over_peer_memory(control: Transport, device: torch.device, *, timeout_s: float) -> Transport:
    """`control` with peer memory beside it; `control` itself unless every rank has CuPy and is on this host."""
    if not getattr(control, "is_one_host", False):
        return control
    have = control.all_gather(bytes([find_spec("cupy") is not None]), timeout_s=timeout_s)
    if not all(given[0] for given in have):
        return control
    return PeerTransport(control, CudaPeerMemory(device))


class PeerTransport(BesideHosts):
    """A Transport, by `control`, and a DeviceExchange. The first exchange makes the inboxes."""

    def __init__(self, control: Transport, memory: PeerMemory) -> None:
        super().__init__(control)
        self._memory = memory
        self._place_bytes = 0  # of an inbox: what one source may write in one half
        self._inbox = 0
        self._inboxes: list[int] = []  # of all ranks, as mapped here
        self._half = 0

    def exchange(self, send: Sequence[Parts], *, timeout_s: float) -> list[Parts]:
        """As DeviceExchange. On the current stream; returns when every rank's copies have arrived."""
        deadline_s = time.monotonic() + timeout_s
        with self._giving_up():
            lengths_RRP = self._all_lengths(send, timeout_s)
            self._make_room(max(map(_places_bytes, (row for rows in lengths_RRP for row in rows))), timeout_s)
            self._half = (self._half + 1) % NUM_HALVES
            for peer in range(self.world_size):
                at = self._place(self._inboxes[peer], self.rank)
                for parts in send:
                    begin, end = part_of(parts, peer)
                    if end > begin:
                        self._memory.copy(at, parts.data.data_ptr() + begin, end - begin)
                    at += _aligned(end - begin)
            self._finish(self._memory.mark(), deadline_s, timeout_s)
            self._control.barrier(timeout_s=max(1.0, deadline_s - time.monotonic()))
            received = self._take([rows[self.rank] for rows in lengths_RRP])
        self._count(send, received)
        return received

    def _all_lengths(self, send: Sequence[Parts], timeout_s: float) -> list[list[tuple[int, ...]]]:
        """[source][destination][part]: of all ranks, so that all grow together."""
        mine = [[end - begin for begin, end in pairwise(parts.offsets)] for parts in send]
        num_parts, world_size = len(send), self.world_size
        row = struct.pack(f"<{num_parts * world_size}Q", *(n for peer in zip(*mine, strict=True) for n in peer))
        told = self._control.all_to_all_v([row] * world_size, timeout_s=timeout_s)
        return [list(struct.iter_unpack(f"<{num_parts}Q", view)) for view in told]

    def _take(self, lengths_RP: Sequence[tuple[int, ...]]) -> list[Parts]:
        """Copies what came out of this rank's inbox, source after source."""
        received = []
        for part in range(len(lengths_RP[0])):
            starts = list(accumulate((lengths[part] for lengths in lengths_RP), initial=0))
            data = torch.empty(starts[-1], dtype=torch.uint8, device=self._memory.device)
            for source, lengths in enumerate(lengths_RP):
                at = self._place(self._inbox, source) + sum(map(_aligned, lengths[:part]))
                if lengths[part]:
                    self._memory.copy(data.data_ptr() + starts[source], at, lengths[part])
            received.append(Parts(data, starts))
        return received

    def _place(self, inbox: int, source: int) -> int:
        return inbox + (self._half * self.world_size + source) * self._place_bytes

    def _make_room(self, num_bytes: int, timeout_s: float) -> None:
        """All ranks at once: they have seen the same lengths."""
        if self._inboxes and num_bytes <= self._place_bytes:
            return
        # What was taken from the old inboxes has left them, nobody writes there any more, and nobody maps them: to free
        # what another process still maps is undefined (CUDA, cudaIpcGetMemHandle).
        self._finish(self._memory.mark(), time.monotonic() + timeout_s, timeout_s)
        old = self._inbox
        self._give_up()
        self._control.barrier(timeout_s=timeout_s)
        if old:
            self._memory.free(old)
        self._place_bytes = max(PLACE_BYTES_MIN, 1 << (num_bytes - 1).bit_length())
        self._inbox = self._memory.allocate(NUM_HALVES * self.world_size * self._place_bytes)
        handle = self._memory.handle(self._inbox)
        told = self._control.all_to_all_v([handle] * self.world_size, timeout_s=timeout_s)
        handles = [bytes(view) for view in told]
        for peer in range(self.world_size):
            self._inboxes.append(self._inbox if peer == self.rank else self._memory.map(handles[peer], writable=True))
        self._control.barrier(timeout_s=timeout_s)  # nobody gives up an inbox that a peer is about to map

    def _finish(self, is_done: Callable[[], bool], deadline_s: float, timeout_s: float) -> None:
        while not is_done():
            if time.monotonic() >= deadline_s:
                (own,) = among_all(self._control, [self.rank])
                text = f"rank {own}: exchange: waited {timeout_s:.2f} s for this rank's own GPU"
                raise TransportTimeout(text, rank=own)
            time.sleep(0)

    def _give_up(self) -> None:
        """Unmaps the peers' inboxes. Its own may still be mapped by a peer that closes later or hangs, and this waits for
        nobody: it goes with the process."""
        for peer, address in enumerate(self._inboxes):
            if peer != self.rank:
                self._memory.unmap(address)
        self._inboxes = []
        self._inbox = self._place_bytes = 0


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _places_bytes(lengths_P: Sequence[int]) -> int:
    """Of all parts from one rank to one other."""
    return sum(map(_aligned, lengths_P))
