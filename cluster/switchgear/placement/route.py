"""From one map to any other, in as many migrations as the slot pools take: `route_to`.

While a rank stages, what it holds and what it gets lie in its pool side by side. A large change therefore goes in hops:
each brings what fits, and lets go of what the target does not want there and somebody else holds by then.

Letters: L MoE layers, R ranks, E logical experts.
"""

from __future__ import annotations

import numpy as np

from switchgear.placement.plan import Bool, arrange, presence
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.moe.expert_map import ExpertMap


def route_to(target: ExpertMap, current: ExpertMap, pool_slots: int) -> tuple[ExpertMap, ...]:
    """The maps to migrate to, one after the other; the last is `target`. ConfigError if the pools leave no way.

    Example, 2 ranks with pools of 3: from [[0, 1 | 2, 3]] to [[2, 3 | 0, 1]] by way of [[1, 2 | 3, 0]].
    """
    wanted_LRE, held_LRE = presence(target), presence(current)
    hops: list[ExpertMap] = []
    while not _fits(wanted_LRE | held_LRE, pool_slots):
        next_LRE = _hop(held_LRE, wanted_LRE, pool_slots)
        if np.array_equal(next_LRE, held_LRE):
            raise ConfigError(
                f"expert map: pools of {pool_slots} slots are too full to get there from the map in force, even step by "
                "step; apply one with fewer replicas first, or raise survive"
            )
        before = hops[-1] if hops else current
        columns = max(before.slots_per_rank, int(next_LRE.sum(axis=2).max()))
        hops.append(arrange(next_LRE, before, columns))
        held_LRE = next_LRE
    return (*hops, target)


def _fits(held_LRE: Bool, pool_slots: int) -> bool:
    return bool(held_LRE.sum(axis=(0, 2)).max() <= pool_slots)


def _hop(held_LRE: Bool, wanted_LRE: Bool, pool_slots: int) -> Bool:
    """What is held after the next migration."""
    next_LRE = held_LRE.copy()
    for rank in range(held_LRE.shape[1]):
        missing = np.argwhere(wanted_LRE[:, rank] & ~held_LRE[:, rank])
        # First those that free a slot elsewhere: their present holders are not to keep them.
        layers, experts = missing.T
        frees = (held_LRE & ~wanted_LRE)[layers, :, experts].any(axis=1)
        free = pool_slots - int(held_LRE[:, rank].sum())
        for layer, expert in missing[np.argsort(~frees, kind="stable")][: max(0, free)]:
            next_LRE[layer, rank, expert] = True
    for layer, rank, expert in np.argwhere(next_LRE & ~wanted_LRE):
        if next_LRE[layer, :, expert].sum() > 1:
            next_LRE[layer, rank, expert] = False
    return next_LRE
