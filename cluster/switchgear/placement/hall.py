"""How badly traffic that aims at experts can hit a placement: `hall_density`.

Who can make every token choose the same k experts puts all their rows on the ranks that hold them: k experts whose
replicas lie on few ranks are the worst. The largest number of experts (of k at most) per rank among those that lie
wholly within some set of ranks bounds it: with all traffic hostile and rows split as well as can be, the busiest rank
has R / k times that of the mean (by Hall's theorem, as max-flow has it).

Letters: E logical experts, R ranks.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

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
    if num_ranks > EXACT_RANKS_MAX:
        return _attacked(present_RE.astype(np.float32), top_k)
    masks_E = (present_RE * (1 << np.arange(num_ranks))[:, None]).sum(axis=0)
    within = np.bincount(masks_E, minlength=1 << num_ranks)  # experts that lie wholly within each set of ranks
    for rank in range(num_ranks):
        pairs = within.reshape(-1, 2, 1 << rank)
        pairs[:, 1] += pairs[:, 0]
    return float((np.minimum(within, top_k) / _sizes(num_ranks)).max())


@functools.cache
def _sizes(num_ranks: int) -> NDArray[np.float64]:
    """Of all sets of ranks; the empty one, which holds nothing, counts as one."""
    return np.array([max(1, index.bit_count()) for index in range(1 << num_ranks)], np.float64)


def _attacked(present_RE: NDArray[np.float32], top_k: int) -> float:
    """From each expert's ranks on, adds the rank that completes most experts, or else brings most near it."""
    sets_AR = np.unique(present_RE.T, axis=0)  # A attacks at once
    counts_E = present_RE.sum(axis=0)
    attacks = np.arange(len(sets_AR))
    best = 0.0
    while True:
        missing_AE = counts_E - sets_AR @ present_RE
        within_A = np.minimum((missing_AE == 0).sum(axis=1), top_k)
        best = max(best, float((within_A / sets_AR.sum(axis=1)).max()))
        if (within_A == top_k).all() or sets_AR.all():
            return best
        one, two = ((missing_AE == distance).astype(np.float32) @ present_RE.T for distance in (1, 2))
        gain_AR = np.where(sets_AR > 0, -1.0, one * (present_RE.shape[1] + 1) + two)
        chosen_A = gain_AR.argmax(axis=1)
        sets_AR[attacks, chosen_A] = 1.0  # a full set stays what it is
