"""A device's memory for the experts of one rank: `ExpertPool`, slots of one size in one slab, or a few.

A slot has a stamp that says whose weights it holds, then gate and up, then down, each part from a multiple of 256 bytes.
It is taken (which clears the stamp), filled, stamped, and free again once no tensor refers to it: neither a placement in
use, nor one that waits for all headers to show a later step, nor a peer that is sent its bytes. Other ranks may map the
slabs, whose addresses stay as long as the pool.
"""

from __future__ import annotations

import struct
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from switchgear_runtime.comm.mapped_slabs import Slab
from switchgear_runtime.comm.peer_memory import PeerMemory
from switchgear_runtime.cuda.side_copies import SideCopies
from switchgear_runtime.cuda.slot_layout import ALIGNMENT, SlotLayout
from switchgear_runtime.errors import ConfigError

PATIENCE_S = 5.0  # of who stages, for slots whose epoch is about to settle
_POLL_S = 0.002
_STAMP = struct.Struct("<8sQII32s")
_MAGIC = b"sgexpert"

Source = tuple[int, int, str]  # MoE layer, logical expert, sha256 of the file of its weights ("": the checkpoint)
Cancellable = Callable[[int], None]  # as Pace: raises where nobody wants the expert any more


class SlotStamp:
    """What the head of a slot says: zeros while it is filled, then whose weights follow."""

    NUM_BYTES = _STAMP.size
    NONE = bytes(NUM_BYTES)

    @staticmethod
    def pack(generation: int, source: Source) -> bytes:
        """`generation`: how often the slot was taken."""
        layer, expert, sha256 = source
        return _STAMP.pack(_MAGIC, generation, layer, expert, bytes.fromhex(sha256))

    @staticmethod
    def source(stamp: bytes) -> Source | None:
        """None: it holds no expert, or one that is being written."""
        magic, _, layer, expert, digest = _STAMP.unpack(stamp)
        if magic != _MAGIC:
            return None
        return layer, expert, "" if digest == bytes(32) else digest.hex()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Slot:
    """As long as this or a part of it is referred to, it is nobody else's."""

    index: int  # over all slabs
    data: Tensor  # uint8
    layout: SlotLayout

    @property
    def parts(self) -> list[Tensor]:
        begins = self.layout.offsets
        return [self.data[at : at + size] for at, size in zip(begins, self.layout.part_bytes, strict=False)]


class ExpertPool:
    """`memory`: whose allocations other processes can map; None: torch's, which they cannot. Any thread, but `grow` from
    the engine's."""

    def __init__(self, layout: SlotLayout, memory: PeerMemory | None, copies: SideCopies) -> None:
        self.layout = layout
        self.memory = memory
        self.device = copies.device
        self._copies = copies
        self._slabs: list[_Slab] = []
        self._generations: list[int] = []  # by slot
        self._free: deque[int] = deque()  # the longest free first; its methods are atomic

    @property
    def num_slots(self) -> int:
        return len(self._generations)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def slabs(self) -> list[Slab]:
        return [slab.slab for slab in self._slabs]

    def grow(self, num_slots: int) -> None:
        """By one more slab. What the device raises passes through."""
        if num_slots <= 0:
            return
        num_bytes = num_slots * self.layout.num_bytes
        self._slabs.append(_Slab.of(self.memory, self.device, num_bytes))
        first = self.num_slots
        self._generations += [0] * num_slots
        self._free.extend(range(first, first + num_slots))

    def take(self, waits: Cancellable | None = None) -> Slot:
        """A free slot. `waits`: while experts that were given up are about to be free; it is asked whether that still
        makes sense. ConfigError when there is none."""
        deadline_s = time.monotonic() + (PATIENCE_S if waits is not None else 0.0)
        while True:
            try:
                index = self._free.popleft()
                break
            except IndexError:
                if waits is None or time.monotonic() >= deadline_s:
                    raise ConfigError(self._exhausted()) from None
            waits(0)
            time.sleep(_POLL_S)
        self._generations[index] += 1
        slab, at = self._place(index)
        memory = _SlotMemory(slab, at, self.layout.num_bytes)
        weakref.finalize(memory, self._free.append, index).atexit = False
        slot = Slot(index=index, data=memory.tensor(self.device), layout=self.layout)
        # A peer that still reads here learns of it before anything changes.
        self._write_stamp(slot.data, SlotStamp.NONE)
        return slot

    def stamp(self, first_part: Tensor, source: Source) -> None:
        """A slot is complete: these are its weights."""
        (index,) = self.indices(np.array([first_part.data_ptr()], np.int64)).tolist()
        slab, at = self._place(index)
        head = _SlotMemory(slab, at, SlotStamp.NUM_BYTES).tensor(self.device)
        self._write_stamp(head, SlotStamp.pack(self._generations[index], source))

    def slot_addresses(self, slabs: Sequence[Slab] | None = None) -> NDArray[np.int64]:
        """Of every slot's first byte, by index. `slabs`: another rank's of this layout, as they are mapped here."""
        return slot_addresses(self.layout, self.slabs if slabs is None else slabs)

    def indices(self, addresses: NDArray[np.int64]) -> NDArray[np.int32]:
        """The slots whose first part lies at these addresses; -1 for address 0."""
        starts = self.slot_addresses() + ALIGNMENT
        order = np.argsort(starts)
        found = order[np.minimum(np.searchsorted(starts[order], addresses), len(order) - 1)]
        assert bool(((starts[found] == addresses) | (addresses == 0)).all()), "an expert outside the pool"
        return np.where(addresses == 0, -1, found).astype(np.int32)

    def _write_stamp(self, to: Tensor, stamp: bytes) -> None:
        self._copies.write(to[: SlotStamp.NUM_BYTES], torch.frombuffer(bytearray(stamp), dtype=torch.uint8))

    def _place(self, index: int) -> tuple[_Slab, int]:
        for slab in self._slabs:
            num_here = slab.slab.num_bytes // self.layout.num_bytes
            if index < num_here:
                return slab, slab.slab.address + index * self.layout.num_bytes
            index -= num_here
        raise IndexError(index)

    def _exhausted(self) -> str:
        return (
            f"expert pool: all {self.num_slots} slots on {self.device} hold experts that are in use, staged, or not "
            "settled; move fewer experts at a time, or raise survive"
        )


def slot_addresses(layout: SlotLayout, slabs: Sequence[Slab]) -> NDArray[np.int64]:
    """Of every slot's first byte, over all slabs."""
    size = layout.num_bytes
    return np.concatenate(
        [slab.address + size * np.arange(slab.num_bytes // size, dtype=np.int64) for slab in slabs]
        or [np.empty(0, np.int64)]
    )


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Slab:
    """Freed with the last slot that refers to it."""

    slab: Slab
    owner: Tensor | None  # where the memory is torch's

    @classmethod
    def of(cls, memory: PeerMemory | None, device: torch.device, num_bytes: int) -> _Slab:
        if memory is None:
            owner = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            return cls(Slab(owner.data_ptr(), num_bytes), owner)
        slab = cls(Slab(memory.allocate(num_bytes), num_bytes), None)
        weakref.finalize(slab, memory.free, slab.slab.address).atexit = False
        return slab


class _SlotMemory:
    """Every tensor over the slot keeps this alive, and this its slab."""

    __slots__ = ("__weakref__", "_address", "_num_bytes", "_slab")

    def __init__(self, slab: _Slab, address: int, num_bytes: int) -> None:
        self._slab = slab
        self._address = address
        self._num_bytes = num_bytes

    def tensor(self, device: torch.device) -> Tensor:
        """uint8. Memory of the host by NumPy's protocol, of a GPU by its counterpart, both of which keep `self`."""
        if device.type == "cpu":
            return torch.from_numpy(np.asarray(_OnHost(self)))
        return torch.as_tensor(_OnDevice(self), device=device)

    def interface(self) -> dict[str, Any]:
        return {"shape": (self._num_bytes,), "typestr": "|u1", "data": (self._address, False), "version": 3}


class _OnHost:
    def __init__(self, memory: _SlotMemory) -> None:
        self.__array_interface__ = memory.interface()
        self._memory = memory


class _OnDevice:
    def __init__(self, memory: _SlotMemory) -> None:
        self.__cuda_array_interface__ = memory.interface()
        self._memory = memory
