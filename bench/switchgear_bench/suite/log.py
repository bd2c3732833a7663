"""All that the suite's commands write, in one file of bounded size: `Log`."""

from __future__ import annotations

import threading
from pathlib import Path

LOG_BYTES_MAX = 15 << 20
PART_BYTES_MAX = 3 << 20  # of one command: a program that prints for ever leaves room for the others


class Log:
    """Appended to as it comes, by any thread."""

    def __init__(self, path: Path, bytes_max: int = LOG_BYTES_MAX) -> None:
        self.path = path
        self._bytes_max = bytes_max
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        self._num_bytes = 0

    def write(self, data: bytes) -> None:
        with self._lock, self.path.open("ab") as file:
            room = self._bytes_max - self._num_bytes
            file.write(data[: max(0, room)])
            self._num_bytes += len(data)
            if 0 <= room < len(data):
                file.write(b"\n[the log is full]\n")

    def title(self, text: str) -> None:
        self.write(f"\n===== {text}\n".encode())
