"""Sequences that no rank has yet: `WaitingLine`. Ranks are fed a bounded window of them, first come, first served.

The rank is chosen when a sequence is fed, by what each holds then. A rank's death does not touch who still waits here,
and sends what it held back, ahead of those who came later.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from switchgear.server.live_sequence import LiveSequence
from switchgear.server.rank_table import RankTable

# What one event may feed, so that a huge request does not hold up everybody's tokens (some 10 ms). What was fed brings
# the next event.
FEED_SEQUENCES_MAX = 256
FEED_BYTES_MAX = 1 << 20


class WaitingLine:
    """`len`: the sequences in it, followers of a waiting leader included."""

    def __init__(self, ranks: RankTable) -> None:
        self._ranks = ranks
        self._line: OrderedDict[int, LiveSequence] = OrderedDict()  # leaders, by sequence id; a dict scans its gaps
        self._suspects: OrderedDict[int, LiveSequence] = OrderedDict()  # likewise; they go first, one a rank
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def add(self, sequence: LiveSequence) -> None:
        """At the end, with its followers."""
        self._line[sequence.sequence_id] = sequence
        self._num_waiting += 1 + len(sequence.followers)

    def put_back(self, sequences: Iterable[LiveSequence]) -> None:
        """Each with its followers, where it was in the order of arrival: before those who never had a rank."""
        for sequence in sequences:
            self.add(sequence)
            if sequence.is_suspect:
                self._suspects[sequence.sequence_id] = self._line.pop(sequence.sequence_id)
        self._line = OrderedDict(sorted(self._line.items()))

    def remove(self, sequence: LiveSequence) -> None:
        """One that ended while it waited."""
        self._line.pop(sequence.sequence_id, None)
        self._suspects.pop(sequence.sequence_id, None)
        self._num_waiting -= 1

    def feed(self) -> Iterator[LiveSequence]:
        """What shall start now, on its `rank`. Followers get a place on the same rank, and start when they may."""
        while self._suspects and (rank := self._ranks.choose(for_suspect=True)) is not None:
            _, leader = self._suspects.popitem(last=False)
            self._ranks[rank].suspect = leader.sequence_id
            yield self._place(leader, rank)
        num_fed = num_bytes = 0
        while self._line and num_fed < FEED_SEQUENCES_MAX and num_bytes < FEED_BYTES_MAX:
            rank = self._ranks.choose()
            if rank is None:
                return
            _, leader = self._line.popitem(last=False)
            num_fed += 1
            num_bytes += leader.num_submit_bytes
            yield self._place(leader, rank)

    def _place(self, leader: LiveSequence, rank: int) -> LiveSequence:
        for sequence in (leader, *leader.followers):
            sequence.rank = rank
            self._ranks.add(rank, sequence.num_tokens)
            self._num_waiting -= 1
        return leader
