"""How badly traffic that aims at experts can hit a placement: `hall_density`.

Who can make every token choose the same k experts puts all their rows on the ranks that hold them: k experts whose
replicas lie on few ranks are the worst. The largest number of experts (of k at most) per rank among those that lie
wholly within some set of ranks bounds it: with all traffic hostile and rows split as well as can be, the busiest rank
has R / k times that of the mean (by Hall's theorem, as max-flow has it).

Letters: E logical experts, R ranks.
"""

from __future__ import annotations

import numpy as np

from switchgear.placement.plan import Bool

EXACT_RANKS_MAX = 14


def hall_density(present_RE: Bool, top_k: int) -> float:
    """Experts per rank; exact up to 14 ranks, above that what a greedy attacker finds, a lower bound.

    >>> hall_density(np.array([[True, True, False], [False, True, True]]), 2)  # expert 0 alone on rank 0
    1.0
    >>> hall_density(np.ones((2, 3), bool), 2)
    1.0
    """
    num_ranks = len(present_RE)
    masks_E = [sum(1 << rank for rank in np.flatnonzero(column).tolist()) for column in present_RE.T]
    if num_ranks <= EXACT_RANKS_MAX:
        within = np.zeros(1 << num_ranks, np.int64)  # experts that lie wholly within each set of ranks
        np.add.at(within, masks_E, 1)
        for rank in range(num_ranks):
            pairs = within.reshape(-1, 2, 1 << rank)
            pairs[:, 1] += pairs[:, 0]
        sizes = np.array([max(1, index.bit_count()) for index in range(1 << num_ranks)])
        return float((np.minimum(within, top_k) / sizes).max())
    return max(_attack(mask, masks_E, num_ranks, top_k) for mask in set(masks_E))


def _attack(ranks: int, masks_E: list[int], num_ranks: int, top_k: int) -> float:
    """Grows a set of ranks by the one that adds most experts, then by the one that brings most near."""
    best = 0.0
    while True:
        within = sum(mask & ~ranks == 0 for mask in masks_E)
        best = max(best, min(within, top_k) / ranks.bit_count())
        if within >= top_k or ranks.bit_count() == num_ranks:
            return best
        gains = []
        for rank in range(num_ranks):
            if not ranks >> rank & 1:
                missing = [(mask & ~ranks & ~(1 << rank)).bit_count() for mask in masks_E if mask & ~ranks]
                gains.append((missing.count(0), missing.count(1), -rank))
        ranks |= 1 << -max(gains)[2]
