"""Which ranks have fast links between them: `Domains`, from the names that a generation's descriptor gives.

Inside a domain rows go over NVLink or shared memory, between domains over a network. Domains may differ in size, and
their ranks need not be neighbours.

>>> domains = Domains.of(["a", "a", "b", "a", "b"])
>>> domains.members
((0, 1, 3), (2, 4))
>>> [domains.gateway(rank, 1) for rank in range(5)]
[2, 4, 2, 2, 4]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Domains:
    """`members`: the ranks of each, ascending; the domains in the order of their first ranks."""

    members: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, names: Sequence[str]) -> Domains:
        """`names[r]`: of the domain of rank r."""
        return cls(tuple(tuple(rank for rank, name in enumerate(names) if name == own) for own in dict.fromkeys(names)))

    @property
    def num_ranks(self) -> int:
        return sum(map(len, self.members))

    @property
    def size_max(self) -> int:
        return max(map(len, self.members))

    @property
    def are_worth_it(self) -> bool:
        """Whether a row for several ranks of a domain can cross between domains fewer times than there are ranks."""
        return len(self.members) > 1 and self.size_max > 1

    def at(self, rank: int) -> tuple[int, int]:
        """The rank's domain, and its place there."""
        for domain, ranks in enumerate(self.members):
            if rank in ranks:
                return domain, ranks.index(rank)
        raise ValueError(f"rank {rank} is in no domain")

    def gateway(self, rank: int, domain: int) -> int:
        """The rank of `domain` to which `rank` sends what is for any rank there: the one at its own place, where the domain
        is as large; so each domain's ranks share the network's work."""
        ranks = self.members[domain]
        return ranks[self.at(rank)[1] % len(ranks)]
