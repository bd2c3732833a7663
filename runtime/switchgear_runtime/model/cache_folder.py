"""The folder that keeps packed weights: made, checked to be this user's and on a local disk, locked: `CacheFolder`.

File names are `<model>-<source>-<contents>.weights`: hashes of where the checkpoint lies, of what is in it (and of the
kernels' layout), and of what the file holds. So a changed checkpoint never finds an old file, and the old one is known
for what it is and removed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LOCK = "lock"
SUFFIX = ".weights"
_TEMPORARY = ".new"
_POLL_S = 0.005
# Where mappings and locks of two hosts do not agree at once, or where every byte would cross a network.
_NETWORK_FILESYSTEMS = ("nfs", "cifs", "smb", "ceph", "lustre", "gpfs", "glusterfs", "beegfs", "afs", "9p", "fuse.")


class CacheUnusable(Exception):
    """Why weights cannot be kept there, and what the user may do. The run goes on without."""


@dataclass(frozen=True, slots=True)
class CacheFolder:
    """A checked folder. Everything in it may be deleted at any time: who has a file open keeps what it has."""

    path: Path

    @classmethod
    def prepare(cls, path: Path) -> CacheFolder:
        """Make it if it is not there, for this user alone. Raises CacheUnusable."""
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = path.stat()
        except OSError as error:
            raise CacheUnusable(f"{path} cannot be made: {error.strerror}") from None
        if status.st_uid != os.geteuid():
            raise CacheUnusable(f"{path} belongs to another user (uid {status.st_uid})")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise CacheUnusable(f"other users may write to {path}; run `chmod go-w` on it")
        kind = _filesystem(status.st_dev)
        if kind.startswith(_NETWORK_FILESYSTEMS):
            raise CacheUnusable(f"{path} lies on {kind}; give a folder on a local disk")
        return cls(path)

    @contextmanager
    def locked(self, timeout_s: float) -> Iterator[None]:
        """Alone in the folder. Raises CacheUnusable at the deadline; OSError where the folder is read-only."""
        path = self.path / LOCK
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            deadline = time.monotonic() + timeout_s
            while not _try_lock_file(descriptor):
                if time.monotonic() >= deadline:
                    raise CacheUnusable(
                        f"waited {timeout_s:g} s for {path}, which another process has locked; see who with `fuser {path}`"
                    )
                time.sleep(_POLL_S)
            yield
        finally:
            os.close(descriptor)

    def open(self, name: str) -> int | None:
        """A descriptor for reading and writing of this user's own regular file; None if there is none of that name."""
        path = self.path / name
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
            return descriptor
        os.close(descriptor)
        raise CacheUnusable(f"{path} is not a file of this user's (uid {status.st_uid}); remove it")

    def create(self, name: str, write: Callable[[int], None]) -> int:
        """A descriptor of a new file, which gets its name once `write` has made it whole. Call with the lock held."""
        temporary = self.path / (name + _TEMPORARY)
        temporary.unlink(missing_ok=True)  # of a process that was killed here
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            write(descriptor)
            os.fsync(descriptor)
            temporary.rename(self.path / name)
        except BaseException:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)
            raise
        return descriptor

    def remove_stale(self, model: str, source: str) -> list[str]:
        """Drop files of the checkpoint folder `model` that do not hold `source`. Call with the lock held."""
        removed = []
        for path in self.path.glob(f"{model}-*"):
            if not path.name.startswith(f"{model}-{source}-") or path.name.endswith(_TEMPORARY):
                path.unlink(missing_ok=True)
                removed.append(path.name)
        return removed


def _try_lock_file(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EINTR):
            return False
        raise
    return True


def _filesystem(device: int) -> str:
    """The type of the mounted file system, as in /proc/self/mountinfo; empty where it is not listed."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        mount, _, source = line.partition(" - ")
        if mount.split()[2] == wanted:
            return source.split()[0]
    return ""
