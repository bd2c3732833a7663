"""The file under /dev/shm that a channel's ranks map: create, open, unlink, sweep.

Its name exists only while the ranks join. Rank 0 holds a file lock on it from creation on, which the kernel drops when
the process ends, however it ends. So a name whose lock is free belongs to nobody, and `sweep_abandoned` may remove it.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from switchgear_runtime.errors import ConfigError, TransportError, TransportTimeout

FOLDER = Path("/dev/shm")
PREFIX = "sg-"
_CHANNEL = re.compile(r"[A-Za-z0-9_-]{1,128}")
_POLL_S_MAX = 0.01
_CREATE_ATTEMPTS_MAX = 3


def channel_path(channel: str) -> Path:
    """Where the segment of `channel` lies while its ranks join."""
    if not _CHANNEL.fullmatch(channel):
        raise ConfigError(f"channel={channel!r} must be 1 to 128 letters, digits, '-' or '_'")
    return FOLDER / f"{PREFIX}{channel}"


def create_segment(channel: str, num_bytes: int, *, rank: int) -> mmap.mmap:
    """Make and map the segment: zeros, and every page reserved, so a full /dev/shm shows here, not as SIGBUS later."""
    path = channel_path(channel)
    for _ in range(_CREATE_ATTEMPTS_MAX):
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileExistsError as error:
            raise TransportError(f"{path} exists; each generation needs a fresh channel name", rank=rank) from error
        except OSError as error:
            raise TransportError(f"cannot create {path}: {error.strerror}", rank=rank) from error
        try:
            if _lock(descriptor) and os.fstat(descriptor).st_nlink == 1:
                _reserve(descriptor, num_bytes, path, rank)
                return mmap.mmap(descriptor, num_bytes)  # duplicates the descriptor, so it keeps the lock
            # A sweep came between creation and lock, and took the name away.
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
    raise TransportError(f"{path} was swept away each time it was created", rank=rank)


def open_segment(
    channel: str, num_bytes: int, *, rank: int, timeout_s: float, ready: Callable[[mmap.mmap], bool]
) -> mmap.mmap:
    """Map what rank 0 creates, once `ready` says that its header is written."""
    path = channel_path(channel)
    deadline = time.monotonic() + timeout_s
    pause_s = 0.0005
    mapping: mmap.mmap | None = None
    seen = "has not been created"
    while True:
        if mapping is None:
            mapping, seen = _try_map(path, num_bytes, rank)
        if mapping is not None and ready(mapping):
            return mapping
        if time.monotonic() >= deadline:
            raise TransportTimeout(f"waited {timeout_s:.2f} s for rank 0: {path} {seen}", rank=rank, peers=(0,))
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _POLL_S_MAX)


def unlink_channel(channel: str) -> bool:
    """Remove the name of `channel` if it is still there (all its ranks died while joining). True if it was."""
    try:
        channel_path(channel).unlink()
    except (FileNotFoundError, PermissionError):
        return False
    return True


def unlink_channels(channel: str) -> None:
    """`unlink_channel`, also of the channels that a generation on several hosts has on each ("<channel>-<host>")."""
    unlink_channel(channel)
    for path in FOLDER.glob(f"{channel_path(channel).name}-*"):
        unlink_channel(path.name.removeprefix(PREFIX))


def sweep_abandoned() -> list[str]:
    """Remove every channel name of this user whose creator is dead; the channels so removed."""
    swept = []
    for path in FOLDER.glob(f"{PREFIX}*"):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue  # gone meanwhile, or another user's
        try:
            if os.fstat(descriptor).st_uid == os.geteuid() and _lock(descriptor):
                path.unlink(missing_ok=True)
                swept.append(path.name.removeprefix(PREFIX))
        finally:
            os.close(descriptor)
    return swept


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _reserve(descriptor: int, num_bytes: int, path: Path, rank: int) -> None:
    # Ask before taking: a reservation that fails half way has already pushed the machine to its limit.
    space = os.fstatvfs(descriptor)
    free = space.f_bavail * space.f_frsize
    try:
        if free < num_bytes:
            raise OSError(errno.ENOSPC, "no space left")
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        raise TransportError(
            f"cannot reserve {num_bytes / 2**20:.1f} MiB for {path}: {error.strerror}; "
            f"{free / 2**20:.1f} MiB are free. Make room in /dev/shm, enlarge it (in containers: --shm-size), "
            "or lower max_num_batched_tokens",
            rank=rank,
        ) from error


def _try_map(path: Path, num_bytes: int, rank: int) -> tuple[mmap.mmap | None, str]:
    """The mapping, or none and what is wrong with the file so far."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None, "has not been created"
    except OSError as error:
        raise TransportError(f"cannot open {path}: {error.strerror}", rank=rank) from error
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid():
            raise TransportError(f"{path} belongs to another user (uid {status.st_uid})", rank=rank)
        if status.st_size == num_bytes:
            return mmap.mmap(descriptor, num_bytes), "has no header yet"
        # It is being made. If it stays so, the ranks disagree.
        return (
            None,
            f"has {status.st_size} bytes, expected {num_bytes}: all ranks need one world_size and mailbox_bytes",
        )
    finally:
        os.close(descriptor)
