"""Memory for what a step computes on its way, at addresses that stay: `StepMemory`.

A captured graph has addresses, not tensors, so what it writes must not be handed out to anybody else. Values are taken one
behind the other and given back all at once, layer by layer; all graphs of a rank share the memory, since they run one
after the other. It has room for the largest step from the start (`reserve`); were that too little, it would grow while a
step runs uncaptured, which each does once before it is captured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor

ALIGNMENT = 256
CHUNK_BYTES_MIN = 32 << 20


class StepMemory:
    """On one device; one thread and one stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._chunks: list[Tensor] = []
        self._at = (0, 0)  # chunk, byte

    def reserve(self, num_bytes: int) -> None:
        """One piece of so many at least. What was taken before is lost: no graph may know it."""
        if self.num_bytes < num_bytes or len(self._chunks) > 1:
            self._chunks.clear()
            self._chunks.append(torch.empty(num_bytes, dtype=torch.uint8, device=self._device))
        self._at = (0, 0)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Garbage at first."""
        num_bytes = prod(shape) * dtype.itemsize
        chunk, begin = self._at
        while chunk < len(self._chunks) and begin + num_bytes > self._chunks[chunk].numel():
            chunk, begin = chunk + 1, 0
        if chunk == len(self._chunks):
            self._chunks.append(torch.empty(max(num_bytes, CHUNK_BYTES_MIN), dtype=torch.uint8, device=self._device))
        self._at = chunk, -(-(begin + num_bytes) // ALIGNMENT) * ALIGNMENT
        return self._chunks[chunk][begin : begin + num_bytes].view(dtype).view(shape)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """What is taken inside is given back at its end; on one stream, who takes it next writes later."""
        before = self._at
        try:
            yield
        finally:
            self._at = before

    @property
    def num_bytes(self) -> int:
        """Held."""
        return sum(chunk.numel() for chunk in self._chunks)
