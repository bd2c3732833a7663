"""OpenAI's batch files: `read_requests` for the input, `BatchOutput` for an output that survives any death.

The output is the only record of what is done: one line a finished request, appended whole. A line is in the kernel's
hands before its request counts as finished, so a killed process loses none; `sync` once in a while, so a crashed
machine loses the last moments' lines at most, which the next run makes again. A last line without its end is cut off.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from switchgear_runtime.errors import ConfigError


class BatchRequestLine(msgspec.Struct, kw_only=True):
    """One line of the input."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _Finished(msgspec.Struct):
    """What matters of a line of the output."""

    custom_id: str


def read_requests(path: Path) -> Iterator[BatchRequestLine]:
    """Line by line. ConfigError names the line that is no request, or that repeats a custom_id."""
    seen: set[str] = set()
    decoder = msgspec.json.Decoder(BatchRequestLine)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    request = decoder.decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                    raise ConfigError(f"{path}, line {number}: not a batch request: {error}") from None
                if request.custom_id in seen:
                    raise ConfigError(f"{path}, line {number}: custom_id {request.custom_id!r} came before")
                seen.add(request.custom_id)
                yield request
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


class BatchOutput:
    """A context manager. `finished`: the custom_ids that have their line. One process at a time has the file."""

    def __init__(self, path: Path, custom_ids: Collection[str]) -> None:
        """`custom_ids`: the input's; a line of any other means that the file is another batch's, and is left alone."""
        self._path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.finished = self._recover(custom_ids)
        except BlockingIOError:
            os.close(self._file)
            raise ConfigError(f"{path} is being written by another process") from None
        except BaseException:
            os.close(self._file)
            raise
        self._dirty = True

    def append(self, record: dict[str, Any]) -> None:
        line = msgspec.json.encode(record) + b"\n"
        view = memoryview(line)
        while view:
            view = view[os.write(self._file, view) :]
        self.finished.add(record["custom_id"])
        self._dirty = True

    def sync(self) -> None:
        """Onto the disk."""
        if self._dirty:
            self._dirty = False
            os.fsync(self._file)

    def close(self) -> None:
        self.sync()
        os.close(self._file)

    def __enter__(self) -> BatchOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _recover(self, custom_ids: Collection[str]) -> set[str]:
        """Read what is there; cut a torn last line off."""
        finished: set[str] = set()
        decoder = msgspec.json.Decoder(_Finished)
        num_good_bytes = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                num_good_bytes += len(line)
                if not line.strip():
                    continue
                try:
                    custom_id = decoder.decode(line).custom_id
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                    raise ConfigError(
                        f"{self._path}, line {number} is no line of a batch output; choose another file"
                    ) from None
                if custom_id not in custom_ids:
                    raise ConfigError(
                        f"{self._path}, line {number} is of custom_id {custom_id!r}, which the input does not have; "
                        "choose another file"
                    )
                if custom_id in finished:
                    raise ConfigError(f"{self._path}, line {number} repeats custom_id {custom_id!r}")
                finished.add(custom_id)
        if os.fstat(self._file).st_size > num_good_bytes:
            os.ftruncate(self._file, num_good_bytes)
        return finished
