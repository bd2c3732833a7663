"""Large pieces of device memory that the ranks of a generation let each other read: `MappedSlabs`.

Each rank tells the others, over the hosts' transport, the handles of its slabs and how they are laid out; who is on the
same machine maps them. What cannot be mapped is known with its reason, and is no error: whoever wanted to read there
takes another way. Mappings go with the generation: `close` waits for no peer.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from switchgear_runtime.comm.peer_memory import PeerMemory
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.errors import TransportAborted, TransportError

SLABS_MAX = 64
CLOSE_WAIT_S = 2.0  # for this rank's own device, whose kernels may still read what is about to be unmapped

log = logging.getLogger(__name__)


class Slab(NamedTuple):
    """One allocation of a PeerMemory."""

    address: int
    num_bytes: int


class _ToldSlab(msgspec.Struct, frozen=True):
    num_bytes: Annotated[int, msgspec.Meta(ge=1)]
    handle: Annotated[bytes, msgspec.Meta(max_length=256)]


class _Told(msgspec.Struct, frozen=True):
    """By one rank. `host`: the machine, by its boot; `layout`: what must be equal for the bytes to mean the same."""

    host: Annotated[str, msgspec.Meta(max_length=64)]
    layout: Annotated[str, msgspec.Meta(max_length=256)]
    slabs: Annotated[tuple[_ToldSlab, ...], msgspec.Meta(max_length=SLABS_MAX)]


class MappedSlabs:
    """Of all ranks, as one rank reads them. `slabs_R`: this rank's own as they are, others' where they are mapped;
    `reasons`: by rank, why not. `close` from the thread that computes; `reading` from any."""

    def __init__(self, memory: PeerMemory | None, rank: int, reads_are_done: Callable[[], bool]) -> None:
        self.rank = rank
        self.slabs_R: list[list[Slab]] = []
        self.num_bytes_R: list[list[int]] = []  # of every rank's slabs, mapped or not
        self.reasons: dict[int, str] = {}
        self._memory = memory
        self._mapped: list[int] = []
        self._lock = threading.Lock()
        self._num_readers = 0
        self._is_closed = False
        self._is_done: Callable[[], bool] = lambda: True  # whether this rank's kernels have ended since `close`
        self._reads_are_done = reads_are_done

    @classmethod
    def meet(
        cls,
        transport: Transport,
        memory: PeerMemory | None,
        slabs: Sequence[Slab],
        *,
        layout: str,
        timeout_s: float,
        reads_are_done: Callable[[], bool] = lambda: True,
    ) -> MappedSlabs:
        """All ranks call it at the same place. `memory`: None where slabs have no handles. Errors are the transport's.
        `reads_are_done`: whether copies have ended that were made inside `reading`, also those nobody waited for."""
        assert len(slabs) <= SLABS_MAX
        told = _Told(host=_this_host(), layout=layout, slabs=_handles(memory, slabs, transport.rank))
        found = cls(memory, transport.rank, reads_are_done)
        try:
            for peer, theirs in enumerate(_tell(transport, told, timeout_s)):
                found._add(peer, theirs, slabs if peer == transport.rank else None, told)
        except BaseException:
            found.close()
            raise
        return found

    @property
    def reaches_all(self) -> bool:
        """Whether this rank can read every rank's slabs."""
        return not self.reasons

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Nothing is unmapped inside. TransportAborted once closed."""
        with self._lock:
            if self._is_closed:
                raise TransportAborted("the generation is over", rank=self.rank)
            self._num_readers += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_readers -= 1
                is_last = self._is_closed and not self._num_readers
            if is_last:
                self._unmap()

    def close(self) -> None:
        """Idempotent. Unmaps now, or when the last who reads has done so."""
        with self._lock:
            if self._is_closed:
                return
            if self._mapped and self._memory is not None:
                self._is_done = self._memory.mark()
            self._is_closed = True
            is_last = not self._num_readers
        if is_last:
            self._unmap()

    def _add(self, peer: int, theirs: _Told, own: Sequence[Slab] | None, mine: _Told) -> None:
        self.num_bytes_R.append([slab.num_bytes for slab in theirs.slabs])
        self.slabs_R.append([])
        if own is not None:
            self.num_bytes_R[peer] = [slab.num_bytes for slab in own]
            self.slabs_R[peer] = list(own)
            return
        reason = self._obstacle(theirs, mine)
        if not reason:
            assert self._memory is not None
            try:
                for slab in theirs.slabs:
                    self._mapped.append(self._memory.map(slab.handle, num_bytes=slab.num_bytes))
                    self.slabs_R[peer].append(Slab(self._mapped[-1], slab.num_bytes))
            except Exception as error:  # noqa: BLE001 - whatever a driver raises: other ways are left
                reason = f"{type(error).__name__}: {error}"
                self.slabs_R[peer] = []
        if reason:
            self.reasons[peer] = reason
            log.info("rank %d: the memory of rank %d is not mapped: %s", self.rank, peer, reason)

    def _obstacle(self, theirs: _Told, mine: _Told) -> str:
        if theirs.host != mine.host:
            return "it is on another machine"
        if self._memory is None or not theirs.slabs:
            return "a device's memory has handles only where CuPy is installed"
        if theirs.layout != mine.layout:
            return f"its layout is {theirs.layout}, this rank's {mine.layout}"
        return ""

    def _unmap(self) -> None:
        """A kernel that reads unmapped memory breaks its process's device for good, so what a stuck device may still
        read stays mapped until the process ends."""
        deadline_s = time.monotonic() + CLOSE_WAIT_S
        while not (self._is_done() and self._reads_are_done()):
            if time.monotonic() >= deadline_s:
                log.warning("rank %d: its own device does not finish; peers' memory stays mapped", self.rank)
                return
            time.sleep(0.0005)
        for address in self._mapped:
            assert self._memory is not None
            self._memory.unmap(address)
        self._mapped = []


def _handles(memory: PeerMemory | None, slabs: Sequence[Slab], rank: int) -> tuple[_ToldSlab, ...]:
    if memory is None:
        return ()
    try:
        return tuple(_ToldSlab(num_bytes, memory.handle(at)) for at, num_bytes in slabs)
    except Exception as error:  # noqa: BLE001 - whatever a driver raises: other ways are left
        log.warning("rank %d: its experts' memory cannot be mapped by others: %s", rank, error)
        return ()


def _tell(transport: Transport, told: _Told, timeout_s: float) -> list[_Told]:
    views = transport.all_to_all_v([msgspec.msgpack.encode(told)] * transport.world_size, timeout_s=timeout_s)
    answers = []
    for peer, view in enumerate(views):
        try:
            answers.append(msgspec.msgpack.decode(bytes(view), type=_Told))
        except msgspec.MsgspecError as error:
            text = f"rank {transport.rank}: what rank {peer} told of its slabs is malformed: {error}"
            raise TransportError(text, rank=transport.rank, peers=(peer,)) from None
    return answers


def _this_host() -> str:
    """The machine, and its boot; processes in other containers have the same."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return secrets.token_hex(16)  # nobody else says the same
