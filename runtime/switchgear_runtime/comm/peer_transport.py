"""Rows between ranks that map each other's device memory, on one host: `PeerTransport`.

What NCCL refuses, several ranks on one GPU, works here, and so does any pair of GPUs that are peers. Each rank has an inbox
with a place for every source, twice: round n writes into its half while n - 1's may still be read. An exchange is lengths
over the hosts' transport (everybody is there; all see the largest, and so know the number of rounds), then rounds: copies
straight into the peers' inboxes, a barrier once this rank's copies have finished, and copies out of its own inbox.

STATUS: has run on no GPU yet; its tests run over host memory that passes for a device's.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise

import torch

from switchgear_runtime.comm.beside_hosts import BesideHosts, part_of
from switchgear_runtime.comm.device_exchange import HostStaged, Parts
from switchgear_runtime.comm.device_rounds import among_all
from switchgear_runtime.comm.peer_memory import CudaPeerMemory, PeerMemory, has_cupy
from switchgear_runtime.comm.peer_region import PeerRegion
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.errors import TransportTimeout

INBOX_BYTES = 256 << 20  # larger exchanges take more rounds. cuda/device_footprint.py has room for some
BARRIER_GRACE_S = 1.0  # so that who comes last names whom it waited for
ALIGNMENT = 256
NUM_HALVES = 2


def over_peer_memory(control: Transport, device: torch.device, *, timeout_s: float) -> Transport:
    """`control` with peer memory beside it; `control` itself unless every rank has CuPy and is on this host."""
    if not getattr(control, "is_one_host", False):
        return control
    have = control.all_gather(bytes([has_cupy()]), timeout_s=timeout_s)
    return PeerTransport(control, CudaPeerMemory(device)) if all(given[0] for given in have) else control


class PeerTransport(BesideHosts):
    """A Transport, by `control`, and a DeviceExchange. `meet`, or the first exchange, makes the inboxes; whoever owns this
    closes and frees `region`, after an error, too. Where a rank cannot map the others', rows go by way of the host."""

    def __init__(self, control: Transport, memory: PeerMemory, *, inbox_bytes: int = INBOX_BYTES) -> None:
        super().__init__(control)
        self._memory = memory
        self._inbox_bytes = inbox_bytes
        # Of an inbox, what one source may write in one half.
        self._place_bytes = inbox_bytes // (NUM_HALVES * control.world_size * ALIGNMENT) * ALIGNMENT
        assert self._place_bytes > 0, f"an inbox of {inbox_bytes} bytes has no room for {control.world_size} ranks"
        self._half = 0
        self._has_met = False
        self._staged: HostStaged | None = None  # where one rank could not map
        self.region = PeerRegion(memory, control.rank)

    def meet(self, *, timeout_s: float) -> None:
        """All ranks at once. Idempotent."""
        with self._giving_up():
            if not self._has_met and not self.region.meet(self._control, self._inbox_bytes, timeout_s=timeout_s):
                self._staged = HostStaged(self._control)
        self._has_met = True

    def exchange(self, send: Sequence[Parts], *, timeout_s: float) -> list[Parts]:
        """As DeviceExchange. On the current stream; returns when every rank's copies have arrived."""
        self.meet(timeout_s=timeout_s)
        deadline_s = time.monotonic() + timeout_s
        with self._giving_up():
            if self._staged is not None:
                return self._staged.exchange(send, timeout_s=timeout_s)
            lengths_RRP = self._all_lengths(send, timeout_s)
            received = self._room([rows[self.rank] for rows in lengths_RRP])
            largest = max(_span(lengths) for rows in lengths_RRP for lengths in rows)
            for begin in range(0, largest, self._place_bytes):
                self._half = (self._half + 1) % NUM_HALVES
                window = (begin, begin + self._place_bytes)
                self._write(send, lengths_RRP[self.rank], window)
                # Behind the copies out of the other half, too, which peers write into after the barrier.
                self._finish(self._memory.mark(), deadline_s, timeout_s)
                self._control.barrier(timeout_s=max(0.0, deadline_s + BARRIER_GRACE_S - time.monotonic()))
                self._read(received, [rows[self.rank] for rows in lengths_RRP], window)
        self._count(send, received)
        return received

    def _all_lengths(self, send: Sequence[Parts], timeout_s: float) -> list[list[tuple[int, ...]]]:
        """[source][destination][part]: of all ranks, so that all make as many rounds."""
        mine = [[end - begin for begin, end in pairwise(parts.offsets)] for parts in send]
        num_parts, world_size = len(send), self.world_size
        row = struct.pack(f"<{num_parts * world_size}Q", *(n for peer in zip(*mine, strict=True) for n in peer))
        told = self._control.all_to_all_v([row] * world_size, timeout_s=timeout_s)
        return [list(struct.iter_unpack(f"<{num_parts}Q", view)) for view in told]

    def _room(self, lengths_RP: Sequence[tuple[int, ...]]) -> list[Parts]:
        """Uninitialized, for what all ranks send here."""
        return [
            Parts(torch.empty(sum(lengths_R), dtype=torch.uint8, device=self._memory.device), _starts(lengths_R))
            for lengths_R in zip(*lengths_RP, strict=True)
        ]

    def _write(self, send: Sequence[Parts], lengths_RP: Sequence[tuple[int, ...]], window: tuple[int, int]) -> None:
        for peer, lengths_P in enumerate(lengths_RP):
            place = self._place(self.region.addresses[peer], self.rank)
            for part, at, in_place, num_bytes in _pieces(lengths_P, window):
                begin, _ = part_of(send[part], peer)
                self._memory.copy(place + in_place, send[part].data.data_ptr() + begin + at, num_bytes)

    def _read(self, received: Sequence[Parts], lengths_RP: Sequence[tuple[int, ...]], window: tuple[int, int]) -> None:
        for source, lengths_P in enumerate(lengths_RP):
            place = self._place(self.region.own, source)
            for part, at, in_place, num_bytes in _pieces(lengths_P, window):
                begin, _ = part_of(received[part], source)
                self._memory.copy(received[part].data.data_ptr() + begin + at, place + in_place, num_bytes)

    def _place(self, inbox: int, source: int) -> int:
        return inbox + (self._half * self.world_size + source) * self._place_bytes

    def _finish(self, is_done: Callable[[], bool], deadline_s: float, timeout_s: float) -> None:
        while not is_done():
            if time.monotonic() >= deadline_s:
                (own,) = among_all(self._control, [self.rank])
                text = f"rank {own}: exchange: waited {timeout_s:.2f} s for this rank's own GPU"
                raise TransportTimeout(text, rank=own)
            time.sleep(0)

    def _give_up(self) -> None:
        """The region is not closed here: copies of this rank may still be under way, and kernels of its next step."""


def _pieces(lengths_P: Sequence[int], window: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """What of the parts from one rank to one other lies in a window of their bytes, each part aligned: part, where in it,
    where in the window, bytes."""
    for part, (start, length) in enumerate(zip(_starts(map(_aligned, lengths_P)), lengths_P, strict=False)):
        begin, end = max(start, window[0]), min(start + length, window[1])
        if begin < end:
            yield part, begin - start, begin - window[0], end - begin


def _starts(lengths: Iterable[int]) -> list[int]:
    return list(accumulate(lengths, initial=0))


def _span(lengths_P: Sequence[int]) -> int:
    return sum(map(_aligned, lengths_P))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
