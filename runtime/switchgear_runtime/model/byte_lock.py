"""Locks on single bytes of a file, which vanish with their holder however it ends: `try_lock` and `unlock`.

Open-file-description locks (fcntl F_OFD_SETLK): they belong to one `os.open`, so that two users of a file in one process
exclude each other too, and closing some other descriptor of the file releases nothing (POSIX locks fail at both).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid


def try_lock(descriptor: int, offset: int) -> bool:
    """Take the byte for writing; False if somebody has it. `descriptor` must be open for writing."""
    try:
        _set(descriptor, fcntl.F_WRLCK, offset)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def unlock(descriptor: int, offset: int) -> None:
    _set(descriptor, fcntl.F_UNLCK, offset)


def _set(descriptor: int, kind: int, offset: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, offset, 1, 0))
