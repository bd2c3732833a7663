"""One file of blobs that several processes fill and map: `BlobFile`.

    header   magic, length, JSON: the key, and the name and length of every blob. Compared as a whole, never parsed.
    states   16 bytes a blob: u64 state, u32 CRC-32 of the data, u32 unused
    data     each blob at a multiple of 4096; allocated on disk when it is filled

A blob's state is 0 (absent), DURABLE, or the token of the boot it was written in. A token is trusted in that boot alone:
the page cache then has what was written, whoever was killed since. After a power cut the state may be on the disk and
the data not, but then the boot is another one. `make_durable` syncs the data and only then writes DURABLE.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import json
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from switchgear_runtime.model import byte_lock

MAGIC = b"switchgear weights 1\n\0\0\0"
ALIGNMENT = 4096
_POPULATE_READ = 22  # MADV_POPULATE_READ, which the mmap module has no name for
DURABLE = 1
FREE_BYTES_MIN = 1 << 30  # we leave a disk that much room
SYNC_BYTES_MAX = 32 << 20  # at a time: a process that waits for the disk cannot even be killed
_STATE = struct.Struct("<Q")
_STATE_BYTES = 16
_MS_SYNC = 4
MAP_BYTES_MAX = 1 << 20  # a multiple of a page

Pace = Callable[[int], None]  # told of the bytes of each piece; may wait, and may raise


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies. The same header gives the same layout."""

    header: bytes
    names: dict[str, int]  # name -> index
    starts: list[int]
    lengths: list[int]
    num_bytes: int

    @classmethod
    def of(cls, key: Mapping[str, str], blobs: Mapping[str, int]) -> Layout:
        text = json.dumps({"key": dict(key), "blobs": list(blobs.items())}, separators=(",", ":")).encode()
        header = MAGIC + _STATE.pack(len(text)) + text
        start = _aligned(_aligned(len(header)) + _STATE_BYTES * len(blobs))
        starts = []
        for length in blobs.values():
            starts.append(start)
            start = _aligned(start + length)
        return cls(header, {name: index for index, name in enumerate(blobs)}, starts, list(blobs.values()), start)

    def digest(self) -> str:
        return hashlib.sha256(self.header).hexdigest()[:16]

    def state_offset(self, index: int) -> int:
        return _aligned(len(self.header)) + _STATE_BYTES * index


class BlobFile:
    """An open file. Blobs go by index. Any number of processes may have one; a lock is this object's, not a
    thread's."""

    def __init__(self, descriptor: int, layout: Layout) -> None:
        """Takes the descriptor over."""
        self._descriptor = descriptor
        self.layout = layout
        self._boot = boot_token()
        self._mapping = mmap.mmap(descriptor, layout.num_bytes, access=mmap.ACCESS_READ)
        self._address = np.frombuffer(self._mapping, dtype=np.uint8).ctypes.data
        self._residence = ctypes.create_string_buffer(MAP_BYTES_MAX // mmap.PAGESIZE)  # a byte a page

    def __del__(self) -> None:
        os.close(self._descriptor)  # and with it the locks

    @staticmethod
    def initialise(descriptor: int, layout: Layout) -> None:
        """Header and length; no space for data is taken yet."""
        os.ftruncate(descriptor, layout.num_bytes)
        _write(descriptor, layout.header, 0)

    @staticmethod
    def matches(descriptor: int, layout: Layout) -> bool:
        """Whether the file is what `initialise` makes, whole and of the right length."""
        return (
            os.fstat(descriptor).st_size == layout.num_bytes
            and os.pread(descriptor, len(layout.header), 0) == layout.header
        )

    def is_published(self, index: int) -> bool:
        return self._state(index) in (DURABLE, self._boot)

    def is_durable(self, index: int) -> bool:
        return self._state(index) == DURABLE

    def try_lock(self, index: int) -> bool:
        """The right to `write` this blob, until `unlock` or the end of the process."""
        return byte_lock.try_lock(self._descriptor, self.layout.state_offset(index))

    def unlock(self, index: int) -> None:
        byte_lock.unlock(self._descriptor, self.layout.state_offset(index))

    def write(self, index: int, data: NDArray[np.uint8]) -> None:
        """Store and publish, with the lock held. Raises OSError (no space, a broken disk) with nothing published."""
        start, length = self.layout.starts[index], self.layout.lengths[index]
        space = os.fstatvfs(self._descriptor)
        if space.f_bavail * space.f_frsize < length + FREE_BYTES_MIN:
            raise OSError(errno.ENOSPC, f"less than {FREE_BYTES_MIN >> 20} MiB would stay free")
        os.posix_fallocate(self._descriptor, start, max(1, length))  # no hole that a reader could trip over
        _write(self._descriptor, data.data, start)
        offset = self.layout.state_offset(index)
        _write(self._descriptor, struct.pack("<I", zlib.crc32(data.data)), offset + _STATE.size)
        _write(self._descriptor, _STATE.pack(self._boot), offset)

    def view(self, index: int, pace: Pace | None = None) -> NDArray[np.uint8]:
        """The published blob. Flagged writable, since torch warns of others; the pages are not, and the kernel ends
        who writes. `pace` is told of every piece whose pages were mapped."""
        self.touch(index, index, pace)
        return self.peek(index)

    def touch(self, first: int, last: int, pace: Pace | None = None) -> None:
        """Have the pages of blobs `first` to `last` mapped, all published: one call costs a fraction of a page fault for
        each during the next steps. In pieces, and not through the mmap module, which would keep the interpreter's lock
        while the disk reads."""
        for start, num_bytes in self._pieces(first, last):
            self._populate(start, num_bytes)
            if pace is not None:
                pace(num_bytes)

    def touch_again(self, first: int, last: int, pace: Pace | None = None) -> None:
        """After a `touch`: what the kernel has dropped since is read again. To look costs a tenth of mapping once more."""
        for start, num_bytes in self._pieces(first, last):
            num_pages = -(-num_bytes // mmap.PAGESIZE)
            looked = _mincore()(self._address + start, num_bytes, self._residence) == 0
            if not looked or self._residence.raw[:num_pages] != b"\1" * num_pages:
                self._populate(start, num_bytes)
            if pace is not None:
                pace(num_bytes)

    def _pieces(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        end = self._end(last)
        for start in range(self.layout.starts[first], end, MAP_BYTES_MAX):
            yield start, min(MAP_BYTES_MAX, end - start)

    def _populate(self, start: int, num_bytes: int) -> None:
        if _library().madvise(self._address + start, num_bytes, _POPULATE_READ) != 0:  # before Linux 5.14
            self._mapping.madvise(mmap.MADV_WILLNEED, start, num_bytes)

    def peek(self, index: int) -> NDArray[np.uint8]:
        """As `view`, with no page mapped before it is read."""
        return np.asarray(_Window(self._mapping, self._address + self.layout.starts[index], self.layout.lengths[index]))

    def crc_matches(self, index: int) -> bool:
        """Reads the whole blob."""
        offset = self.layout.state_offset(index) + _STATE.size
        (expected,) = struct.unpack("<I", os.pread(self._descriptor, 4, offset))
        return bool(zlib.crc32(self.view(index).data) == expected)

    def make_durable(self, indices: Iterable[int]) -> None:
        """Sync these blobs' data, then mark them. Raises OSError when the disk fails: the data may be lost, and the
        file must go."""
        pending: list[int] = []
        for index in sorted(index for index in indices if self._state(index) == self._boot):
            if pending and self._end(index) - self.layout.starts[pending[0]] > SYNC_BYTES_MAX:
                self._sync_blobs(pending)
                pending = []
            pending.append(index)
        if pending:
            self._sync_blobs(pending)

    def _sync_blobs(self, indices: list[int]) -> None:
        start, end = self.layout.starts[indices[0]], self._end(indices[-1])
        for piece in range(start, end, SYNC_BYTES_MAX):
            self._sync(piece, min(piece + SYNC_BYTES_MAX, end))
        for index in indices:
            _write(self._descriptor, _STATE.pack(DURABLE), self.layout.state_offset(index))
        self._sync(
            self.layout.state_offset(indices[0]) // ALIGNMENT * ALIGNMENT,
            self.layout.state_offset(indices[-1]) + _STATE_BYTES,
        )

    def _sync(self, start: int, end: int) -> None:
        """As fdatasync, of a part of the file."""
        address, length = ctypes.c_void_p(self._address + start), ctypes.c_size_t(end - start)
        if _library().msync(address, length, _MS_SYNC) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def _end(self, index: int) -> int:
        return self.layout.starts[index] + self.layout.lengths[index]

    def _state(self, index: int) -> int:
        (state,) = _STATE.unpack(os.pread(self._descriptor, _STATE.size, self.layout.state_offset(index)))
        return int(state)


class _Window:
    """Part of a mapping for NumPy, which keeps this object, and so the mapping."""

    def __init__(self, mapping: mmap.mmap, address: int, length: int) -> None:
        self.mapping = mapping
        self.__array_interface__ = {"shape": (length,), "typestr": "|u1", "data": (address, False), "version": 3}


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


@functools.cache
def _mincore() -> Callable[[int, int, ctypes.Array[ctypes.c_char]], int]:
    """Keeps the interpreter's lock: it waits for no disk, and to take the lock again may cost a turn on a busy CPU."""
    function = ctypes.PyDLL(None).mincore
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    return function


def boot_token() -> int:
    """Names this boot of the machine; never 0 or DURABLE."""
    text = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") | 1 << 63


def _aligned(value: int) -> int:
    return -(-value // ALIGNMENT) * ALIGNMENT


def _write(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written
