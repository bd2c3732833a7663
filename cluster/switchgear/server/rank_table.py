"""Which rank gets the next sequence: `RankTable`, the server's ledger of what each rank holds.

The ledger is exact at once (a rank's own stats lag by a step), so a batch admitted in one go spreads evenly.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from switchgear.server.limits import ModelFacts
from switchgear_runtime.messages import Hello, RankStats, StepFrame

WINDOW = 2  # times max_num_seqs: what a rank runs, and as many again so that it never runs dry
UNANSWERED_BYTES_MAX = 16 << 20  # sent to a rank and not yet answered by a first token
_NO_STATS = RankStats(0, 0, 0, 0, 0, 0, 0, 0)


@dataclass(kw_only=True, slots=True)
class RankState:
    """`num_tokens`: prompt and output tokens of the sequences it holds, as KV-cache positions."""

    rank: int
    serving: bool = False
    num_kv_tokens: int = 1 << 16  # capacity, from its Hello
    block_size: int = 16  # likewise
    num_sequences: int = 0
    num_tokens: int = 0
    num_unanswered_bytes: int = 0  # of the sequences that were sent and have no token yet
    suspect: int | None = None  # of them, the one that may be what kills ranks
    stats: RankStats = _NO_STATS
    parked: bool = False


class RankTable:
    def __init__(self, facts: ModelFacts) -> None:
        self._max_num_seqs = facts.max_num_seqs
        self._states: dict[int, RankState] = {}

    def __getitem__(self, rank: int) -> RankState:
        if rank not in self._states:
            self._states[rank] = RankState(rank=rank)
        return self._states[rank]

    def states(self) -> list[RankState]:
        return [self._states[rank] for rank in sorted(self._states)]

    def serve(self, ranks: Iterable[int]) -> None:
        """These ranks, and no others, get new sequences."""
        chosen = set(ranks)
        for rank in chosen | self._states.keys():
            self[rank].serving = rank in chosen

    def forget(self, rank: int) -> None:
        """A rank that left, was vacated or lost before that, and will not come back."""
        self._states.pop(rank, None)

    @property
    def num_serving(self) -> int:
        return sum(state.serving for state in self._states.values())

    def hello(self, message: Hello) -> None:
        state = self[message.rank]
        state.num_kv_tokens = max(1, message.num_kv_blocks * message.block_size)
        state.block_size = message.block_size

    def lose(self, rank: int) -> None:
        """Its process is dead; another may follow."""
        self[rank].stats = _NO_STATS

    def step(self, frame: StepFrame) -> None:
        state = self._states.get(frame.rank)
        if state is not None:  # else it was forgotten, and this frame is one of its last
            state.stats, state.parked = frame.stats, False

    def park(self, rank: int) -> None:
        state = self._states.get(rank)
        if state is not None:
            state.parked = True

    @property
    def block_size(self) -> int:
        """The ranks have one config."""
        return max((state.block_size for state in self._states.values()), default=16)

    def choose(self, *, for_suspect: bool = False) -> int | None:
        """The least loaded serving rank by KV cache and queue; ties to the lowest rank. None: no rank has room. One
        suspect a rank, so that the guilty one soon dies without the others."""
        fit = [state for state in self._states.values() if state.serving and self._has_room(state)]
        if for_suspect:
            fit = [state for state in fit if state.suspect is None]
        return min(fit, key=self._load).rank if fit else None

    def add(self, rank: int, num_tokens: int) -> None:
        self[rank].num_sequences += 1
        self[rank].num_tokens += num_tokens

    def remove(self, rank: int, num_tokens: int) -> None:
        self[rank].num_sequences -= 1
        self[rank].num_tokens -= num_tokens

    def answered(self, rank: int, sequence_id: int, num_bytes: int) -> None:
        """A sequence has its first token from this rank, or is its no more."""
        state = self[rank]
        state.num_unanswered_bytes -= num_bytes
        if state.suspect == sequence_id:
            state.suspect = None

    def _has_room(self, state: RankState) -> bool:
        few = state.num_sequences < WINDOW * self._max_num_seqs
        return few and state.num_unanswered_bytes < UNANSWERED_BYTES_MAX

    def _load(self, state: RankState) -> tuple[float, int, int]:
        """A rank is full when its KV cache is, or when all its places are taken: whichever binds, beside the sum."""
        load = state.num_tokens / state.num_kv_tokens + state.num_sequences / self._max_num_seqs
        return load, state.num_sequences, state.rank
