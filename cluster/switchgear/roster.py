"""The ranks as the controller knows them: `Roster`. Members make up a generation; newcomers and leavers do not.

newcomer --admitted--> member --retired--> leaver --seen gone--> (forgotten)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from switchgear_runtime.messages import Hello

LEAVE_TIMEOUT_S = 5.0  # from Stop to the exit of a rank that leaves

Role = Literal["member", "newcomer", "leaver"]


@dataclass(slots=True)
class RankLife:
    """One process of one rank, from its start until it is seen gone."""

    role: Role = "member"
    status: Literal["starting", "joined", "dying", "gone"] = "starting"
    deadline_s: float | None = None  # to join; after a lost link, to exit; to leave
    hello: Hello | None = None
    lost_link: str | None = None
    entered: bool = False  # sent a frame of the current generation
    parked_step: int | None = None
    left_in: int | None = None  # the generation that a leaver was in last
    faulted: bool = False  # left the current generation by a fault, so it is alive

    def missed(self, start_timeout_s: float) -> str:
        """What did not happen by its deadline; reads on after "rank 2"."""
        if self.role == "leaver":
            return f"did not leave within {LEAVE_TIMEOUT_S:g} s"
        if self.lost_link is not None:
            return f"lost its link to the server and was ended: {self.lost_link}"
        return f"did not join within {start_timeout_s:g} s and was ended"


class Roster:
    """By rank. Members are 0, 1, ... without a gap; newcomers follow them."""

    def __init__(self, num_ranks: int) -> None:
        self._lives = {rank: RankLife() for rank in range(num_ranks)}

    def __getitem__(self, rank: int) -> RankLife:
        return self._lives[rank]

    def __setitem__(self, rank: int, life: RankLife) -> None:
        self._lives[rank] = life

    def __delitem__(self, rank: int) -> None:
        del self._lives[rank]

    def __iter__(self) -> Iterator[int]:
        """All ranks, ascending."""
        return iter(sorted(self._lives))

    def get(self, rank: int) -> RankLife | None:
        """None: one that was forgotten, and may still have an event on its way."""
        return self._lives.get(rank)

    def lives(self) -> list[RankLife]:
        return list(self._lives.values())

    def of(self, role: Role) -> list[tuple[int, RankLife]]:
        """Ascending."""
        return [(rank, self._lives[rank]) for rank in self if self._lives[rank].role == role]

    @property
    def members(self) -> list[RankLife]:
        """Index = rank."""
        return [life for _, life in self.of("member")]

    @property
    def hosts(self) -> tuple[str, ...]:
        """Of the members that joined, as their descriptor has them."""
        return tuple(life.hello.host for life in self.members if life.hello is not None)

    @property
    def domains(self) -> tuple[str, ...]:
        """As `hosts`; empty where nobody named any."""
        hellos = [life.hello for life in self.members if life.hello is not None]
        if not any(hello.domain for hello in hellos):
            return ()
        return tuple(hello.domain or hello.host for hello in hellos)

    def end(self, generation: int) -> int | None:
        """The next one begins: its members have yet to enter it. Returns the earliest that a leaver was in last, which of
        those that left since then is `generation`."""
        for life in self.members:
            life.entered, life.parked_step, life.faulted = False, None, False
        leavers = [life for _, life in self.of("leaver")]
        for life in leavers:
            life.left_in = generation if life.left_in is None else life.left_in
        return min((life.left_in for life in leavers if life.left_in is not None), default=None)

    @property
    def joined(self) -> list[int]:
        """Ranks that have said Hello, of any role."""
        return [rank for rank in self if self._lives[rank].status == "joined"]

    @property
    def all_gone(self) -> bool:
        return all(life.status == "gone" for life in self._lives.values())

    @property
    def deadlines_s(self) -> list[float]:
        return [life.deadline_s for life in self._lives.values() if life.deadline_s is not None]

    def forget_deadlines(self) -> None:
        for life in self._lives.values():
            life.deadline_s = None

    def misfit(self, hello: Hello) -> str | None:
        """Why a rank may not be together with those that joined before it."""
        for other in (life.hello for life in self._lives.values()):
            if other is not None and other.fingerprint != hello.fingerprint:
                return (
                    f"rank {hello.rank} may not join: it computes with {hello.fingerprint!r}, rank {other.rank} with "
                    f"{other.fingerprint!r}; all ranks need the same kernels and the same checkpoint, or their tokens "
                    "would differ"
                )
        return None
