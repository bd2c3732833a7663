"""Memory of experts that were given up, for those that come: `BlobPool`.

Its pages are there already, so that a copy into them faults on none.
"""

from __future__ import annotations

import mmap
import weakref
from collections import defaultdict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class BlobPool:
    """A blob is free again once nothing refers to it: neither a slot in use, nor one that waits for all headers to show
    a later step, nor a peer that reads it. Any thread."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[mmap.mmap]] = defaultdict(list)  # by length; list methods are atomic

    @property
    def num_free(self) -> int:
        return sum(map(len, self._free.values()))

    def take(self, num_bytes: int) -> Tensor:
        """uint8, on pages of its own, with arbitrary contents."""
        free = self._free[num_bytes]
        try:
            mapping = free.pop()
        except IndexError:
            mapping = mmap.mmap(-1, max(1, num_bytes))
        blob: NDArray[np.uint8] = np.frombuffer(mapping, dtype=np.uint8, count=num_bytes)
        weakref.finalize(blob, free.append, mapping).atexit = False
        return torch.from_numpy(blob)
