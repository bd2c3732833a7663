"""Copies beside the steps, in pieces: whole, paced, and through pinned buffers that are not refilled too early.

A stream here is one that passes for a GPU's: what it was given ends only after some looks.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from switchgear_runtime.comm.host_memory import HostPeerMemory
from switchgear_runtime.cuda import side_copies
from switchgear_runtime.cuda.side_copies import NUM_BUFFERS, SideCopies
from switchgear_runtime.errors import TransportTimeout

PIECE_BYTES = 64


class SlowEvent:
    def __init__(self, num_looks: int) -> None:
        self.num_looks = num_looks

    def query(self) -> bool:
        self.num_looks -= 1
        return self.num_looks <= 0


class SlowStream:
    """Notes whether a buffer's last piece had left it when the next one was on its way."""

    def __init__(self, num_looks: int) -> None:
        self.events: list[SlowEvent] = []
        self._num_looks = num_looks

    def record_event(self) -> SlowEvent:
        if len(self.events) >= NUM_BUFFERS:
            assert self.events[-NUM_BUFFERS].num_looks <= 0, "a buffer was refilled while its piece crossed"
        self.events.append(SlowEvent(self._num_looks))
        return self.events[-1]


def make_copies(monkeypatch: pytest.MonkeyPatch, num_looks: int | None) -> tuple[SideCopies, Any]:
    monkeypatch.setattr(side_copies, "PIECE_BYTES", PIECE_BYTES)
    copies = SideCopies(torch.device("cpu"), 3, timeout_s=0.2)
    if num_looks is None:
        return copies, None
    stream: Any = SlowStream(num_looks)
    copies._stream = stream
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(side_copies, "_pinned_buffer", lambda: torch.empty(PIECE_BYTES, dtype=torch.uint8))
    return copies, stream


@pytest.mark.parametrize("num_bytes", [0, 1, 63, 64, 65, 128, 1000])
@pytest.mark.parametrize("num_looks", [None, 1, 5])
def test_what_is_written_is_whole_and_paced(
    num_bytes: int, num_looks: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies, stream = make_copies(monkeypatch, num_looks)
    for turn in range(3):  # buffers are used again
        source = torch.randint(256, (num_bytes,), dtype=torch.uint8)
        to, paced = torch.zeros(num_bytes, dtype=torch.uint8), []
        copies.write(to, source, paced.append)
        assert torch.equal(to, source)
        assert sum(paced) == num_bytes
        assert max(paced, default=0) <= PIECE_BYTES
        if stream is not None:
            assert len(stream.events) == (turn + 1) * -(-num_bytes // PIECE_BYTES)
            assert all(event.num_looks <= 0 for event in stream.events[-NUM_BUFFERS:])  # complete on return


def test_a_cancelled_write_leaves_its_buffers_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    copies, _ = make_copies(monkeypatch, 4)

    def cancelled(_: int) -> None:
        raise InterruptedError

    source = torch.randint(256, (500,), dtype=torch.uint8)
    with pytest.raises(InterruptedError):
        copies.write(torch.zeros(500, dtype=torch.uint8), source, cancelled)
    to = torch.zeros(500, dtype=torch.uint8)
    copies.write(to, source)
    assert torch.equal(to, source)


def test_a_device_that_does_not_finish_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    copies, _ = make_copies(monkeypatch, 1 << 40)
    with pytest.raises(TransportTimeout, match=r"rank 3: waited 0\.2 s for its own device") as caught:
        copies.write(torch.zeros(10, dtype=torch.uint8), torch.ones(10, dtype=torch.uint8))
    assert caught.value.rank == 3
    assert caught.value.peers == ()


def test_what_is_pulled_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    copies, _ = make_copies(monkeypatch, None)
    memory = HostPeerMemory()
    address = memory.allocate(300)
    source = torch.randint(256, (300,), dtype=torch.uint8)
    memory.copy(address, source.data_ptr(), 300)
    to, paced = torch.zeros(300, dtype=torch.uint8), []
    copies.pull(memory, to, address, paced.append, peer=1)
    assert torch.equal(to, source)
    assert paced == [64, 64, 64, 64, 44]
    assert copies.pulled_bytes == 300
    assert copies.read(memory, address + 7, 9, peer=1) == bytes(source[7:16].tolist())
    assert copies.pulled_bytes == 300
    memory.free(address)
