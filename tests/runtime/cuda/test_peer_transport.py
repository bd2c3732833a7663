"""PeerTransport over host memory that passes for a device's (ranks as threads), which traps what IPC forbids."""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import pytest
import torch
from device_messages import TIMEOUT_S, draw, exchange_and_check
from layer_run import HIDDEN, kernels, payload
from tiny_checkpoints import run_ranks

from switchgear_runtime.comm.device_exchange import Parts
from switchgear_runtime.comm.peer_region import PeerRegion
from switchgear_runtime.comm.peer_regions import PeerRegions
from switchgear_runtime.comm.peer_transport import ALIGNMENT, PeerTransport, over_peer_memory
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.cuda.group_choice import GenerationGroups
from switchgear_runtime.errors import TransportAborted, TransportTimeout
from switchgear_runtime.generation import GenerationDescriptor

GARBAGE = 0xDB
LOCK = threading.Lock()


@dataclass
class Allocation:
    memory: ctypes.Array[ctypes.c_char]
    num_maps: int = 0  # by other ranks


class FakePeerMemory:
    """One per rank; `all_memory` has every allocation by address."""

    device = torch.device("cpu")

    def __init__(self, all_memory: dict[int, Allocation]) -> None:
        self._all = all_memory
        self._mine: set[int] = set()
        self.mapped: set[int] = set()
        self.is_stuck = False
        self.num_allocations = self.num_frees = 0

    def allocate(self, num_bytes: int) -> int:
        memory = ctypes.create_string_buffer(bytes([GARBAGE]) * (num_bytes + ALIGNMENT), num_bytes + ALIGNMENT)
        address = ctypes.addressof(memory)
        self._all[address] = Allocation(memory)
        self._mine.add(address)
        self.num_allocations += 1
        return address

    def free(self, address: int) -> None:
        self._mine.remove(address)
        assert self._all[address].num_maps == 0, "freed while a peer maps it"
        self.num_frees += 1
        ctypes.memset(address, GARBAGE, len(self._all[address].memory))  # a peer that reads it later would show

    def handle(self, address: int) -> bytes:
        assert address in self._mine
        return address.to_bytes(8, "little") + bytes(56)

    def map(self, handle: bytes, *, writable: bool = False, num_bytes: int | None = None) -> int:  # noqa: ARG002
        address = int.from_bytes(handle[:8], "little")
        assert address in self._all
        assert address not in self._mine, "a process cannot map its own memory"
        self.mapped.add(address)
        with LOCK:
            self._all[address].num_maps += 1
        return address

    def unmap(self, address: int) -> None:
        time.sleep(0.002)  # so that a rank that does not wait for it frees too early
        self.mapped.remove(address)
        with LOCK:
            self._all[address].num_maps -= 1

    def copy(self, to: int, source: int, num_bytes: int) -> None:
        ctypes.memmove(to, source, num_bytes)

    def mark(self) -> Callable[[], bool]:
        return lambda: not self.is_stuck


@pytest.mark.parametrize("inbox_bytes", [1 << 13, 1 << 20])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_exchanges_arrive_whole(world_size: int, inbox_bytes: int) -> None:
    """In rounds, where an inbox has no room for all at once."""
    seed = random.SystemRandom().randrange(1 << 30)
    everything: dict[int, Allocation] = {}
    memories = [FakePeerMemory(everything) for _ in range(world_size)]
    all_closed = threading.Barrier(world_size)

    def run(rank: int, control: Transport) -> int:
        transport = PeerTransport(control, memories[rank], inbox_bytes=inbox_bytes)
        (nothing,) = transport.exchange(
            [Parts(torch.empty(0, dtype=torch.uint8), [0] * (world_size + 1))], timeout_s=1.0
        )
        assert nothing.offsets == [0] * (world_size + 1)
        crossed = exchange_and_check(transport, rank, world_size, seed)
        for num_bytes in (0, 70_000, 5, 300_000, 1):
            offsets = [num_bytes * peer for peer in range(world_size + 1)]
            data = torch.arange(offsets[-1]).to(torch.uint8) ^ rank
            (got,) = transport.exchange([Parts(data, offsets)], timeout_s=TIMEOUT_S)
            mine = torch.arange(offsets[-1]).to(torch.uint8)[offsets[rank] : offsets[rank + 1]]
            assert torch.equal(got.data, torch.cat([mine ^ source for source in range(world_size)])), f"seed {seed}"
            crossed += num_bytes * (world_size - 1)
        assert transport.stats().sent_bytes - control.stats().sent_bytes == crossed, f"seed {seed}"
        assert transport.all_gather(bytes([rank]), timeout_s=TIMEOUT_S) == [bytes([r]) for r in range(world_size)]
        transport.barrier(timeout_s=TIMEOUT_S)
        transport.close()
        transport.close()
        assert (memories[rank].num_allocations, memories[rank].num_frees) == (1, 0)
        transport.region.close()
        transport.region.close()
        all_closed.wait(TIMEOUT_S)  # as in the next generation
        transport.region.free()
        transport.region.free()
        assert (memories[rank].num_allocations, memories[rank].num_frees) == (1, 1)
        return crossed

    assert (sum(run_ranks(world_size, run)) > 0) == (world_size > 1)
    assert not any(memory.mapped for memory in memories)


def test_an_own_gpu_that_never_finishes() -> None:
    everything: dict[int, Allocation] = {}
    memories = [FakePeerMemory(everything) for _ in range(2)]

    def run(rank: int, control: Transport) -> None:
        transport = PeerTransport(control, memories[rank], inbox_bytes=1 << 16)
        data, offsets = draw(3, 0, rank, 2, 0)
        transport.exchange([Parts(data, offsets)], timeout_s=TIMEOUT_S)
        memories[rank].is_stuck = rank == 1
        if rank == 1:
            with pytest.raises(TransportTimeout, match="this rank's own GPU"):
                transport.exchange([Parts(data, offsets)], timeout_s=0.3)
            transport.abort("stuck")
        else:
            with pytest.raises(TransportAborted, match="stuck"):
                transport.exchange([Parts(data, offsets)], timeout_s=TIMEOUT_S)
        assert memories[rank].mapped  # copies may be under way
        transport.region.close()
        assert not memories[rank].mapped

    run_ranks(2, run)


class Generations:
    """Of three ranks with inboxes, one after the other, as DeviceDecoder has them; some are given up."""

    def __init__(self) -> None:
        everything: dict[int, Allocation] = {}
        self.memories = [FakePeerMemory(everything) for _ in range(3)]
        self.regions = [PeerRegions() for _ in range(3)]
        self.number = 0

    def run(self, num_ranks: int, *, left_in: int | None = None, fails: bool = False) -> None:
        self.number += 1
        descriptor = GenerationDescriptor(
            term=1, generation=self.number, world_size=num_ranks, epoch=0, channel="", left_in=left_in
        )

        def run(rank: int, control: Transport) -> None:
            transport = PeerTransport(control, self.memories[rank], inbox_bytes=1 << 16)
            self.regions[rank].close()
            with suppress(TransportAborted) if fails else nullcontext():
                self._run(rank, transport, descriptor, fails=fails)
            transport.close()

        run_ranks(num_ranks, run)

    def _run(self, rank: int, transport: PeerTransport, descriptor: GenerationDescriptor, *, fails: bool) -> None:
        num_ranks = transport.world_size
        groups = GenerationGroups.of(
            kernels(),
            transport,
            payload(),
            regions=self.regions[rank],
            descriptor=descriptor,
            peer_faults_R1=torch.zeros(num_ranks + 1, dtype=torch.int32),
            max_tokens=0,
            top_k=1,
            hidden=HIDDEN,
            dispatch="auto",
            max_batched_tokens=8,
            timeout_s=TIMEOUT_S,
        )
        if fails and rank == 0:
            transport.abort("as if it had died")
        transport.exchange([Parts(*draw(3, 0, rank, num_ranks, 0))], timeout_s=TIMEOUT_S)
        transport.barrier(timeout_s=TIMEOUT_S)
        groups.close()

    def held(self) -> list[int]:
        return [memory.num_allocations - memory.num_frees for memory in self.memories]


def test_the_next_generation_frees_what_the_last_ones_held() -> None:
    generations = Generations()
    generations.run(3)
    assert generations.held() == [1, 1, 1]
    generations.run(3)
    assert generations.held() == [1, 1, 1]
    for _ in range(3):
        generations.run(3, fails=True)
    generations.run(3)
    assert generations.held() == [1, 1, 1]


def test_what_one_who_leaves_may_map_is_kept_until_it_is_gone() -> None:
    generations = Generations()
    generations.run(3)
    generations.run(2, left_in=1)  # the third still maps both
    assert generations.held() == [2, 2, 1]
    generations.run(2, left_in=1)
    assert generations.held() == [3, 3, 1]
    generations.regions[2].close()  # it ends
    generations.run(2)
    assert generations.held() == [1, 1, 1]


def test_what_one_who_leaves_has_closed_itself_is_freed() -> None:
    generations = Generations()
    generations.run(3)
    generations.run(3)
    generations.run(2, left_in=2)  # the first's are unmapped since the second began
    assert generations.held() == [2, 2, 1]
    generations.regions[2].close()
    generations.run(1, left_in=3)  # another one leaves
    assert generations.held() == [2, 2, 1]


def test_memory_that_one_rank_lacks_leaves_all_without() -> None:
    everything: dict[int, Allocation] = {}
    memories = [FakePeerMemory(everything) for _ in range(3)]

    def refuse(_num_bytes: int) -> int:
        raise MemoryError("no room")

    memories[1].allocate = refuse  # type: ignore[method-assign]

    def run(rank: int, control: Transport) -> None:
        transport = PeerTransport(control, memories[rank])
        exchange_and_check(transport, rank, 3, seed=5)  # by way of the host
        assert (memories[rank].num_allocations, memories[rank].num_frees) == ((0, 0) if rank == 1 else (1, 1))

    run_ranks(3, run)
    assert not any(memory.mapped for memory in memories)


def test_what_a_driver_does_not_unmap_is_tried_again() -> None:
    everything: dict[int, Allocation] = {}
    memories = [FakePeerMemory(everything) for _ in range(2)]

    def refuse(_address: int) -> None:
        raise RuntimeError("no context")

    def run(rank: int, control: Transport) -> None:
        region = PeerRegion(memories[rank], rank)
        assert region.meet(control, 1 << 10, timeout_s=TIMEOUT_S)
        unmap, memories[rank].unmap = memories[rank].unmap, refuse  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="no context"):
            region.close()
        memories[rank].unmap = unmap  # type: ignore[method-assign]
        region.close()
        assert not memories[rank].mapped

    run_ranks(2, run)


def test_only_where_all_ranks_share_a_host() -> None:
    def run(_rank: int, control: Transport) -> None:
        assert over_peer_memory(control, torch.device("cuda", 0), timeout_s=TIMEOUT_S) is control

    run_ranks(2, run)
