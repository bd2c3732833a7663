"""Ranks as processes of one host: `ShmTransport` over one shared mapping (csrc/comm/layout.h explains it).

A message up to `mailbox_bytes` is copied once, by its sender, and read in place. A longer one goes in pieces and is put
together in a private buffer of the receiver.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Sequence
from types import TracebackType

from switchgear_runtime.comm.segment import channel_path, create_segment, open_segment, unlink_channel
from switchgear_runtime.comm.shm_native import (
    IN_ROOM,
    WORLD_SIZE_MAX,
    Exchange,
    NativeChannel,
    address_of,
    segment_bytes,
    segment_ready,
)
from switchgear_runtime.comm.transport import HEADER_BYTES_MAX, TransportStats
from switchgear_runtime.errors import ConfigError, TransportAborted

MAILBOX_BYTES_MAX = 1 << 36


class _PyBuffer(ctypes.Structure):
    """Py_buffer of the stable ABI: the address of any bytes-like object, read-only ones included."""

    _fields_ = [
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    ]


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.c_void_p, ctypes.c_int)
_get_buffer.restype = ctypes.c_int
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.c_void_p,)
_release_buffer.restype = None
_CONTIGUOUS = 0  # PyBUF_SIMPLE
_Byte = ctypes.c_char
_address = ctypes.addressof


class _Exchanges:
    """The arguments of all_to_all_v for every second call: its arrays, and room for long messages. Room only grows."""

    def __init__(self, world_size: int, mailbox_bytes: int) -> None:
        self._mailbox_bytes = mailbox_bytes
        pointers, numbers = ctypes.c_void_p * world_size, ctypes.c_uint64 * world_size
        send, room = pointers(), pointers()
        send_bytes, received_offset, received_bytes, room_bytes = (numbers() for _ in range(4))
        self._arguments = Exchange(send, send_bytes, received_offset, received_bytes, room, room_bytes)
        self.pointer = ctypes.addressof(self._arguments)
        # Memoryviews of the arrays: their items cost half of what a ctypes array's do.
        self.starts, self.lengths, self._offsets, self._received_bytes, self._room, self._room_bytes = (
            memoryview(array).cast("B").cast("Q")
            for array in (send, send_bytes, received_offset, received_bytes, room, room_bytes)
        )
        self._views: list[memoryview] = [memoryview(b"")] * world_size

    def make_room(self) -> None:
        for peer, num_bytes in enumerate(self._received_bytes):
            if num_bytes <= max(self._mailbox_bytes, self._room_bytes[peer]):
                continue
            num_bytes = max(num_bytes, min(2 * self._room_bytes[peer], num_bytes + (64 << 20)))
            buffer = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._room[peer] = address_of(buffer)
            self._room_bytes[peer] = num_bytes
            self._views[peer] = memoryview(buffer).toreadonly()

    def view(self, peer: int, segment: memoryview) -> memoryview:
        start, num_bytes = self._offsets[peer], self._received_bytes[peer]
        return self._views[peer][:num_bytes] if start == IN_ROOM else segment[start : start + num_bytes]


class ShmTransport:
    """One rank's end. Constructing it is the rendezvous: it returns once all ranks have mapped the segment.

    Views that all_to_all_v returned stay readable after close(): the mapping goes with the last of them.
    """

    is_one_host = True  # peer memory works

    def __init__(self, channel: str, rank: int, world_size: int, mailbox_bytes: int, timeout_s: float) -> None:
        if not 1 <= world_size <= WORLD_SIZE_MAX:
            raise ConfigError(f"world_size={world_size} must be 1 to {WORLD_SIZE_MAX} for the shm transport")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank} must be 0 to {world_size - 1}")
        if not 1 <= mailbox_bytes <= MAILBOX_BYTES_MAX:
            raise ConfigError(f"mailbox_bytes={mailbox_bytes} must be 1 to {MAILBOX_BYTES_MAX}")
        self._rank = rank
        self._world_size = world_size
        self._peers = [peer for peer in range(world_size) if peer != rank]
        self._exchanges = (_Exchanges(world_size, mailbox_bytes), _Exchanges(world_size, mailbox_bytes))
        self._buffers = (_PyBuffer * world_size)()
        self._buffer_pointers = [ctypes.addressof(buffer) for buffer in self._buffers]
        self._native: NativeChannel | None = None
        self._segment: memoryview | None = None
        deadline = time.monotonic() + timeout_s
        num_bytes = segment_bytes(world_size, mailbox_bytes)
        mapping = create_segment(channel, num_bytes, rank=rank) if rank == 0 else None
        try:
            if mapping is None:

                def ready(mapping: mmap.mmap) -> bool:
                    return segment_ready(mapping, rank, world_size, mailbox_bytes)

                mapping = open_segment(channel, num_bytes, rank=rank, timeout_s=timeout_s, ready=ready)
            self._segment = memoryview(mapping).toreadonly()
            self._native = NativeChannel(mapping, rank=rank, world_size=world_size, mailbox_bytes=mailbox_bytes)
            self._native.join(str(channel_path(channel)), timeout_s=deadline - time.monotonic())
        except BaseException:
            self.close()
            unlink_channel(channel)  # the channel cannot become whole any more
            raise

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    @property
    def channel(self) -> NativeChannel:
        """For native code, good until `close`. No two calls on it may overlap."""
        channel, _ = self._open()
        return channel

    def __enter__(self) -> ShmTransport:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_native", None) is not None:
            self.close()

    def all_gather(self, header: bytes, *, timeout_s: float) -> list[bytes]:
        if len(header) > HEADER_BYTES_MAX:
            raise ValueError(f"header has {len(header)} bytes, at most {HEADER_BYTES_MAX} fit")
        channel, _ = self._open()
        return channel.all_gather(header, timeout_s=timeout_s)

    def all_to_all_v(self, send: Sequence[memoryview | bytes], *, timeout_s: float) -> list[memoryview]:
        if len(send) != self._world_size:
            raise ValueError(f"send has {len(send)} messages, expected one for each of {self._world_size} ranks")
        channel, segment = self._open()
        own = memoryview(send[self._rank])
        if own.ndim != 1 or own.format != "B":
            own = own.cast("B")
        exchange, other = self._exchanges
        starts, lengths = exchange.starts, exchange.lengths
        held: list[object] = []  # keep the messages where they are
        num_buffers = 0
        try:
            for peer in self._peers:
                message = send[peer]
                if type(message) is memoryview and not message.readonly and message.nbytes:
                    first = _Byte.from_buffer(message)  # half the price of what is below
                    held.append(first)
                    starts[peer], lengths[peer] = _address(first), message.nbytes
                else:
                    _get_buffer(message, self._buffer_pointers[num_buffers], _CONTIGUOUS)
                    buffer = self._buffers[num_buffers]
                    num_buffers += 1
                    starts[peer], lengths[peer] = buffer.buf or 0, buffer.len
            while not channel.all_to_all_v(exchange.pointer, timeout_s=timeout_s):
                exchange.make_room()
        finally:
            for pointer in self._buffer_pointers[:num_buffers]:
                _release_buffer(pointer)
        self._exchanges = (other, exchange)  # this call's room is next written by the second-next call
        views = [own.toreadonly()] * self._world_size
        for peer in self._peers:
            views[peer] = exchange.view(peer, segment)
        return views

    def barrier(self, *, timeout_s: float) -> None:
        channel, _ = self._open()
        channel.barrier(timeout_s=timeout_s)

    def abort(self, reason: str) -> None:
        if self._native is not None:
            self._native.abort(reason)

    def close(self) -> None:
        if self._native is not None:
            self._native.close()
        self._segment = None

    def stats(self) -> TransportStats:
        if self._native is None:  # the constructor failed
            return TransportStats(num_calls=0, sent_bytes=0, received_bytes=0)
        return self._native.stats()

    def _open(self) -> tuple[NativeChannel, memoryview]:
        channel, segment = self._native, self._segment  # read once: close may come from another thread
        if channel is None or segment is None:
            raise TransportAborted(f"rank {self._rank}: this transport is closed", rank=self._rank)
        return channel, segment
