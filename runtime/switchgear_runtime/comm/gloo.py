"""Ranks on several hosts without MPI: `GlooTransport`, over TCP, in the clear.

Every call is one exchange: each rank sends each peer one message, a header and the first `mailbox_bytes` of the payload;
what is longer follows in a second one. The header says which call it belongs to and how long the payload is, so nobody
needs counts beforehand, ranks whose calls differ are told so, and at a deadline the headers show who has not come.

Three buffers a peer: the receive of call n + 1 is posted at the end of call n, while the views of calls n and n - 1 are
still valid. Two buffers to send from: the peer's message of call n + 1 shows that it has taken call n.
"""

from __future__ import annotations

import logging
import mmap
import struct
import threading
import time
from collections.abc import Collection, Sequence
from typing import Any, Never

from switchgear_runtime.comm.gloo_mesh import GlooMesh
from switchgear_runtime.comm.network import Network, check_network
from switchgear_runtime.comm.store import FailureNotes, Note, meet
from switchgear_runtime.comm.transport import HEADER_BYTES_MAX, TransportStats
from switchgear_runtime.errors import ConfigError, TransportAborted, TransportError, TransportTimeout

_HEADER = struct.Struct("<IIQQ")  # magic, kind of call, number of call, payload bytes
_HEADER_BYTES = 64  # padded, so that payloads are aligned
_MAGIC = 0x53474C4F  # "SGLO"
_NUM_RECEIVE, _NUM_SEND = 3, 2
_LINGER_S = 0.5  # for what was sent to leave this host; the receives are posted, so no peer need come for it
_MESSAGE_BYTES_MAX = 1 << 36  # beyond it, the header is no header
CALLS = ("all_gather", "all_to_all_v", "barrier")

log = logging.getLogger(__name__)


class _Room:
    """A header and a payload, in private memory that only grows."""

    def __init__(self, payload_bytes: int) -> None:
        self._make(payload_bytes)

    def _make(self, payload_bytes: int) -> None:
        self.view = memoryview(mmap.mmap(-1, _HEADER_BYTES + payload_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON))

    def grow(self, payload_bytes: int, keep_bytes: int) -> None:
        if _HEADER_BYTES + payload_bytes > len(self.view):
            old = self.view
            self._make(max(payload_bytes, min(2 * len(old), payload_bytes + (64 << 20))))
            self.view[: _HEADER_BYTES + keep_bytes] = old[: _HEADER_BYTES + keep_bytes]

    def header(self) -> tuple[int, int, int, int]:
        return _HEADER.unpack_from(self.view)

    def payload(self, start: int, end: int) -> memoryview:
        return self.view[_HEADER_BYTES + start : _HEADER_BYTES + end]


class GlooTransport:
    """One rank's end. Constructing it is the rendezvous, through the network's store.

    `peers`: with whom it exchanges; by default all. What is meant for another rank does not leave, and what comes from
    there is empty: hierarchical.py has another way for those.
    """

    def __init__(
        self,
        network: Network,
        rank: int,
        world_size: int,
        *,
        mailbox_bytes: int,
        timeout_s: float,
        peers: Collection[int] | None = None,
        notes: FailureNotes | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank} must be 0 to {world_size - 1}")
        if mailbox_bytes < 1:
            raise ConfigError(f"mailbox_bytes={mailbox_bytes} must be at least 1")
        self._rank = rank
        self._world_size = world_size
        self._peers = sorted(set(range(world_size) if peers is None else peers) - {rank})
        self._first_bytes = max(mailbox_bytes, HEADER_BYTES_MAX)
        self._notes = notes or FailureNotes(network.store, rank)
        self._lock = threading.Lock()  # of the three that follow
        self._abort_reason: str | None = None
        self._failure: TransportError | None = None
        self._closed = False
        self._num_calls = self._sent_bytes = self._received_bytes = 0
        self._call = self._turn = 0  # exchanges so far; those of them that were all_to_all_v
        self._kind = CALLS[0]
        self._receive = {peer: [_Room(self._first_bytes) for _ in range(_NUM_RECEIVE)] for peer in self._peers}
        self._send = {peer: [_Room(self._first_bytes) for _ in range(_NUM_SEND)] for peer in self._peers}
        self._in_flight: list[list[tuple[int, Any]]] = [[] for _ in range(_NUM_SEND)]
        self._long_sends: list[tuple[int, Any]] = []
        self._posted: list[tuple[int, Any]] = []
        self._left: int | None = None  # the first peer found gone between two calls
        self._mesh: GlooMesh | None = None
        if not self._peers:
            return
        check_network(network.address, trusted=network.trusted)
        deadline_s = time.monotonic() + timeout_s
        meet(network.store, rank, self._peers, timeout_s=timeout_s)
        remaining_s = max(deadline_s - time.monotonic(), 1.0)
        try:
            self._mesh = GlooMesh(network, rank, world_size, timeout_s=remaining_s)
            self._post()
        except (RuntimeError, TimeoutError) as error:
            self.close()
            text = f"rank {rank}: join: gloo could not connect from {network.address}: {error}"
            raise TransportTimeout(text, rank=rank) from error

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    @property
    def failed(self) -> bool:
        """Whether a call has raised a TransportError."""
        return self._failure is not None

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def all_gather(self, header: bytes, *, timeout_s: float) -> list[bytes]:
        if len(header) > HEADER_BYTES_MAX:
            raise ValueError(f"header has {len(header)} bytes, at most {HEADER_BYTES_MAX} fit")
        self.begin("all_gather", [header] * self._world_size)
        headers = [bytes(view) for view in self.finish(timeout_s=timeout_s)]
        headers[self._rank] = bytes(header)
        return headers

    def all_to_all_v(self, send: Sequence[memoryview | bytes], *, timeout_s: float) -> list[memoryview]:
        own = self.begin("all_to_all_v", send)
        views = self.finish(timeout_s=timeout_s)
        views[self._rank] = own
        return views

    def barrier(self, *, timeout_s: float) -> None:
        self.begin("barrier", [b""] * self._world_size)
        self.finish(timeout_s=timeout_s)

    def abort(self, reason: str) -> None:
        with self._lock:
            if self._closed or self._abort_reason is not None:
                return
            self._abort_reason = reason
            mesh = self._mesh
        self._notes.leave(Note.of_abort(self._rank, reason))
        if mesh is not None:
            mesh.wake()
            mesh.sever()

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            mesh, self._mesh = self._mesh, None
            whole = self._failure is None and self._abort_reason is None
        if mesh is not None:
            if whole:
                self._linger(mesh)
            self._notes.leave(Note.of_close(self._rank))
            mesh.close()

    def _linger(self, mesh: GlooMesh) -> None:
        """A rank may leave after the last call while its peers still read what it sent in it."""
        deadline_s = time.monotonic() + _LINGER_S
        try:
            for _, work in list(self._in_flight[self._call % _NUM_SEND]):
                mesh.finish(work, max(0.001, deadline_s - time.monotonic()))
        except RuntimeError as error:
            log.debug("rank %d leaves with messages unsent: %s", self._rank, error)

    def stats(self) -> TransportStats:
        return TransportStats(
            num_calls=self._num_calls, sent_bytes=self._sent_bytes, received_bytes=self._received_bytes
        )

    # --- an exchange in two halves, so that another transport's call fits between -----------------------------------

    def begin(self, kind: str, messages: Sequence[memoryview | bytes]) -> memoryview:
        """Send `messages`, by destination. Does not wait for a peer. Returns the message to oneself."""
        if len(messages) != self._world_size:
            raise ValueError(f"send has {len(messages)} messages, expected one for each of {self._world_size} ranks")
        mesh = self._raise_if_over()
        self._kind = kind
        self._num_calls += 1
        self._call += 1
        if self._left is not None:
            self._fail_lost(self._left)
        own = _flat(messages[self._rank]).toreadonly()
        if mesh is None:
            return own
        in_flight = self._in_flight[self._call % _NUM_SEND]
        peer = self._rank
        try:
            while in_flight:
                peer, work = in_flight.pop()
                mesh.finish(work, _LINGER_S)
            for peer in self._peers:
                message = _flat(messages[peer])
                num_bytes, num_first = len(message), min(len(message), self._first_bytes)
                room = self._send[peer][self._call % _NUM_SEND]
                _HEADER.pack_into(room.view, 0, _MAGIC, CALLS.index(kind), self._call, num_bytes)
                room.payload(0, num_first)[:] = message[:num_first]
                in_flight.append((peer, mesh.send(peer, room.view[: _HEADER_BYTES + num_first])))
                if num_bytes > num_first:
                    self._long_sends.append((peer, mesh.send(peer, memoryview(bytearray(message[num_first:])))))
                self._sent_bytes += num_bytes
        except RuntimeError:  # gloo: this connection is closed
            self._fail_lost(peer)
        return own

    def finish(self, *, timeout_s: float) -> list[memoryview]:
        """What each rank sent here in the exchange that `begin` began; empty from those that are not peers."""
        mesh = self._mesh
        deadline_s = time.monotonic() + timeout_s
        views = [memoryview(b"")] * self._world_size
        if not self._peers:
            return views
        rooms = {peer: self._receive[peer][self._turn % _NUM_RECEIVE] for peer in self._peers}
        self._wait(mesh, self._posted, timeout_s, timeout_s)
        lengths = {peer: self._check(peer, room) for peer, room in rooms.items()}
        long, self._long_sends = self._long_sends, []
        for peer, num_bytes in lengths.items():
            if num_bytes > self._first_bytes:
                rooms[peer].grow(num_bytes, self._first_bytes)
                long.append((peer, self._post_rest(peer, rooms[peer].payload(self._first_bytes, num_bytes))))
        if long:
            self._wait(mesh, long, deadline_s - time.monotonic(), timeout_s)
        for peer, num_bytes in lengths.items():
            views[peer] = rooms[peer].payload(0, num_bytes).toreadonly()
            self._received_bytes += num_bytes
        if self._kind == "all_to_all_v":
            self._turn += 1
        else:
            views = [memoryview(bytes(view)) for view in views]  # the same room is posted again
        self._post()
        return views

    def _post(self) -> None:
        """For the next call. A peer that has left after this one concerns the next one."""
        mesh = self._raise_if_over()
        assert mesh is not None
        self._posted = []
        for peer in self._peers:
            room = self._receive[peer][self._turn % _NUM_RECEIVE]
            _HEADER.pack_into(room.view, 0, 0, 0, 0, 0)
            try:
                self._posted.append((peer, mesh.post(peer, room.view[: _HEADER_BYTES + self._first_bytes])))
            except RuntimeError:
                self._left = peer if self._left is None else self._left

    def _post_rest(self, peer: int, buffer: memoryview) -> Any:
        mesh = self._raise_if_over()
        assert mesh is not None
        try:
            return mesh.post(peer, buffer)
        except RuntimeError:
            self._fail_lost(peer)

    def _wait(self, mesh: GlooMesh | None, works: list[tuple[int, Any]], remaining_s: float, timeout_s: float) -> None:
        if mesh is None:
            self._raise_if_over()
        assert mesh is not None
        event = mesh.wait(works, max(0.0, remaining_s))
        if event.kind == "done":
            return
        if event.kind == "lost":
            self._fail_lost(event.peer)
        self._raise_if_over()
        late = {peer for peer in self._peers if self._receive[peer][self._turn % _NUM_RECEIVE].header()[0] != _MAGIC}
        late = late or {peer for peer, _ in works}  # all have come, but not with everything
        text = f"{self._where()}: waited {timeout_s:.2f} s for rank {', '.join(map(str, sorted(late)))}"
        self._fail(TransportTimeout(f"rank {self._rank}: {text}", rank=self._rank, peers=sorted(late)))

    def _check(self, peer: int, room: _Room) -> int:
        magic, kind, call, num_bytes = room.header()
        if (magic, kind, call) != (_MAGIC, CALLS.index(self._kind), self._call) or num_bytes > _MESSAGE_BYTES_MAX:
            theirs = f"{CALLS[kind]} (call {call})" if magic == _MAGIC and kind < len(CALLS) else "something else"
            text = f"ranks disagree on their calls: rank {self._rank} is in {self._where()}, rank {peer} in {theirs}"
            self._fail(TransportError(text, rank=self._rank, peers=(peer,)))
        return num_bytes

    def _where(self) -> str:
        return f"{self._kind} (call {self._call})"

    # --- ends ---------------------------------------------------------------------------------------------------------

    def _raise_if_over(self) -> GlooMesh | None:
        with self._lock:
            failure, reason, closed, mesh = self._failure, self._abort_reason, self._closed, self._mesh
        rank = self._rank
        if failure is not None:
            raise type(failure)(str(failure), rank=rank, peers=failure.peers)
        if closed:
            raise TransportAborted(f"rank {rank}: this transport is closed", rank=rank)
        if reason is not None:
            raise TransportAborted(f"rank {rank}: rank {rank} aborted the generation: {reason}", rank=rank)
        return mesh

    def _fail_lost(self, peer: int) -> Never:
        """The connection to `peer` is closed: by this rank, by the peer for a reason it left, or by its death."""
        self._raise_if_over()
        self._fail(self._notes.blame(peer, self._where()))

    def _fail(self, error: TransportError) -> Never:
        with self._lock:
            self._failure = self._failure or error
        self._notes.leave(Note.of_error(error))
        raise error


def _flat(message: memoryview | bytes) -> memoryview:
    view = memoryview(message)
    return view if view.ndim == 1 and view.format == "B" else view.cast("B")
