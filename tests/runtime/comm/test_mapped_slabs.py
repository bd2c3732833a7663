"""Slabs that ranks let each other read: what is mapped, what is not and why, and that nothing goes while somebody reads."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from tiny_checkpoints import run_ranks

from switchgear_runtime.comm import mapped_slabs
from switchgear_runtime.comm.host_memory import HostPeerMemory
from switchgear_runtime.comm.mapped_slabs import MappedSlabs, Slab
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.errors import TransportAborted, TransportError, TransportTimeout

TIMEOUT_S = 10.0


class CountingMemory(HostPeerMemory):
    """Knows what is mapped, and may be told that its device does not finish."""

    def __init__(self) -> None:
        super().__init__()
        self.num_mapped = 0
        self.is_stuck = False

    def map(self, handle: bytes, *, writable: bool = False, num_bytes: int | None = None) -> int:
        assert not writable
        address = super().map(handle, num_bytes=num_bytes)
        self.num_mapped += 1
        return address

    def unmap(self, address: int) -> None:
        super().unmap(address)
        self.num_mapped -= 1

    def mark(self) -> Callable[[], bool]:
        return lambda: not self.is_stuck


def slabs_of(memory: HostPeerMemory, rank: int) -> list[Slab]:
    """Two, of sizes and bytes that tell the rank."""
    slabs = [Slab(memory.allocate(4096 * (rank + n)), 4096 * (rank + n)) for n in (1, 2)]
    for n, slab in enumerate(slabs):
        ctypes.memset(slab.address, 16 * rank + n, slab.num_bytes)
    return slabs


def meet(rank: int, transport: Transport, memory: HostPeerMemory | None, **changes: Any) -> MappedSlabs:
    slabs = slabs_of(memory or HostPeerMemory(), rank)
    return MappedSlabs.meet(transport, memory, slabs, **{"layout": "as all have it", "timeout_s": TIMEOUT_S, **changes})


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_reads_every_slab(world_size: int) -> None:
    memories = [CountingMemory() for _ in range(world_size)]

    def run(rank: int, transport: Transport) -> None:
        found = meet(rank, transport, memories[rank])
        assert found.reaches_all
        for peer, slabs in enumerate(found.slabs_R):
            assert [slab.num_bytes for slab in slabs] == found.num_bytes_R[peer] == [4096 * (peer + n) for n in (1, 2)]
            with found.reading():
                for n, slab in enumerate(slabs):
                    assert ctypes.string_at(slab.address, slab.num_bytes) == bytes([16 * peer + n]) * slab.num_bytes
        assert memories[rank].num_mapped == 2 * (world_size - 1)
        transport.barrier(timeout_s=TIMEOUT_S)
        found.close()
        found.close()
        assert memories[rank].num_mapped == 0
        with pytest.raises(TransportAborted), found.reading():
            pass

    run_ranks(world_size, run)


def test_what_cannot_be_mapped_is_named_and_no_error() -> None:
    """Rank 1 has no handles, rank 2 another layout, and rank 3's process cannot be looked into."""
    memories = [None if rank == 1 else CountingMemory() for rank in range(4)]

    def run(rank: int, transport: Transport) -> dict[int, str]:
        memory = memories[rank]
        if rank == 3:
            assert memory is not None
            memory.handle = lambda _: b"nothing"  # type: ignore[method-assign]
        found = meet(rank, transport, memory, layout="another" if rank == 2 else "usual")
        assert not found.reaches_all
        assert all(not found.slabs_R[peer] for peer in found.reasons)
        transport.barrier(timeout_s=TIMEOUT_S)
        found.close()
        assert memory is None or memory.num_mapped == 0
        return found.reasons

    reasons = run_ranks(4, run)
    assert set(reasons[0]) == {1, 2, 3}
    assert "CuPy" in reasons[0][1]
    assert reasons[0][2] == "its layout is another, this rank's usual"
    assert "no handle" in reasons[0][3]
    assert set(reasons[1]) == {0, 2, 3}
    assert set(reasons[3]) == {1, 2}  # it can read rank 0 though nobody can read it


def test_other_machines_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = threading.local()
    monkeypatch.setattr(mapped_slabs, "_this_host", lambda: hosts.name)

    def run(rank: int, transport: Transport) -> dict[int, str]:
        hosts.name = f"host {rank // 2}"
        found = meet(rank, transport, HostPeerMemory())
        transport.barrier(timeout_s=TIMEOUT_S)
        found.close()
        return found.reasons

    for rank, reasons in enumerate(run_ranks(4, run)):
        assert reasons == {peer: "it is on another machine" for peer in range(4) if peer // 2 != rank // 2}


def test_nothing_is_unmapped_while_somebody_reads() -> None:
    memories = [CountingMemory() for _ in range(2)]

    def run(rank: int, transport: Transport) -> None:
        found = meet(rank, transport, memories[rank])
        reads, closed = threading.Event(), threading.Event()
        slab = found.slabs_R[1 - rank][0]

        def read() -> None:
            with found.reading():
                reads.set()
                assert closed.wait(TIMEOUT_S)
                assert ctypes.string_at(slab.address, slab.num_bytes) == bytes([16 * (1 - rank)]) * slab.num_bytes
                assert memories[rank].num_mapped == 2

        thread = threading.Thread(target=read)
        thread.start()
        assert reads.wait(TIMEOUT_S)
        found.close()  # waits for nobody
        closed.set()
        thread.join(TIMEOUT_S)
        assert memories[rank].num_mapped == 0
        transport.barrier(timeout_s=TIMEOUT_S)

    run_ranks(2, run)


def test_what_a_stuck_device_may_read_stays_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_slabs, "CLOSE_WAIT_S", 0.05)
    memories = [CountingMemory() for _ in range(2)]

    def run(rank: int, transport: Transport) -> None:
        found = meet(rank, transport, memories[rank])
        transport.barrier(timeout_s=TIMEOUT_S)
        memories[rank].is_stuck = rank == 1
        found.close()

    run_ranks(2, run)
    assert [memory.num_mapped for memory in memories] == [0, 2]


@pytest.mark.parametrize(
    "told",
    [b"", b"\xc1", msgspec.msgpack.encode({"host": "h", "layout": "l", "slabs": [{"num_bytes": 0, "handle": b""}]})],
)
def test_a_rank_that_tells_nonsense_is_named(told: bytes) -> None:
    memory = CountingMemory()

    def run(rank: int, transport: Transport) -> None:
        if rank == 1:
            transport.all_to_all_v([told] * 2, timeout_s=TIMEOUT_S)
            return
        with pytest.raises(TransportError, match="rank 1 told of its slabs") as caught:
            meet(rank, transport, memory)
        assert caught.value.peers == (1,)
        assert memory.num_mapped == 0

    run_ranks(2, run)


def test_a_rank_that_does_not_come_is_waited_for_and_named() -> None:
    def run(rank: int, transport: Transport) -> None:
        if rank == 0:
            with pytest.raises(TransportTimeout) as caught:
                meet(rank, transport, CountingMemory(), timeout_s=0.3)
            assert caught.value.peers == (1,)

    run_ranks(2, run)
