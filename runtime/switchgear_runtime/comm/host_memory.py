"""Host memory that other processes of this machine map: `HostPeerMemory`, over memfd. The twin's PeerMemory.

An allocation is a file without a name, which lives as long as a process has it open or mapped, so whoever dies leaves
nothing behind. Its handle names process, descriptor and inode: who maps it opens the descriptor under /proc, as the
kernel lets processes of the same user, and knows by the inode whether it is still that file.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

_HANDLE = struct.Struct("<8sqqQQQ")  # magic, process, descriptor, device, inode, bytes
_MAGIC = b"sgmemfd1"


@dataclass(slots=True)
class _Allocation:
    descriptor: int
    mapping: mmap.mmap


class HostPeerMemory:
    """One process's, or one rank's of several in a process: they map each other's all the same."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self._mine: dict[int, _Allocation] = {}
        self._mapped: dict[int, mmap.mmap] = {}

    def allocate(self, num_bytes: int) -> int:
        """Zeros; pages come as they are touched."""
        descriptor = os.memfd_create("switchgear", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, num_bytes)
            # A peer that reads pages which are gone would get SIGBUS.
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            mapping = mmap.mmap(descriptor, num_bytes)
        except BaseException:
            os.close(descriptor)
            raise
        address = _address(mapping)
        self._mine[address] = _Allocation(descriptor, mapping)
        return address

    def free(self, address: int) -> None:
        allocation = self._mine.pop(address)
        allocation.mapping.close()
        os.close(allocation.descriptor)

    def handle(self, address: int) -> bytes:
        allocation = self._mine[address]
        status = os.fstat(allocation.descriptor)
        return _HANDLE.pack(
            _MAGIC, os.getpid(), allocation.descriptor, status.st_dev, status.st_ino, len(allocation.mapping)
        )

    def map(self, handle: bytes, *, writable: bool = False, num_bytes: int | None = None) -> int:
        """OSError where the process is gone, hidden, or another user's."""
        if len(handle) != _HANDLE.size or not handle.startswith(_MAGIC):
            raise OSError("it is no handle of host memory")
        _, process, number, device, inode, size = _HANDLE.unpack(handle)
        if num_bytes not in (None, size):
            raise OSError(f"it has {size} bytes, not {num_bytes}")
        access = os.O_RDWR if writable else os.O_RDONLY
        descriptor = os.open(f"/proc/{process}/fd/{number}", access | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if (status.st_dev, status.st_ino, status.st_size) != (device, inode, size):
                raise OSError(f"descriptor {number} of process {process} is another file by now")
            prot = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
            mapping = mmap.mmap(descriptor, size, prot=prot)
        finally:
            os.close(descriptor)
        address = _address(mapping)
        self._mapped[address] = mapping
        return address

    def unmap(self, address: int) -> None:
        self._mapped.pop(address).close()

    def copy(self, to: int, source: int, num_bytes: int) -> None:
        ctypes.memmove(to, source, num_bytes)

    def mark(self) -> Callable[[], bool]:
        return lambda: True


def _address(mapping: mmap.mmap) -> int:
    return int(np.frombuffer(mapping, np.uint8).ctypes.data)
