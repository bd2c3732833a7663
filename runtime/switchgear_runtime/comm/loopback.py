"""Ranks as threads of one process: `LoopbackHub` and its transports, for tests and simulation.

Every wait goes through one `system.condition()`, so a simulated system can schedule the ranks. The hub can kill a rank
(its peers get PeerLost, its own next call unwinds with RankCrashed) or stop it (its calls hang, its peers get
TransportTimeout). Stricter than shm on purpose: ranks whose calls differ are told so, and a view is overwritten as soon
as its lifetime ends.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Never

from switchgear_runtime.comm.faulty import RankCrashed
from switchgear_runtime.comm.transport import HEADER_BYTES_MAX, TransportStats
from switchgear_runtime.errors import PeerLost, TransportAborted, TransportError, TransportTimeout
from switchgear_runtime.system import System

_ALIGNMENT = 64
_EXPIRED = b"\xdb"  # what an expired view shows


class _Message:
    """A private copy of what one rank gave to another, at a multiple of 64 bytes."""

    __slots__ = ("view",)

    def __init__(self, content: memoryview | bytes) -> None:
        num_bytes = memoryview(content).nbytes
        buffer = bytearray(num_bytes + _ALIGNMENT)
        start = -ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % _ALIGNMENT
        self.view = memoryview(buffer)[start : start + num_bytes]
        self.view[:] = content if isinstance(content, bytes) else content.cast("B") if num_bytes else b""

    def expire(self) -> None:
        self.view[:] = _EXPIRED * len(self.view)


@dataclass(slots=True)
class _Post:
    """What one rank gave to one call."""

    kind: str
    messages: list[_Message]  # by destination


@dataclass(slots=True)
class _Channel:
    """The ranks of one generation, and their calls that are not over yet."""

    world_size: int
    joined: set[int] = field(default_factory=set)
    dead: set[int] = field(default_factory=set)
    left: set[int] = field(default_factory=set)
    abort: tuple[int, str] | None = None
    posts: dict[int, dict[int, _Post]] = field(default_factory=dict)  # call -> source rank
    num_collected: dict[int, int] = field(default_factory=dict)


class LoopbackHub:
    """Where the ranks of one process meet. `world_size` is that of channels that do not name another."""

    def __init__(self, world_size: int, system: System) -> None:
        self.world_size = world_size
        self.system = system
        self.condition = system.condition()
        self.stopped: set[int] = set()
        self._open: dict[str, _Channel] = {}  # not whole yet
        self._channels: list[_Channel] = []

    def transport(self, rank: int, channel: str = "", *, world_size: int | None = None) -> LoopbackTransport:
        """The end of `rank`, without waiting for the others. Once all have joined, the name is free again."""
        with self.condition:
            return self._join(rank, channel, self.world_size if world_size is None else world_size)

    def open(self, rank: int, channel: str, *, world_size: int, timeout_s: float) -> LoopbackTransport:
        """As `transport`, and wait until all have joined. Raises TransportTimeout naming the missing ranks."""
        with self.condition:
            end = self._join(rank, channel, world_size)
            try:
                end.wait_joined(timeout_s)
            except BaseException:
                self._open.pop(channel, None)
                end.leave()
                raise
            return end

    def kill(self, rank: int) -> None:
        """The process of `rank` is gone, in every channel it has joined. It may join later ones, as a new process."""
        with self.condition:
            for channel in self._channels:
                if rank in channel.joined:
                    channel.dead.add(rank)
            self.stopped.discard(rank)
            self.condition.notify_all()

    def stop(self, rank: int) -> None:
        """As SIGSTOP: the transport calls of `rank` do not return until `resume` or `kill`."""
        with self.condition:
            self.stopped.add(rank)
            self.condition.notify_all()

    def resume(self, rank: int) -> None:
        with self.condition:
            self.stopped.discard(rank)
            self.condition.notify_all()

    def forget(self, channel: _Channel) -> None:
        """Called with the lock held, when all ranks of `channel` have left or died."""
        if channel in self._channels:
            self._channels.remove(channel)

    def _join(self, rank: int, name: str, world_size: int) -> LoopbackTransport:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must be 0 to {world_size - 1}")
        channel = self._open.get(name)
        if channel is None:
            channel = self._open[name] = _Channel(world_size)
            self._channels.append(channel)
        if channel.world_size != world_size:
            raise TransportError(f"world_size={world_size}, but the channel has {channel.world_size}", rank=rank)
        if rank in channel.joined:
            raise TransportError(f"rank {rank} has joined this channel before", rank=rank)
        channel.joined.add(rank)
        if len(channel.joined) == world_size:
            del self._open[name]
        self.condition.notify_all()
        return LoopbackTransport(self, channel, rank)


class LoopbackTransport:
    """One rank's end of a hub's channel."""

    def __init__(self, hub: LoopbackHub, channel: _Channel, rank: int) -> None:
        self._hub = hub
        self._channel = channel
        self._rank = rank
        self._failure: TransportError | None = None
        self._closed = False
        self._num_posts = 0
        self._received: list[list[_Message]] = [[], []]  # of the latest two all_to_all_v, older first
        self._num_calls = self._sent_bytes = self._received_bytes = 0

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._channel.world_size

    def all_gather(self, header: bytes, *, timeout_s: float) -> list[bytes]:
        if len(header) > HEADER_BYTES_MAX:
            raise ValueError(f"header has {len(header)} bytes, at most {HEADER_BYTES_MAX} fit")
        received = self._exchange("all_gather", [_Message(header)] * self.world_size, timeout_s)
        return [bytes(message.view) for message in received]

    def all_to_all_v(self, send: Sequence[memoryview | bytes], *, timeout_s: float) -> list[memoryview]:
        if len(send) != self.world_size:
            raise ValueError(f"send has {len(send)} messages, expected one for each of {self.world_size} ranks")
        own = memoryview(send[self._rank])
        if own.ndim != 1 or own.format != "B":
            own = own.cast("B")
        expired, latest = self._received
        for old in expired:
            old.expire()
        messages = [_Message(b"" if peer == self._rank else message) for peer, message in enumerate(send)]
        received = self._exchange("all_to_all_v", messages, timeout_s)
        self._received = [latest, received]
        views = [message.view.toreadonly() for message in received]
        views[self._rank] = own.toreadonly()
        return views

    def barrier(self, *, timeout_s: float) -> None:
        self._exchange("barrier", [_Message(b"")] * self.world_size, timeout_s)

    def abort(self, reason: str) -> None:
        with self._hub.condition:
            if not self._closed and self._channel.abort is None:
                self._channel.abort = (self._rank, reason)
                self._hub.condition.notify_all()

    def close(self) -> None:
        with self._hub.condition:
            self.leave()

    def stats(self) -> TransportStats:
        return TransportStats(
            num_calls=self._num_calls, sent_bytes=self._sent_bytes, received_bytes=self._received_bytes
        )

    def leave(self) -> None:
        """Called with the lock held."""
        self._closed = True
        self._channel.left.add(self._rank)
        if len(self._channel.left | self._channel.dead) == self.world_size:
            self._hub.forget(self._channel)
        self._hub.condition.notify_all()

    def wait_joined(self, timeout_s: float) -> None:
        """Called with the lock held."""
        self._wait("join", lambda: set(range(self.world_size)) - self._channel.joined, timeout_s)

    def _exchange(self, kind: str, messages: list[_Message], timeout_s: float) -> list[_Message]:
        """Give `messages` by destination; get those of all ranks, by source, the own one included."""
        channel = self._channel
        with self._hub.condition:
            self._raise_if_over()
            self._num_calls += 1
            self._num_posts += 1
            call = self._num_posts
            posts = channel.posts.setdefault(call, {})
            posts[self._rank] = _Post(kind, messages)
            self._sent_bytes += sum(len(message.view) for peer, message in enumerate(messages) if peer != self._rank)
            self._hub.condition.notify_all()
            self._wait(kind, lambda: set(range(self.world_size)) - posts.keys(), timeout_s)
            for peer, post in posts.items():
                if post.kind != kind:
                    text = f"rank {self._rank} is in {kind}, rank {peer} in {post.kind} (call {call})"
                    self._fail(TransportError(f"ranks disagree on their calls: {text}", rank=self._rank, peers=(peer,)))
            received = [posts[peer].messages[self._rank] for peer in range(self.world_size)]
            self._received_bytes += sum(len(m.view) for peer, m in enumerate(received) if peer != self._rank)
            channel.num_collected[call] = channel.num_collected.get(call, 0) + 1
            if channel.num_collected[call] == self.world_size:
                del channel.posts[call], channel.num_collected[call]
            return received

    def _wait(self, kind: str, missing: Callable[[], set[int]], timeout_s: float) -> None:
        """Until no peer is `missing`. A stopped rank stays inside, whatever its deadline."""
        hub, channel, rank = self._hub, self._channel, self._rank
        deadline = hub.system.now() + timeout_s

        def ready() -> bool:
            if rank in channel.dead:
                return True
            if rank in hub.stopped:
                return False
            return self._closed or channel.abort is not None or not missing() or bool(self._gone() & missing())

        while not hub.condition.wait_for(ready, max(0.0, deadline - hub.system.now())):
            if rank not in hub.stopped:
                peers = sorted(missing())
                text = f"rank {rank}: {kind}: waited {timeout_s:.2f} s for rank {', '.join(map(str, peers))}"
                self._fail(TransportTimeout(text, rank=rank, peers=peers))
            hub.condition.wait_for(lambda: rank not in hub.stopped or rank in channel.dead, None)
        self._raise_if_over()
        lost = sorted(self._gone() & missing())
        if lost:
            dead = sorted(channel.dead)
            what = "is dead" if dead else "has closed its end"
            text = f"rank {rank}: {kind}: rank {', '.join(map(str, dead or lost))} {what}"
            self._fail(PeerLost(text, rank=rank, peers=dead or lost))

    def _gone(self) -> set[int]:
        return self._channel.dead | self._channel.left

    def _raise_if_over(self) -> None:
        """Called with the lock held."""
        if self._rank in self._channel.dead:
            raise RankCrashed(f"rank {self._rank} was killed")
        if self._failure is not None:
            self._fail(self._failure)
        if self._closed:
            raise TransportAborted(f"rank {self._rank}: this transport is closed", rank=self._rank)
        if self._channel.abort is not None:
            rank, reason = self._channel.abort
            peers = () if rank == self._rank else (rank,)
            text = f"rank {self._rank}: rank {rank} aborted the generation: {reason}"
            self._fail(TransportAborted(text, rank=self._rank, peers=peers))

    def _fail(self, error: TransportError) -> Never:
        self._failure = error
        raise type(error)(str(error), rank=error.rank, peers=error.peers)
