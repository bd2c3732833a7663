"""The C ABI of csrc/comm/shm.h: declarations, and `NativeChannel`, the only owner of a native handle."""

from __future__ import annotations

import ctypes
import functools
import mmap
from types import TracebackType

from switchgear_runtime import native
from switchgear_runtime.comm.transport import HEADER_BYTES_MAX, TransportStats
from switchgear_runtime.errors import PeerLost, TransportAborted, TransportError, TransportTimeout

IN_ROOM = 2**64 - 1
WORLD_SIZE_MAX = 64
_OK, _PEER_LOST, _TIMEOUT, _ABORTED, _NEEDS_ROOM, _REFUSED = range(6)
_ERRORS = {_PEER_LOST: PeerLost, _TIMEOUT: TransportTimeout, _ABORTED: TransportAborted}


class Exchange(ctypes.Structure):
    """Mirror of sg::comm::Exchange: arrays by rank."""

    _fields_ = [
        ("send", ctypes.POINTER(ctypes.c_void_p)),
        ("send_bytes", ctypes.POINTER(ctypes.c_uint64)),
        ("received_offset", ctypes.POINTER(ctypes.c_uint64)),
        ("received_bytes", ctypes.POINTER(ctypes.c_uint64)),
        ("room", ctypes.POINTER(ctypes.c_void_p)),
        ("room_bytes", ctypes.POINTER(ctypes.c_uint64)),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The core with the signatures of sg_shm_* declared. Its calls let go of the interpreter lock."""
    core = native.core()
    handle, u32, u64, i32, f64 = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int32, ctypes.c_double
    pointer = ctypes.c_void_p
    for name, result, arguments in (
        ("segment_bytes", u64, (u32, u64)),
        ("ready", i32, (pointer, u32, u64)),
        ("create", handle, (pointer, u32, u32, u64)),
        ("join", i32, (handle, ctypes.c_char_p, f64)),
        ("all_gather", i32, (handle, ctypes.c_char_p, u32, f64, pointer, pointer)),
        ("all_to_all_v", i32, (handle, pointer, f64)),
        ("barrier", i32, (handle, f64)),
        ("abort", None, (handle, ctypes.c_char_p)),
        ("close", None, (handle,)),
        ("free", None, (handle,)),
        ("failed_peers", u64, (handle,)),
        ("failed_text", ctypes.c_char_p, (handle,)),
        ("stats", None, (handle, pointer)),
        ("base", pointer, (handle,)),
        ("exchanger_create", handle, (handle,)),
        ("exchanger_free", None, (handle,)),
    ):
        function = getattr(core, f"sg_shm_{name}")
        function.restype = result
        function.argtypes = arguments
    return core


def segment_bytes(world_size: int, mailbox_bytes: int) -> int:
    return int(library().sg_shm_segment_bytes(world_size, mailbox_bytes))


def segment_ready(mapping: mmap.mmap, rank: int, world_size: int, mailbox_bytes: int) -> bool:
    """Whether rank 0 has written the segment's header. Raises TransportError if that disagrees with these arguments."""
    ready = library().sg_shm_ready(address_of(mapping), world_size, mailbox_bytes)
    if ready < 0:
        raise TransportError(
            f"rank 0 made this channel for another layout than world_size={world_size}, "
            f"mailbox_bytes={mailbox_bytes}; all ranks need the same settings and the same build",
            rank=rank,
            peers=(0,),
        )
    return bool(ready)


def address_of(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


class NativeChannel:
    """One rank's end of a channel over `mapping`, kept alive until it is closed. Statuses become exceptions here.

    `close` ends the calls that are inside; the handle itself is freed with this object, when none can be.
    """

    def __init__(self, mapping: mmap.mmap, *, rank: int, world_size: int, mailbox_bytes: int) -> None:
        self._library = library()
        self._mapping: mmap.mmap | None = mapping
        self._rank = rank
        self._world_size = world_size
        self._handle = self._library.sg_shm_create(address_of(mapping), rank, world_size, mailbox_bytes)
        if not self._handle:
            raise TransportError("out of memory for a transport handle", rank=rank)
        self._headers = (ctypes.c_ubyte * (world_size * HEADER_BYTES_MAX))()
        self._header_lengths = (ctypes.c_uint32 * world_size)()
        self._headers_view = memoryview(self._headers).cast("B")

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def handle(self) -> int:
        return int(self._handle)

    def __enter__(self) -> NativeChannel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()
            self._library.sg_shm_free(self._handle)
            self._handle = None

    def join(self, path: str, *, timeout_s: float) -> None:
        self._check(self._library.sg_shm_join(self._handle, path.encode(), timeout_s))

    def all_gather(self, header: bytes, *, timeout_s: float) -> list[bytes]:
        self._check(
            self._library.sg_shm_all_gather(
                self._handle, header, len(header), timeout_s, self._headers, self._header_lengths
            )
        )
        view = self._headers_view
        starts = range(0, len(view), HEADER_BYTES_MAX)
        return [bytes(view[start : start + length]) for start, length in zip(starts, self._header_lengths, strict=True)]

    def all_to_all_v(self, exchange: int, *, timeout_s: float) -> bool:
        """`exchange`: address of an Exchange. False when a message needs more room: enlarge it and call again, the same."""
        status = self._library.sg_shm_all_to_all_v(self._handle, exchange, timeout_s)
        if status == _NEEDS_ROOM:
            return False
        if status != _OK:
            self._check(status)
        return True

    def barrier(self, *, timeout_s: float) -> None:
        self._check(self._library.sg_shm_barrier(self._handle, timeout_s))

    def abort(self, reason: str) -> None:
        self._library.sg_shm_abort(self._handle, reason.encode(errors="replace"))

    def close(self) -> None:
        """Also after `__del__`: of objects that go as one cycle, the transport's may come later than its channel's."""
        if self._handle:
            self._library.sg_shm_close(self._handle)
        self._mapping = None

    def stats(self) -> TransportStats:
        counters = (ctypes.c_uint64 * 3)()
        self._library.sg_shm_stats(self._handle, counters)
        num_calls, sent_bytes, received_bytes = counters
        return TransportStats(num_calls=num_calls, sent_bytes=sent_bytes, received_bytes=received_bytes)

    def _check(self, status: int) -> None:
        if status == _OK:
            return
        mask = self._library.sg_shm_failed_peers(self._handle)
        peers = [peer for peer in range(self._world_size) if mask >> peer & 1]
        text = self._library.sg_shm_failed_text(self._handle).decode(errors="replace") or "out of memory"
        raise _ERRORS.get(status, TransportError)(f"rank {self._rank}: {text}", rank=self._rank, peers=peers)


class NativeExchanger:
    """An Exchanger of csrc/comm/exchanger.h over a channel, for other native code; its handle goes before the channel's."""

    def __init__(self, channel: NativeChannel) -> None:
        self._library = library()
        self._channel = channel  # kept: it must be freed after this
        self.handle = int(self._library.sg_shm_exchanger_create(channel.handle) or 0)
        if not self.handle:
            raise TransportError("out of memory for an exchanger", rank=channel.rank)

    def __del__(self) -> None:
        if getattr(self, "handle", 0):
            self._library.sg_shm_exchanger_free(self.handle)
            self.handle = 0
