"""Arrays for kernels, between guards: `Arena`. A write beside an array is seen, a read beside one brings garbage.

`Checked` is a library for checks: each call has finished when it returns. With the GPU's library, arrays lie in memory
that host and device can use, managed or the host's own mapped for the device, so the same checks serve both.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np

GUARD_BYTES = 1 << 14
GARBAGE = (0xFB, 0x05)  # as fp32 -2.6e36 and 6e-36, as int32 far below 0 and far above: no values, no indices


class Checked:
    """A device library whose calls wait. `memory`: what its arrays lie in (the GPU's); None: they are numpy's."""

    def __init__(self, library: ctypes.CDLL, *, memory: Literal["managed", "mapped"] | None = None) -> None:
        self.library = library
        self.memory = memory

    @property
    def is_gpu(self) -> bool:
        return self.memory is not None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self.library, name)

        def call(*arguments: Any) -> Any:
            result = function(*arguments)
            if self.is_gpu:
                self.library.sg_cuda_synchronize(None)
            return result

        return call


class Arena:
    """`put` copies an array in, `room` makes one full of garbage; `check` asserts that all guards are whole.

    With `traps` (on the host), the page behind an array, for some seeds the one before it, cannot be read: a read there
    ends the process. So only in a fork.
    """

    traps: ClassVar[bool] = False

    def __init__(self, library: Checked, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self._garbage = GARBAGE[seed % 3 == 2]
        self._library = library
        self._blocks: list[tuple[np.ndarray, int, int]] = []
        self._made: list[int] = []  # by the library
        self._trap_behind = bool(seed % 4)

    def __del__(self) -> None:
        for data in self._made:
            getattr(self._library.library, f"sg_cuda_{self._library.memory}_free")(data)

    def _block(self, num_bytes: int) -> np.ndarray:
        if not self._library.is_gpu:
            return np.full(num_bytes, self._garbage, np.uint8)
        data = getattr(self._library.library, f"sg_cuda_{self._library.memory}_alloc")(num_bytes)
        assert data, self._library.library.sg_last_error()
        self._made.append(data)
        block = np.frombuffer((ctypes.c_uint8 * num_bytes).from_address(data), np.uint8)
        block[:] = self._garbage
        return block

    def room(self, shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
        dtype = np.dtype(dtype)
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        if self.traps:
            return self._trapped(num_bytes).view(dtype).reshape(shape)
        block = self._block(2 * GUARD_BYTES + num_bytes + 64)
        begin = GUARD_BYTES + -(block.ctypes.data + GUARD_BYTES) % 64
        self._blocks.append((block, begin, begin + num_bytes))
        return block[begin : begin + num_bytes].view(dtype).reshape(shape)

    def _trapped(self, num_bytes: int) -> np.ndarray:
        page = mmap.PAGESIZE
        room = -(-max(num_bytes, 1) // page) * page
        block = np.frombuffer(mmap.mmap(-1, room + 2 * page), np.uint8)
        begin = page + (room - num_bytes) // 16 * 16 if self._trap_behind else page
        block[:] = self._garbage
        self._blocks.append((block[page : page + room], begin - page, begin - page + num_bytes))
        libc = ctypes.CDLL(None)
        for trap in (block.ctypes.data, block.ctypes.data + page + room):
            assert libc.mprotect(ctypes.c_void_p(trap), ctypes.c_size_t(page), 0) == 0  # PROT_NONE
        return block[begin : begin + num_bytes]

    def put(self, array: Any, dtype: Any) -> np.ndarray:
        array = np.asarray(array)
        view = self.room(array.shape, dtype)
        view[...] = array
        return view

    def normals(self, *shape: int) -> np.ndarray:
        return self.put(self.rng.standard_normal(shape), np.float32)

    def check(self) -> None:
        for block, begin, end in self._blocks:
            assert (block[:begin] == self._garbage).all(), "a write before an array"
            assert (block[end:] == self._garbage).all(), "a write behind an array"


def at(array: np.ndarray | None) -> int | None:
    """The array's address."""
    return None if array is None else array.ctypes.data


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Bits of bf16, uint16: to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def of_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)
