"""Where ranks leave small values for each other while they meet, and say why they part: `KeyValueStore`, `FailureNotes`.

A network transport needs both: it has no shared memory to meet in, and a connection that closes names nobody. So a rank
that gives up leaves a note first, and whoever finds its connection closed reads there whom it blames.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec

from switchgear_runtime.errors import PeerLost, TransportAborted, TransportError, TransportTimeout

NOTE_WAIT_S = 0.3  # for the note of a rank whose connection has closed; a dead rank leaves none

log = logging.getLogger(__name__)


class KeyValueStore(Protocol):
    """The values of one generation. Any thread."""

    def put(self, key: str, value: bytes) -> None:
        """Leave a value; does not wait. OSError when nobody can be told any more."""
        ...

    def get(self, keys: Sequence[str], *, timeout_s: float) -> dict[str, bytes]:
        """Those of `keys` that are there by the deadline; at once when all are."""
        ...


def meet(store: KeyValueStore, rank: int, peers: Iterable[int], *, timeout_s: float) -> None:
    """Return once all of `peers` have called this. Raises TransportTimeout naming those that did not in time."""
    names = {f"here/{peer}": peer for peer in peers}
    store.put(f"here/{rank}", b"")
    missing = names.keys() - store.get(list(names), timeout_s=timeout_s).keys()
    if missing:
        late = sorted(names[name] for name in missing)
        text = f"rank {rank}: join: waited {timeout_s:.2f} s for rank {', '.join(map(str, late))}"
        raise TransportTimeout(text, rank=rank, peers=late)


class Note(msgspec.Struct, frozen=True):
    """Why a rank left. `peers`: whom it blames, itself included."""

    kind: str
    peers: tuple[int, ...]
    text: str

    @classmethod
    def of_error(cls, error: TransportError) -> Note:
        return cls(type(error).__name__, error.peers, str(error))

    @classmethod
    def of_abort(cls, rank: int, reason: str) -> Note:
        return cls("TransportAborted", (rank,), reason)

    @classmethod
    def of_close(cls, rank: int) -> Note:
        return cls("PeerLost", (rank,), f"rank {rank} has closed its end")

    def error(self, rank: int, peer: int, where: str) -> TransportError:
        """What `rank` raises in `where` on finding this note of `peer`."""
        blaming: dict[str, type[TransportError]] = {"PeerLost": PeerLost, "TransportTimeout": TransportTimeout}
        if self.kind in blaming and rank not in self.peers:
            return blaming[self.kind](f"rank {rank}: {where}: {self.text}", rank=rank, peers=self.peers)
        if self.kind == "TransportAborted":
            peers = tuple(origin for origin in self.peers if origin != rank)
            origin = peers[0] if peers else rank
            text = f"rank {rank}: rank {origin} aborted the generation: {self.text}"
            return TransportAborted(text, rank=rank, peers=peers)
        return TransportAborted(f"rank {rank}: {where}: rank {peer} gave up: {self.text}", rank=rank, peers=(peer,))


class FailureNotes:
    """One rank's note, and those of its peers."""

    def __init__(self, store: KeyValueStore, rank: int) -> None:
        self._store = store
        self._rank = rank
        self._left = False

    def leave(self, note: Note) -> None:
        """Only the first counts: what follows it (the abort, the close) is its consequence."""
        if self._left:
            return
        self._left = True
        try:
            self._store.put(f"left/{self._rank}", msgspec.json.encode(note))
        except OSError as error:  # the peers will wait NOTE_WAIT_S in vain, and blame this rank
            log.debug("rank %d could not leave a note: %s", self._rank, error)

    def blame(self, peer: int, where: str) -> TransportError:
        """What to raise in `where` after `peer` closed its connection or aborted: what its note says, or PeerLost."""
        rank, key = self._rank, f"left/{peer}"
        found = self._store.get([key], timeout_s=NOTE_WAIT_S).get(key)
        if found is None:
            return PeerLost(f"rank {rank}: {where}: rank {peer} is dead", rank=rank, peers=(peer,))
        return msgspec.json.decode(found, type=Note).error(rank, peer, where)
