"""Where a controller holds its term: a small compare-and-swap store, in memory or in a folder."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

LOCK_TIMEOUT_S = 5.0
_LOCK_RETRY_S = 0.005


class Store(Protocol):
    """Keys are short names; values are bytes; None means absent."""

    def get(self, key: str) -> bytes | None: ...

    def compare_and_swap(self, key: str, expected: bytes | None, value: bytes) -> bool:
        """Set `key` to `value` if it now holds `expected`; False, and nothing changed, if not."""
        ...


class MemoryStore:
    """For a cluster with one controller, which ends with its process."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def get(self, key: str) -> bytes | None:
        return self._values.get(key)

    def compare_and_swap(self, key: str, expected: bytes | None, value: bytes) -> bool:
        if self._values.get(key) != expected:
            return False
        self._values[key] = value
        return True


class FileStore:
    """One file a key in a folder that the controllers share; a lock file orders them, a rename makes each change
    whole."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder

    def get(self, key: str) -> bytes | None:
        try:
            return self._path(key).read_bytes()
        except FileNotFoundError:
            return None

    def compare_and_swap(self, key: str, expected: bytes | None, value: bytes) -> bool:
        with self._locked():
            if self.get(key) != expected:
                return False
            path = self._path(key)
            fresh = path.with_suffix(".new")
            with fresh.open("wb") as file:
                file.write(value)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
            return True

    def _path(self, key: str) -> Path:
        if not key.replace("-", "").isalnum():
            raise ValueError(f"key={key!r} must consist of letters, digits and dashes")
        return self._folder / key

    @contextmanager
    def _locked(self) -> Iterator[None]:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        with (self._folder / ".lock").open("ab") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise TimeoutError(
                            f"{self._folder}: another process held the lock for {LOCK_TIMEOUT_S} s"
                        ) from None
                    time.sleep(_LOCK_RETRY_S)
            yield  # closing the file unlocks it


class Term:
    """A controller's claim: rises by one with each controller, and is lost when another takes the next.

    Example: two controllers share a store; the first takes term 1, the second term 2, and `first.held()` is False.
    """

    _KEY = "term"

    def __init__(self, store: Store, owner: str) -> None:
        self._store = store
        self._owner = owner.encode()
        self.number = 0

    def take(self) -> int:
        """Claim the next term."""
        for _ in range(100):  # each failure means that somebody else succeeded
            current = self._store.get(self._KEY)
            number = int(current.split(b" ", 1)[0]) + 1 if current else 1
            if self._store.compare_and_swap(self._KEY, current, b"%d %s" % (number, self._owner)):
                self.number = number
                return number
        raise TimeoutError("100 other controllers took the term first")

    def held(self) -> bool:
        return self._store.get(self._KEY) == b"%d %s" % (self.number, self._owner)
