"""The pool of expert slots: nothing is given away that a tensor refers to, and who finds none is told why."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from switchgear_runtime.comm.host_memory import HostPeerMemory
from switchgear_runtime.comm.mapped_slabs import Slab
from switchgear_runtime.cuda import expert_pool
from switchgear_runtime.cuda.expert_pool import ExpertPool, SlotStamp, slot_addresses
from switchgear_runtime.cuda.side_copies import SideCopies
from switchgear_runtime.cuda.slot_layout import ALIGNMENT, SlotLayout
from switchgear_runtime.errors import ConfigError

LAYOUT = SlotLayout((1000, 300))


class FreeingMemory(HostPeerMemory):
    def __init__(self) -> None:
        super().__init__()
        self.freed: list[int] = []

    def free(self, address: int) -> None:
        super().free(address)
        self.freed.append(address)


def make_pool(num_slots: int, memory: HostPeerMemory | None = None) -> ExpertPool:
    pool = ExpertPool(LAYOUT, memory or HostPeerMemory(), SideCopies(torch.device("cpu"), 0, timeout_s=1.0))
    pool.grow(num_slots)
    return pool


def stamp_at(pool: ExpertPool, index: int) -> bytes:
    return ctypes.string_at(int(pool.slot_addresses()[index]), SlotStamp.NUM_BYTES)


def test_a_layout_knows_bytes_only() -> None:
    assert LAYOUT.offsets == (256, 1280, 1792)
    assert LAYOUT.num_bytes == 1792
    assert SlotLayout((512,)).offsets == (256, 768)
    assert SlotStamp.NUM_BYTES <= ALIGNMENT
    assert LAYOUT.text() == "slots of 1000+300 bytes"


def test_slots_do_not_overlap_and_start_at_multiples() -> None:
    pool = make_pool(3)
    pool.grow(2)
    slots = [pool.take() for _ in range(5)]
    assert sorted(slot.index for slot in slots) == list(range(5))
    for slot in slots:
        first, second = slot.parts
        assert (first.numel(), second.numel()) == LAYOUT.part_bytes
        assert first.data_ptr() % ALIGNMENT == second.data_ptr() % ALIGNMENT == 0
        first.fill_(slot.index)
        second.fill_(100 + slot.index)
        (index,) = pool.indices(np.array([first.data_ptr()], np.int64))
        assert index == slot.index
    for slot in slots:
        assert set(slot.parts[0].tolist()) == {slot.index}
        assert set(slot.parts[1].tolist()) == {100 + slot.index}
    assert pool.indices(np.zeros((2, 2), np.int64)).tolist() == [[-1, -1], [-1, -1]]
    with pytest.raises(AssertionError, match="outside the pool"):
        pool.indices(np.array([slots[0].parts[1].data_ptr()], np.int64))


def test_another_ranks_slots_have_addresses_by_the_same_rule() -> None:
    slabs = [Slab(1 << 20, 2 * LAYOUT.num_bytes), Slab(1 << 30, LAYOUT.num_bytes)]
    assert slot_addresses(LAYOUT, slabs).tolist() == [1 << 20, (1 << 20) + LAYOUT.num_bytes, 1 << 30]
    assert slot_addresses(LAYOUT, []).tolist() == []


VIEWS: list[Callable[[torch.Tensor], object]] = [
    lambda part: part,
    lambda part: part[:8],
    lambda part: part[:288].view(torch.bfloat16).view(9, 16),
    lambda part: [part.view(torch.int16)[3:]],
    lambda part: memoryview(part.numpy()),
]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("part", [0, 1])
def test_a_slot_is_free_with_the_last_that_refers_to_it(view: Callable[[torch.Tensor], object], part: int) -> None:
    pool = make_pool(1)
    slot = pool.take()
    held = view(slot.parts[part])
    del slot
    with pytest.raises(ConfigError, match=r"all 1 slots on cpu .* raise survive"):
        pool.take()
    del held
    gc.collect()
    assert pool.num_free == 1
    assert pool.take().index == 0


def test_the_slot_that_was_free_longest_is_taken() -> None:
    pool = make_pool(3)
    slots = [pool.take() for _ in range(3)]
    order = [slots.pop(1).index, slots.pop(1).index, slots.pop(0).index]
    assert [pool.take().index for _ in range(1)] == order[:1]


def test_stamps_are_cleared_first_and_set_last() -> None:
    pool = make_pool(2)
    slot = pool.take()
    assert SlotStamp.source(stamp_at(pool, slot.index)) is None
    pool.stamp(slot.parts[0], (3, 77, ""))
    assert SlotStamp.source(stamp_at(pool, slot.index)) == (3, 77, "")
    first = stamp_at(pool, slot.index)
    other = pool.take()
    pool.stamp(other.parts[0], (0, 1, "ab" * 32))
    assert SlotStamp.source(stamp_at(pool, other.index)) == (0, 1, "ab" * 32)
    index = slot.index
    del slot
    assert SlotStamp.source(stamp_at(pool, index)) == (3, 77, "")  # what was given up is still there
    again = pool.take()
    assert again.index == index
    assert SlotStamp.source(stamp_at(pool, index)) is None
    pool.stamp(again.parts[0], (3, 77, ""))
    assert stamp_at(pool, index) != first  # another time of the same expert


def test_who_stages_waits_for_what_settles() -> None:
    pool = make_pool(1)
    slots = [pool.take()]
    asked: list[int] = []
    threading.Timer(0.1, slots.clear).start()
    assert pool.take(asked.append).index == 0
    assert asked
    assert set(asked) == {0}


def test_who_waits_in_vain_is_told_and_who_is_cancelled_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_pool, "PATIENCE_S", 0.05)
    pool = make_pool(1)
    slot = pool.take()
    start_s = time.monotonic()
    with pytest.raises(ConfigError, match="expert pool"):
        pool.take(lambda _: None)
    assert time.monotonic() - start_s >= 0.05

    def cancelled(_: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        pool.take(cancelled)
    assert slot.index == 0


def test_a_slab_goes_with_pool_and_slots() -> None:
    memory = FreeingMemory()
    pool = make_pool(2, memory)
    part = pool.take().parts[1].fill_(5)
    del pool
    gc.collect()
    assert not memory.freed
    assert set(part.tolist()) == {5}
    del part
    gc.collect()
    assert len(memory.freed) == 1


def test_memory_without_handles_is_torchs() -> None:
    pool = ExpertPool(LAYOUT, None, SideCopies(torch.device("cpu"), 0, timeout_s=1.0))
    pool.grow(2)
    slots = [pool.take(), pool.take()]
    for slot in slots:
        slot.parts[0].fill_(slot.index + 1)
    assert [set(slot.parts[0].tolist()) for slot in slots] == [{1}, {2}]
    pool.grow(0)
    assert pool.num_slots == 2
