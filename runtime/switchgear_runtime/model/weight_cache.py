"""Packed weights on disk, mapped by all ranks of a host and found again by the next start: `WeightCache`.

Packing a large model takes minutes, and each rank would hold its own copy of the dense weights. So the first process
that wants a packed matrix (a blob of bytes) writes it to a file, and everyone maps it. A file belongs to one state of
one checkpoint, one format and one layout of the kernels; blobs are trusted as blob_file.py says, and who waits for
another process's blob has a deadline. Trouble with the disk costs the sharing, never the run: one warning, then private
memory.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from switchgear_runtime.env import user_cache_folder
from switchgear_runtime.model.blob_file import BlobFile, Layout, Pace
from switchgear_runtime.model.blob_pool import BlobPool
from switchgear_runtime.model.cache_folder import LOCK, SUFFIX, CacheFolder, CacheUnusable
from switchgear_runtime.model.checkpoint import Checkpoint

SHARED_BYTES_MIN = 16 << 20  # below that, neither packing nor moving an expert to another rank is worth a file
LOCK_TIMEOUT_S = 10.0  # for the folder, which is held for milliseconds
FILL_TIMEOUT_S = 60.0  # for a blob that another process packs
_POLL_S_MAX = 0.01
_GOLDEN = 0.6180339887498949  # multiples of it, without their integers, spread evenly however many there are

Fill = Callable[[Tensor], None]  # writes every byte of a uint8 tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightCacheKey:
    """What decides the bytes of every blob. Files whose `model` is this one's and whose `source` is not are stale."""

    folder: str  # where the checkpoint lies
    checkpoint: str  # what is in it
    format: str  # what the weights become; one checkpoint may be kept in several
    layout: str  # of the kernels that read them

    @classmethod
    def of(cls, checkpoint: Checkpoint, *, format: str, layout: str) -> WeightCacheKey:
        """Beside the checkpoint's own identity, which cannot see every byte: the times and lengths of its files."""
        digest = hashlib.sha256(checkpoint.identity().encode())
        digest.update(repr(checkpoint.spec).encode())
        for path in checkpoint.paths:
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n".encode())
        folder = str(checkpoint.model_dir.resolve())
        return cls(folder=folder, checkpoint=digest.hexdigest()[:32], format=format, layout=layout)

    @property
    def model(self) -> str:
        return _hash(self.folder)

    @property
    def source(self) -> str:
        return _hash(f"{self.checkpoint} {self.layout}")


class WeightCache:
    """The packed weights of one model as one rank sees them. Not thread-safe."""

    def __init__(self, blobs: Mapping[str, int], file: BlobFile | None, path: Path | None, rank: int) -> None:
        """Use `open`."""
        self._index = {name: index for index, name in enumerate(blobs)}
        self._lengths = list(blobs.values())
        self._file = file
        self._rank = rank
        self._scratch: mmap.mmap | None = None
        self._patience_s = FILL_TIMEOUT_S
        self._writes = file is not None
        self.pool = BlobPool()  # of private memory
        self._seen: set[int] = set()  # published when we looked, maybe not durable
        self.path = path
        self.num_filled = self.num_mapped = self.num_private = 0  # blobs written, taken from the file, kept in memory

    @classmethod
    def open(cls, folder: Path | None, key: WeightCacheKey, blobs: Mapping[str, int], *, rank: int = 0) -> WeightCache:
        """`blobs`: name and bytes of every matrix of the model, whoever holds it, in an order that all ranks share.
        Without a folder, or for a small model, everything is private memory."""
        if folder is None or sum(blobs.values()) < SHARED_BYTES_MIN:
            return cls(blobs, None, None, rank)
        layout = Layout.of(asdict(key), blobs)
        name = f"{key.model}-{key.source}-{layout.digest()}{SUFFIX}"
        try:
            file = BlobFile(_open(CacheFolder.prepare(folder), name, key, layout), layout)
        except (CacheUnusable, OSError) as error:
            log.warning("packed weights are not kept: %s", _reason(error, folder))
            return cls(blobs, None, None, rank)
        return cls(blobs, file, folder / name, rank)

    @property
    def is_shared(self) -> bool:
        return self._file is not None

    @property
    def num_bytes(self) -> int:
        """Of all blobs, filled or not."""
        return sum(self._lengths)

    def get(self, name: str, fill: Fill, pace: Pace | None = None) -> Tensor:
        """The blob, uint8, at a multiple of 4096 and never to be written to (pages of the file are write-protected:
        SIGSEGV). `fill` is called if no process has published it: it gets memory with arbitrary contents and writes
        all of it. `pace` is told of every piece that is mapped or packed."""
        index = self._index[name]
        file = self._file
        if file is None or not self._await_turn(file, index, name):
            return self._private(index, fill, pace)
        if file.is_published(index):
            self.num_mapped += 1
            return self._map(file, index, pace)
        try:
            data = self._fill_and_write(file, index, fill)
        finally:
            file.unlock(index)
        if data is not None:  # the disk would not have it
            self._scratch = None  # the tensor's now
            self.num_private += 1
            return torch.from_numpy(data)
        return self._map(file, index, pace)

    def touch(self, first: str, last: str, pace: Pace | None = None) -> None:
        """Blobs that `get` mapped, from one name to another in the order of `open`, are about to be used again."""
        assert self._file is not None
        self._file.touch_again(self._index[first], self._index[last], pace)

    def peek(self, name: str) -> Tensor | None:
        """A published blob as `get` gives it, but none of its pages is read now; None if it is not published."""
        file, index = self._file, self._index[name]
        return torch.from_numpy(file.peek(index)) if file is not None and file.is_published(index) else None

    def prepare(self, fills: Mapping[str, Fill]) -> None:
        """Before `get`s: publish those of these blobs that nobody has and nobody is packing. Ranks that start together
        so share the work, each from another place of its list."""
        names = list(fills)
        first = int(self._rank * _GOLDEN % 1.0 * len(names))
        for name in names[first:] + names[:first]:
            file, index = self._file, self._index[name]
            if file is None or not self._writes:
                return
            if file.is_published(index) or not file.try_lock(index):
                continue
            try:
                if not file.is_published(index):
                    self._fill_and_write(file, index, fills[name])
            finally:
                file.unlock(index)

    def publish(self) -> None:
        """After loading: drop scratch memory, and let a thread make durable what this rank has seen. Until then a
        power cut loses it, and nothing else does."""
        log.info("weights: %d mapped, %d packed, %d private", self.num_mapped, self.num_filled, self.num_private)
        self._scratch = None
        file, seen = self._file, self._seen
        self._seen = set()
        if file is not None and any(not file.is_durable(index) for index in seen):
            threading.Thread(target=self._make_durable, args=(file, seen), name="weight-cache", daemon=True).start()

    def verify(self) -> list[str]:
        """Names of published blobs whose bytes are not those that were written. Reads everything."""
        file = self._file
        if file is None:
            return []
        published = ((name, index) for name, index in self._index.items() if file.is_published(index))
        return [name for name, index in published if not file.crc_matches(index)]

    def _await_turn(self, file: BlobFile, index: int, name: str) -> bool:
        """True once the blob is published, or else locked by us; False if we shall do without."""
        deadline = time.monotonic() + self._patience_s
        pause_s = 0.0002
        while True:
            if file.is_published(index):
                return True
            if not self._writes:
                return False
            if file.try_lock(index):
                if file.is_published(index):  # meanwhile
                    file.unlock(index)
                return True
            if time.monotonic() >= deadline:
                if self._patience_s:
                    log.warning(
                        "waited %g s for another process to pack %s into %s, and pack it here too; `fuser` names the process",
                        self._patience_s,
                        name,
                        self.path,
                    )
                    self._patience_s = 0.0  # once is enough
                return False
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _POLL_S_MAX)

    def _fill_and_write(self, file: BlobFile, index: int, fill: Fill) -> NDArray[np.uint8] | None:
        """Pack and publish, with the lock held. If the disk refuses, the packed bytes, which are in the scratch."""
        length = self._lengths[index]
        if self._scratch is None or len(self._scratch) < length:
            self._scratch = mmap.mmap(-1, max(1, length))
        data: NDArray[np.uint8] = np.frombuffer(self._scratch, dtype=np.uint8, count=length)
        fill(torch.from_numpy(data))
        try:
            file.write(index, data)
        except OSError as error:
            log.warning("packed weights are no longer kept in %s: %s", self.path, error.strerror)
            self._writes = False
            return data
        self.num_filled += 1
        self._seen.add(index)
        return None

    def _map(self, file: BlobFile, index: int, pace: Pace | None) -> Tensor:
        self._seen.add(index)
        return torch.from_numpy(file.view(index, pace))

    def _private(self, index: int, fill: Fill, pace: Pace | None) -> Tensor:
        self.num_private += 1
        length = self._lengths[index]
        blob = self.pool.take(length)
        fill(blob)
        if pace is not None:
            pace(length)
        return blob

    def _make_durable(self, file: BlobFile, indices: set[int]) -> None:
        try:
            file.make_durable(indices)
        except OSError as error:
            log.warning("%s cannot be synced (%s) and is removed", self.path, error.strerror)
            assert self.path is not None
            self.path.unlink(missing_ok=True)


def weight_cache_folder(setting: str | None) -> Path | None:
    """The setting `weight_cache_dir` as a folder: None is in the user's cache folder, empty is nowhere."""
    if setting is None:
        folder = user_cache_folder()
        return None if folder is None else folder / "switchgear" / "weights"
    return Path(setting) if setting else None


def _open(folder: CacheFolder, name: str, key: WeightCacheKey, layout: Layout) -> int:
    """A descriptor of the file, which is made if it is missing or damaged; stale ones go."""
    with folder.locked(LOCK_TIMEOUT_S):
        for stale in folder.remove_stale(key.model, key.source):
            log.info("removed %s: the checkpoint or the kernels have changed", folder.path / stale)
        descriptor = folder.open(name)
        if descriptor is not None:
            if BlobFile.matches(descriptor, layout):
                return descriptor
            os.close(descriptor)
        return folder.create(name, lambda new: BlobFile.initialise(new, layout))


def _reason(error: CacheUnusable | OSError, folder: Path) -> str:
    text = str(error) if isinstance(error, CacheUnusable) else f"{folder / LOCK}: {error.strerror}"
    return f"{text} (setting weight_cache_dir)"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
