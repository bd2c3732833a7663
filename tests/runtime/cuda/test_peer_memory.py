"""PeerTransport over host memory that passes for a device's (ranks as threads), which traps what IPC forbids."""

from __future__ import annotations

import ctypes
import random
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from device_messages import TIMEOUT_S, draw, exchange_and_check
from tiny_checkpoints import run_ranks

from switchgear_runtime.comm.device_exchange import Parts
from switchgear_runtime.comm.peer_memory import ALIGNMENT, IPC_BYTES, CudaPeerMemory, PeerTransport, over_peer_memory
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.errors import TransportAborted, TransportTimeout

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


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_exchanges_arrive_whole(world_size: int) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    everything: dict[int, Allocation] = {}
    memories = [FakePeerMemory(everything) for _ in range(world_size)]

    def run(rank: int, control: Transport) -> int:
        transport = PeerTransport(control, memories[rank])
        (nothing,) = transport.exchange(
            [Parts(torch.empty(0, dtype=torch.uint8), [0] * (world_size + 1))], timeout_s=1.0
        )
        assert nothing.offsets == [0] * (world_size + 1)
        crossed = exchange_and_check(transport, rank, world_size, seed)
        for num_bytes in (0, 70_000, 5, 300_000, 1):  # beyond a place: all grow together
            offsets = [num_bytes * peer for peer in range(world_size + 1)]
            data = torch.arange(offsets[-1]).to(torch.uint8) ^ rank
            (got,) = transport.exchange([Parts(data, offsets)], timeout_s=TIMEOUT_S)
            mine = torch.arange(offsets[-1]).to(torch.uint8)[offsets[rank] : offsets[rank + 1]]
            assert torch.equal(got.data, torch.cat([mine ^ source for source in range(world_size)])), f"seed {seed}"
            crossed += num_bytes * (world_size - 1)
        assert transport.stats().sent_bytes - control.stats().sent_bytes == crossed, f"seed {seed}"
        assert transport.all_gather(bytes([rank]), timeout_s=TIMEOUT_S) == [bytes([r]) for r in range(world_size)]
        assert (memories[rank].num_allocations, memories[rank].num_frees) == (3, 2)
        transport.barrier(timeout_s=TIMEOUT_S)
        transport.close()
        transport.close()
        return crossed

    assert (sum(run_ranks(world_size, run)) > 0) == (world_size > 1)
    assert not any(memory.mapped for memory in memories)


def test_an_own_gpu_that_never_finishes() -> None:
    everything: dict[int, Allocation] = {}
    memories = [FakePeerMemory(everything) for _ in range(2)]

    def run(rank: int, control: Transport) -> None:
        transport = PeerTransport(control, memories[rank])
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
        assert not memories[rank].mapped

    run_ranks(2, run)


def test_a_gpus_memory_is_mapped_by_others_and_by_this_process_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a CuPy that only notes its calls: CUDA opens no handle of its own process."""
    calls: list[str] = []
    opened = {b"theirs": 77}

    def note(name: str, result: Callable[..., object]) -> Callable[..., object]:
        return lambda *given: (calls.append(name), result(*given))[1]

    runtime = SimpleNamespace(
        malloc=note("malloc", lambda num_bytes: 4096 if num_bytes == IPC_BYTES else 0),
        memsetAsync=lambda *_: None,
        free=note("free", lambda _: None),
        ipcGetMemHandle=note("get", lambda address: b"of %d" % address),
        ipcOpenMemHandle=note("open", lambda handle, _: opened[handle]),
        ipcCloseMemHandle=note("close", lambda _: None),
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(CudaPeerMemory, "mark", lambda _: lambda: True)
    first, second, other = (CudaPeerMemory(torch.device("cuda", n)) for n in (0, 0, 1))
    mine = first.allocate(100)
    assert mine == 4096  # a block of its own
    handle = first.handle(mine)
    assert second.map(handle) == mine  # a rank that is another thread
    second.unmap(mine)
    with pytest.raises(OSError, match="this process's own, on cuda:0"):
        other.map(handle)
    assert calls == ["malloc", "get"]
    theirs = second.map(b"theirs")
    second.unmap(theirs)
    first.free(mine)
    assert calls == ["malloc", "get", "open", "close", "free"]
    opened[handle] = 88  # another process's, of the same bytes
    assert second.map(handle) == 88


def test_only_where_all_ranks_share_a_host() -> None:
    def run(_rank: int, control: Transport) -> None:
        assert over_peer_memory(control, torch.device("cuda", 0), timeout_s=TIMEOUT_S) is control

    run_ranks(2, run)
