"""Device memory that ranks' processes map from each other: the `PeerMemory` protocol, and `CudaPeerMemory` over CUDA IPC by CuPy.

STATUS: has run on no GPU yet; the tests of its users run over host memory that passes for a device's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, ClassVar, Protocol

import torch

from switchgear_runtime.comm.beside_hosts import BesideHosts
from switchgear_runtime.comm.host_memory import HostPeerMemory
from switchgear_runtime.comm.transport import Transport

log = logging.getLogger(__name__)

IPC_BYTES = 1 << 21  # smaller allocations may share a block, and a handle would give others what lies beside them
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
            try:
                self._clear(address, num_bytes)
            except BaseException:
                self._runtime.free(address)
                raise
            return address

    def _clear(self, address: int, num_bytes: int) -> None:
        """Before a peer can write there."""
        self._runtime.memsetAsync(address, 0, num_bytes, torch.cuda.current_stream(self.device).cuda_stream)
        is_done, deadline_s = self.mark(), time.monotonic() + ZEROED_S
        while not is_done():
            if time.monotonic() >= deadline_s:
                raise TimeoutError(f"{self.device} did not clear {num_bytes} bytes within {ZEROED_S:g} s")
            time.sleep(0.0001)

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


def has_cupy() -> bool:
    """Whether it can be imported, too: what is there may be of another CUDA."""
    if find_spec("cupy") is None:
        return False
    try:
        import cupy  # noqa: F401
    except Exception as error:  # noqa: BLE001 - whatever a broken installation raises: other ways are left
        log.warning("CuPy is installed and cannot be imported: %s", error)
        return False
    return True


def peer_memory_between(transport: Transport, device: torch.device, *, timeout_s: float) -> PeerMemory | None:
    """By which the ranks of this transport map each other's memory, if all can; all ranks decide the same."""
    control = transport.control if isinstance(transport, BesideHosts) else transport
    kind = type(control).__name__
    if device.type != "cuda":
        return HostPeerMemory() if kind.startswith(("Shm", "Loopback")) else None
    can = kind.startswith("Shm") and has_cupy() and _all_are_peers(device)
    have = control.all_gather(bytes([can]), timeout_s=timeout_s)
    return CudaPeerMemory(device) if all(given[0] for given in have) else None


def _all_are_peers(device: torch.device) -> bool:
    """Those that this process sees; of the others mapping tells."""
    others = [index for index in range(torch.cuda.device_count()) if index != device.index]
    return all(torch.cuda.can_device_access_peer(device, other) for other in others)
