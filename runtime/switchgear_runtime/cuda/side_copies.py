"""Copies beside the steps: `SideCopies`, from host memory or from a peer's, in pieces, on a stream of their own.

Whoever stages experts uses them: its pace is told of each piece, so a copy takes what bandwidth it is given and no more,
and ends where its order is cancelled. What then still is on the stream ends before anything later on it, so memory that
was given up may be written again by this way. On the host, where there is no stream, a piece is a plain copy.

STATUS: has run over host memory only, on no GPU yet.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from switchgear_runtime.comm.peer_memory import PeerMemory
from switchgear_runtime.errors import TransportTimeout
from switchgear_runtime.model.blob_file import Pace

PIECE_BYTES = 4 << 20  # tens of microseconds over NVLink: a step that wants the link waits no longer
NUM_BUFFERS = 2  # pinned: one is filled while the other's piece crosses
LOWEST_PRIORITY = 0  # CUDA's: a step's stream that asks for more goes first
_POLL_S = 0.00005


class SideCopies:
    """Of one device. One copy at a time; any thread."""

    def __init__(self, device: torch.device, rank: int, *, timeout_s: float) -> None:
        self.device = device
        self._rank = rank
        self._timeout_s = timeout_s
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device, priority=LOWEST_PRIORITY)  # type: ignore[no-untyped-call]
        self._buffers: list[Tensor] = []
        self._sent: list[Callable[[], bool]] = []  # by buffer: whether its last piece has left it
        self._lock = threading.Lock()
        self.pulled_bytes = 0  # from peers
        self._last_pull: Callable[[], bool] = lambda: True

    def write(self, to: Tensor, source: Tensor, pace: Pace | None = None) -> None:
        """uint8 of the host into uint8 of the device. Complete when it returns."""
        with self._lock:
            for number, (begin, end) in enumerate(_pieces(to.numel())):
                if self._stream is None:
                    to[begin:end].copy_(source[begin:end])
                else:
                    self._write_pinned(number % NUM_BUFFERS, to[begin:end], source[begin:end], self._stream)
                if pace is not None:
                    pace(end - begin)
            for is_done in self._sent:
                self._wait(is_done, "its own device")

    def pull(self, memory: PeerMemory, to: Tensor, address: int, pace: Pace, *, peer: int) -> None:
        """A peer's mapped memory into uint8 of the device, device to device. Complete when it returns."""
        with self._lock:
            for begin, end in _pieces(to.numel()):
                self._copy(memory, to.data_ptr() + begin, address + begin, end - begin, peer)
                self.pulled_bytes += end - begin
                pace(end - begin)

    def read(self, memory: PeerMemory, address: int, num_bytes: int, *, peer: int) -> bytes:
        """A few bytes of a peer's mapped memory, to the host."""
        with self._lock, self._current():  # whose stream torch then gives the memory to: another's may still use it
            few = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
            self._copy(memory, few.data_ptr(), address, num_bytes, peer)
            return bytes(few.cpu().numpy())

    def pulls_are_done(self) -> bool:
        """Also those that were not waited for. Copies on one stream end in order."""
        return self._last_pull()

    def _copy(self, memory: PeerMemory, to: int, source: int, num_bytes: int, peer: int) -> None:
        with self._current():
            memory.copy(to, source, num_bytes)
            is_done = self._last_pull = memory.mark()
        self._wait(is_done, f"a copy from rank {peer}'s memory", (peer,))

    def _write_pinned(self, number: int, to: Tensor, piece: Tensor, stream: torch.cuda.Stream) -> None:
        """By memory that the device reads by itself."""
        while len(self._buffers) < NUM_BUFFERS:
            self._buffers.append(_pinned_buffer())
            self._sent.append(lambda: True)
        self._wait(self._sent[number], "its own device")
        buffer = self._buffers[number][: piece.numel()].copy_(piece)
        with self._current():
            to.copy_(buffer, non_blocking=True)
        self._sent[number] = stream.record_event().query

    def _wait(self, is_done: Callable[[], bool], whom: str, peers: tuple[int, ...] = ()) -> None:
        deadline_s = time.monotonic() + self._timeout_s
        while not is_done():
            if time.monotonic() >= deadline_s:
                text = f"rank {self._rank}: waited {self._timeout_s:g} s for {whom}"
                raise TransportTimeout(text, rank=self._rank, peers=peers)
            time.sleep(_POLL_S)

    def _current(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _pinned_buffer() -> Tensor:
    return torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)


def _pieces(num_bytes: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, num_bytes, PIECE_BYTES):
        yield begin, min(begin + PIECE_BYTES, num_bytes)
