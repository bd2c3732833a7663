"""Replicas where loads may move, in plain Python: the reference of csrc/placement/slack.cpp.

Rows flow between ranks only through replicas. So what a rank's *own* experts (those nobody else has) want can go nowhere
else, and beyond the mean it makes the rank slowest; and what all experts within a rank's *reach* (those it has) want is
the most it can take, and below the mean the others carry the rest. These are the bounds of a set of ranks (Hall's
condition) for sets of one rank and of all but one. Loads will not be what is foretold: with the volatility of late, each
sum has a standard deviation, and a rank whose own rows come within so many of them of the mean, or whose reach does, is
at risk. While the risk is worth a move, the replica that lowers it most takes the place of another one.

Letters: E logical experts, R ranks, K scenarios.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from switchgear.placement.layer_reference import EMPTY, SETTLE_SWEEPS, Edit, Layer, Path, sum_in_order

SWAPS_MAX = 8
DEVIATIONS = 2.5
VOLATILITY_UNKNOWN = 0.2  # of an expert's load, from one window to the next
NEGLIGIBLE = 0.05  # of the mean rows of a rank


@dataclass(slots=True)
class Sums:
    """Of some experts: their rows, and the squares of these, whose root times volatility is the deviation."""

    rows: float = 0.0
    squares: float = 0.0

    def plus(self, rows: float, sign: float) -> Sums:
        return Sums(self.rows + sign * rows, self.squares + sign * (rows * rows))

    def over(self, mean: float, deviations: float) -> float:
        return max(0.0, deviations * math.sqrt(max(0.0, self.squares)) - (mean - self.rows))

    def under(self, mean: float, deviations: float, others: float) -> float:
        return max(0.0, deviations * math.sqrt(max(0.0, self.squares)) - (self.rows - mean)) / others


class Swap(NamedTuple):
    """`expert` takes `slot`, which lowers the risk by `gain`."""

    slot: int
    expert: int
    gain: float


class Risk:
    """Of one placement."""

    def __init__(self, layer: Layer, mean: float, deviations: float) -> None:
        self.layer, self.mean, self.deviations = layer, mean, deviations
        self.rows_E = layer.problem.rows_KE[0]
        num_ranks = layer.problem.num_ranks
        self.others = float(num_ranks - 1)
        self.own_R = [Sums() for _ in range(num_ranks)]
        self.reach_R = [Sums() for _ in range(num_ranks)]
        for slot, expert in enumerate(layer.held_P):
            if expert == EMPTY:
                continue
            rank, rows = layer.rank(slot), self.rows_E[expert]
            self.reach_R[rank] = self.reach_R[rank].plus(rows, 1.0)
            if len(layer.slots_E[expert]) == 1:
                self.own_R[rank] = self.own_R[rank].plus(rows, 1.0)
        self.over_R = [self.over(own) for own in self.own_R]
        self.under_R = [self.under(reach) for reach in self.reach_R]

    def over(self, own: Sums) -> float:
        return own.over(self.mean, self.deviations)

    def under(self, reach: Sums) -> float:
        return reach.under(self.mean, self.deviations, self.others)

    def total(self) -> float:
        return sum_in_order(
            _square(over) + _square(under) for over, under in zip(self.over_R, self.under_R, strict=True)
        )

    def best_swap(self, least: float) -> Swap | None:
        """One that brings an expert to the coldest rank, or one of the hottest rank's own to another."""
        layer = self.layer
        hot, cold = self.over_R.index(max(self.over_R)), self.under_R.index(max(self.under_R))
        best = Swap(EMPTY, EMPTY, least)
        for expert in range(len(self.rows_E)):
            if layer.slot_of(cold, expert) == EMPTY:
                best = self._better(best, cold, expert)
        for rank in range(layer.problem.num_ranks):
            if rank == hot:
                continue
            for expert in range(len(self.rows_E)):
                if len(layer.slots_E[expert]) == 1 and layer.slot_of(hot, expert) != EMPTY:
                    best = self._better(best, rank, expert)
        return None if best.slot == EMPTY else best

    def _better(self, best: Swap, to: int, expert: int) -> Swap:
        """`expert` in place of each replica that `to` can spare."""
        layer, problem = self.layer, self.layer.problem
        if problem.frozen_E[expert]:
            return best
        first = to * problem.slots_per_rank
        for slot in range(first, first + problem.slots_per_rank):
            old = layer.held_P[slot]
            if old == EMPTY or problem.frozen_E[old] or len(layer.slots_E[old]) == 1:
                continue
            if layer.moves + (not problem.had_RE[to][expert]) - (not problem.had_RE[to][old]) > problem.moves_max:
                continue
            gain = self._gain(slot, to, expert, old)
            if gain > best.gain:
                best = Swap(slot, expert, gain)
        return best

    def _gain(self, slot: int, to: int, expert: int, old: int) -> float:
        layer, rows, old_rows = self.layer, self.rows_E[expert], self.rows_E[old]
        reach = self.reach_R[to].plus(rows, 1.0).plus(old_rows, -1.0)
        gain = _square(self.under_R[to]) - _square(self.under(reach))
        slots, old_slots = layer.slots_E[expert], layer.slots_E[old]
        owner = layer.rank(slots[0]) if len(slots) == 1 else EMPTY
        heir = EMPTY
        if len(old_slots) == 2:
            heir = layer.rank(old_slots[1] if old_slots[0] == slot else old_slots[0])
        if owner != EMPTY:
            own = self.own_R[owner].plus(rows, -1.0)
            if heir == owner:
                own = own.plus(old_rows, 1.0)
            gain += _square(self.over_R[owner]) - _square(self.over(own))
        if heir not in (EMPTY, owner):
            own = self.own_R[heir].plus(old_rows, 1.0)
            gain += _square(self.over_R[heir]) - _square(self.over(own))
        return gain


def volatility(rows_KE: list[list[float]]) -> float:
    """By how much the other scenarios differ from the first: root of the mean square, large experts weighing more."""
    first_E, *others_KE = rows_KE
    if not others_KE:
        return VOLATILITY_UNKNOWN
    total = sum_in_order(_square(rows) for rows in first_E)
    if total == 0.0:
        return 0.0
    changes = sum_in_order(
        _square(rows - first) for rows_E in others_KE for rows, first in zip(rows_E, first_E, strict=True)
    )
    return math.sqrt(changes / (total * float(len(others_KE))))


def widen_slack(layer: Layer, step: int, path: Path) -> None:
    """Swaps replicas, by the first scenario's rows and the volatility of all; `step`: of the path's edits."""
    problem = layer.problem
    if problem.num_ranks < 2:
        return
    mean = sum_in_order(problem.rows_KE[0]) / problem.num_ranks
    deviations = DEVIATIONS * volatility(problem.rows_KE)
    least = _square(NEGLIGIBLE * mean)
    for _ in range(SWAPS_MAX):
        risk = Risk(layer, mean, deviations)
        if risk.total() <= least:
            return
        swap = risk.best_swap(least)
        if swap is None:
            return
        path.edits.append(Edit(step, swap.slot, layer.held_P[swap.slot], False))
        layer.drop(swap.slot)
        path.edits.append(Edit(step, swap.slot, swap.expert, True))
        layer.add(swap.slot, swap.expert, [0.0] * len(problem.weight_K))
        layer.settle_scenario(0, SETTLE_SWEEPS)


def _square(value: float) -> float:
    return value * value
