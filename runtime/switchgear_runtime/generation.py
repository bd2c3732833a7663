"""Who is in the group, and which controller says so: generations, terms and fencing. Imports no torch."""

from __future__ import annotations

import msgspec

from switchgear_runtime.errors import StaleTerm


class GenerationDescriptor(msgspec.Struct, frozen=True, kw_only=True):
    """A fixed set of ranks with one transport between them.

    `term` is the controller's (won by compare-and-swap in a store), `generation` rises by one for each new group, `channel` is a
    fresh, unguessable name for the transport's rendezvous, so that a late rank of an old generation finds nothing to write to.
    `hosts`: where each rank is, by a name that ranks of one host share; empty: all on one host. `domains`: the same for
    fast links between devices, which may join several hosts or part of one; empty: a domain is a host. `left_in`: of ranks
    that were told to leave and have not been seen gone, the earliest generation that one was in last; None: there are none.
    """

    term: int
    generation: int
    world_size: int
    epoch: int
    channel: str
    hosts: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    left_in: int | None = None

    @property
    def settled(self) -> int:
        """All ranks of earlier generations have been in this one, or are gone."""
        return self.generation if self.left_in is None else self.left_in

    @property
    def domain_names(self) -> tuple[str, ...]:
        """Of each rank."""
        return self.domains or self.hosts or ("",) * self.world_size


class Fence:
    """What a rank has accepted so far; refuses everything older.

    Example: after (term=2, generation=7), a descriptor of term 1 raises StaleTerm, and so does generation 7 again.
    """

    def __init__(self) -> None:
        self.term = 0
        self.generation = 0

    def accept(self, descriptor: GenerationDescriptor) -> None:
        if descriptor.term < self.term:
            raise StaleTerm(f"term {descriptor.term} is over; this rank follows term {self.term}")
        if descriptor.generation <= self.generation:
            raise StaleTerm(
                f"generation {descriptor.generation} of term {descriptor.term} is not after {self.generation}, which this rank has seen"
            )
        self.term = descriptor.term
        self.generation = descriptor.generation
