"""What one rank may say to another: the `Transport` protocol.

A transport knows ranks and bytes; it knows no tokens, no experts and no sockets of the server. All ranks of a generation
make the same calls in the same order (they derive the same decision from the same headers), so a call needs no name.
Every call has a deadline and its error names whom it waited for: `PeerLost` (a peer's process is gone),
`TransportTimeout` (a peer is late: hung, stopped or slow) or `TransportAborted`. After any of these the transport is
dead: every later call raises again at once; only `close()` is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

HEADER_BYTES_MAX = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class TransportStats:
    """What really crossed, for benchmarks and tests that must prove it. Bytes to oneself do not count."""

    num_calls: int
    sent_bytes: int
    received_bytes: int


class Transport(Protocol):
    """One rank's end of a generation's channel. Not thread-safe, except `abort`, `close` and `stats`."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_gather(self, header: bytes, *, timeout_s: float) -> list[bytes]:
        """Give `header` (at most HEADER_BYTES_MAX, length may differ by rank) to all; get all ranks', by rank."""
        ...

    def all_to_all_v(self, send: Sequence[memoryview | bytes], *, timeout_s: float) -> list[memoryview]:
        """`send[r]` goes to rank r (any length, 0 included); returns what each rank sent here, by source rank.

        The receiver needs no counts beforehand: a message carries its length. Returned views are read-only and valid
        until the second-next `all_to_all_v` on this transport (double buffered), so a dispatch's views live through
        its combine. `send[rank]` to oneself comes back without passing the wire: a view of the sender's own memory. A
        peer's view starts at a multiple of 64 bytes.
        """
        ...

    def barrier(self, *, timeout_s: float) -> None: ...

    def abort(self, reason: str) -> None:
        """Make every pending and later call, on all ranks, raise `TransportAborted`. From any thread; idempotent."""
        ...

    def close(self) -> None:
        """Free everything. Idempotent; never waits for peers."""
        ...

    def stats(self) -> TransportStats: ...
