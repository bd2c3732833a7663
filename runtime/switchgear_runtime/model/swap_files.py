"""The bytes of the files that `load-expert` named, also when they are gone from where they were: `SwapFiles`.

A rank that joins later, in the place of a dead one, needs what the others read long ago. So whoever reads a file keeps
a copy in the host's weight cache folder, named by its SHA-256; every read compares the digest, so a copy can be missing
(then the path is what is left) but never be another file. Without a cache folder nothing is kept.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import tempfile
from pathlib import Path

from switchgear_runtime.errors import CheckpointError
from switchgear_runtime.model.blob_file import Pace
from switchgear_runtime.model.cache_folder import CacheFolder, CacheUnusable
from switchgear_runtime.moe.model_versions import ExpertSwap

PIECE_BYTES = 1 << 20
FOLDER = "experts"
SUFFIX = ".safetensors"

log = logging.getLogger(__name__)


class SwapFiles:
    """`folder`: the weight cache's, or None. Any thread."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = None if folder is None else folder / FOLDER

    def read(self, swap: ExpertSwap, bytes_max: int, pace: Pace | None = None) -> bytes:
        """With the swap's digest. CheckpointError naming the path; `pace` is told of every piece."""
        try:
            data = _read(Path(swap.path), swap, bytes_max, pace)
            _compare(data, swap)
        except CheckpointError as error:
            kept = self._kept(swap, bytes_max, pace)
            if kept is None:
                raise
            log.warning("%s; version %d is read from the copy in %s", error, swap.version, self._folder)
            return kept
        self._keep(swap, data)
        return data

    def _kept(self, swap: ExpertSwap, bytes_max: int, pace: Pace | None) -> bytes | None:
        if self._folder is None:
            return None
        try:
            data = _read(self._folder / (swap.sha256 + SUFFIX), swap, bytes_max, pace)
            _compare(data, swap)
        except CheckpointError:
            return None
        return data

    def _keep(self, swap: ExpertSwap, data: bytes) -> None:
        """All of it or nothing, whoever else does the same."""
        if self._folder is None:
            return
        path = self._folder / (swap.sha256 + SUFFIX)
        try:
            CacheFolder.prepare(self._folder)
            if path.is_file():
                return
            descriptor, name = tempfile.mkstemp(prefix=f"{swap.sha256}-", suffix=".new", dir=self._folder)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                Path(name).replace(path)
            except OSError:
                Path(name).unlink(missing_ok=True)
                raise
        except (CacheUnusable, OSError) as error:
            log.warning("no copy of %s is kept, so the file must stay where it is: %s", swap.path, error)


def _read(path: Path, swap: ExpertSwap, bytes_max: int, pace: Pace | None) -> bytes:
    pieces, num_bytes = [], 0
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # a pipe would wait
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise CheckpointError(f"{path} is not a file")
            while piece := file.read(PIECE_BYTES):
                pieces.append(piece)
                num_bytes += len(piece)
                if num_bytes > bytes_max:
                    raise CheckpointError(
                        f"{path} has over {bytes_max} bytes, more than one expert of this model in float32; the file "
                        "holds one expert's gate, up and down matrices"
                    )
                if pace is not None:
                    pace(len(piece))
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        if isinstance(error, CheckpointError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"{path} cannot be read: {reason}; the file of model version {swap.version} must be there on every rank's "
            "host as long as the cluster runs"
        ) from None
    return b"".join(pieces)


def _compare(data: bytes, swap: ExpertSwap) -> None:
    digest = hashlib.sha256(data).hexdigest()
    if digest != swap.sha256:
        raise CheckpointError(
            f"{swap.path} has sha256 {digest} here, and version {swap.version} is the file with {swap.sha256}: put that "
            "one there on every rank's host, or load this one as a version of its own"
        )
