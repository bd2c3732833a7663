"""The map in force and the numbers of all maps ever proposed: `Epochs`. A number names one map for ever."""

from __future__ import annotations

import numpy as np

from switchgear.placement.plan import presence
from switchgear.placement.trim import trim
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.moe.rehome import rehome


class Epochs:
    """`current` is None until the first generation begins without a map of the user's."""

    def __init__(self, num_layers: int, num_experts: int, initial: ExpertMap | None) -> None:
        self._shape = (num_layers, num_experts)
        self.current = initial
        self._latest = 0 if initial is None else initial.epoch

    def new(self) -> int:
        """For a map that is about to be proposed."""
        self._latest += 1
        return self._latest

    def next_generation(self, num_ranks: int, columns: int, pool_slots: int) -> ExpertMap:
        """What the next generation begins with. If a proposal came to nothing, some ranks may have flipped to it just
        before they lost each other: the old map then goes on under a number later than both. Ranks keep their numbers
        when there are more or fewer of them, and give up replicas that the pools then have no slots for."""
        current = self.current
        if current is None:
            current = ExpertMap.contiguous(*self._shape, num_ranks)
        elif current.num_ranks != num_ranks:
            stay = [rank if rank < current.num_ranks else None for rank in range(num_ranks)]
            current = trim(rehome(current, stay, epoch=self.new()), columns, pool_slots)
        elif current.epoch < self._latest:
            current = current.with_epoch(self.new())
        self.current = current
        return current


def same_place(one: ExpertMap, other: ExpertMap) -> bool:
    """Whether each rank holds the same experts, in whatever slots."""
    return one.num_ranks == other.num_ranks and np.array_equal(presence(one), presence(other))
