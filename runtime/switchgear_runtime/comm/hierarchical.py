"""Ranks on several hosts with several on each: `HierarchicalTransport`, shm inside a host and gloo between hosts.

Every message takes one hop: to a rank of the same host through shared memory, to any other directly over the network,
once. Both halves of a call are under way at the same time: the network's is begun first and finished last. The halves
share the store, so a rank that one of them has ended still learns from the notes whom to blame. `inside` is the shared
memory's half as a transport by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Never, TypeVar

from switchgear_runtime.comm.domains import Domains
from switchgear_runtime.comm.gloo import GlooTransport
from switchgear_runtime.comm.inside_host import InsideHost
from switchgear_runtime.comm.network import Network
from switchgear_runtime.comm.shm import ShmTransport
from switchgear_runtime.comm.store import FailureNotes, Note
from switchgear_runtime.comm.transport import HEADER_BYTES_MAX, TransportStats
from switchgear_runtime.errors import ConfigError, PeerLost, TransportAborted, TransportError

Result = TypeVar("Result")


class HierarchicalTransport:
    """One rank's end. `hosts`: where each rank is, by any name; ranks that share it share memory."""

    def __init__(
        self,
        channel: str,
        network: Network,
        rank: int,
        hosts: Sequence[str],
        *,
        mailbox_bytes: int,
        timeout_s: float,
    ) -> None:
        if not 0 <= rank < len(hosts):
            raise ConfigError(f"rank={rank} must be 0 to {len(hosts) - 1}")
        self._rank = rank
        self.hosts = Domains.of(hosts).members
        self._neighbours = [peer for peer, host in enumerate(hosts) if host == hosts[rank]]
        strangers = [peer for peer, host in enumerate(hosts) if host != hosts[rank]]
        self._notes = FailureNotes(network.store, rank)
        self._failure: TransportError | None = None
        self._num_calls = 0
        self._inside: ShmTransport | None = None
        deadline_s = time.monotonic() + timeout_s
        self._between = GlooTransport(
            network,
            rank,
            len(hosts),
            mailbox_bytes=mailbox_bytes,
            timeout_s=timeout_s,
            peers=strangers,
            notes=self._notes,
        )
        try:
            remaining_s = max(deadline_s - time.monotonic(), 1.0)
            name = f"{channel}-{sorted(set(hosts)).index(hosts[rank])}"
            place, num_places = self._neighbours.index(rank), len(self._neighbours)
            self._inside = ShmTransport(name, place, num_places, mailbox_bytes, remaining_s)
        except TransportError as error:
            self._fail(self._worldwide(error))
        except BaseException:
            self.close()
            raise

    @property
    def inside(self) -> InsideHost:
        """Of the ranks on this host, which make their calls on it and on the whole in one order."""
        return InsideHost(self, self._neighbours)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._between.world_size

    def all_gather(self, header: bytes, *, timeout_s: float) -> list[bytes]:
        inside = self._open()
        if len(header) > HEADER_BYTES_MAX:
            raise ValueError(f"header has {len(header)} bytes, at most {HEADER_BYTES_MAX} fit")
        return self._both(
            lambda: self._begin("all_gather", [header] * self.world_size),
            lambda: inside.all_gather(header, timeout_s=timeout_s),
            lambda remaining_s: [bytes(view) for view in self._between.finish(timeout_s=remaining_s)],
            timeout_s,
        )

    def all_to_all_v(self, send: Sequence[memoryview | bytes], *, timeout_s: float) -> list[memoryview]:
        inside = self._open()
        if len(send) != self.world_size:
            raise ValueError(f"send has {len(send)} messages, expected one for each of {self.world_size} ranks")
        return self._both(
            lambda: self._begin("all_to_all_v", send),
            lambda: inside.all_to_all_v([send[peer] for peer in self._neighbours], timeout_s=timeout_s),
            lambda remaining_s: self._between.finish(timeout_s=remaining_s),
            timeout_s,
        )

    def barrier(self, *, timeout_s: float) -> None:
        # A rank leaves once it has seen all others enter: each of its neighbours inside, each stranger between.
        self.all_gather(b"", timeout_s=timeout_s)

    def abort(self, reason: str) -> None:
        self._between.abort(reason)
        if self._inside is not None:
            self._inside.abort(reason)

    def close(self) -> None:
        self._between.close()
        if self._inside is not None:
            self._inside.close()

    def stats(self) -> TransportStats:
        """A call counts once; the bytes are those of both ways."""
        parts = [self._between.stats()] + ([self._inside.stats()] if self._inside is not None else [])
        return TransportStats(
            num_calls=self._num_calls,
            sent_bytes=sum(part.sent_bytes for part in parts),
            received_bytes=sum(part.received_bytes for part in parts),
        )

    def call_inside(self, call: Callable[[ShmTransport], Result]) -> Result:
        """On the shared memory's half alone."""
        inside = self._open()
        self._num_calls += 1
        try:
            return call(inside)
        except TransportError as error:
            self._fail(self._worldwide(error))

    def _begin(self, kind: str, messages: Sequence[memoryview | bytes]) -> None:
        self._between.begin(kind, messages)

    def _both(
        self,
        begin: Callable[[], None],
        inside: Callable[[], list[Result]],
        finish: Callable[[float], list[Result]],
        timeout_s: float,
    ) -> list[Result]:
        """What came, by rank."""
        deadline_s = time.monotonic() + timeout_s
        try:
            begin()
            self._num_calls += 1
            near = inside()
            received = finish(max(0.0, deadline_s - time.monotonic()))
        except TransportError as error:
            self._fail(error if self._between.failed else self._worldwide(error))
        for peer, message in zip(self._neighbours, near, strict=True):
            received[peer] = message
        return received

    def _open(self) -> ShmTransport:
        if self._failure is not None:
            failure = self._failure
            raise type(failure)(str(failure), rank=self._rank, peers=failure.peers)
        assert self._inside is not None
        return self._inside

    def _worldwide(self, error: TransportError) -> TransportError:
        """An error of the inner transport, with the ranks' numbers in the world, and whom a neighbour that left blames."""
        peers = tuple(self._neighbours[place] for place in error.peers)
        text = f"rank {self._rank}: inside its host: {error}"
        if isinstance(error, TransportAborted | PeerLost) and peers:
            return self._notes.blame(peers[0], "inside its host")
        return type(error)(text, rank=self._rank, peers=peers)

    def _fail(self, error: TransportError) -> Never:
        """End both halves: those who wait for this rank in the other one must not wait for their deadline."""
        self._failure = error
        self._notes.leave(Note.of_error(error))
        reason = f"rank {self._rank} failed: {error}"
        self.abort(reason)
        raise error
