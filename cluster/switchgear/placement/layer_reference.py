"""The state of a layer while its placement is searched, in plain Python: the reference of csrc/placement/search.cpp.

A rank's level is what its experts cost in a step: for each expert held a fixed part (reading its weights, as often as
it is touched) and its rows. Rows of an expert with replicas are split so that levels are even: one expert after the
other is filled like water into its ranks, which converges to the split of least squares, and that one has the least
maximum too (loads that a placement allows are the bases of a polymatroid).

Loads come as scenarios, the likeliest first, each with a weight; a placement is as good as its expected maximum level,
where rows are split anew in each scenario, as the router does by the load of the batch.

Both sides do the same floating-point operations in the same order, so results are equal to the bit.

Letters: E logical experts, R ranks, S slots per rank, P = R * S slots, K scenarios.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

EMPTY = -1
SETTLE_SWEEPS_FIRST, SETTLE_SWEEPS_SCENARIOS, SETTLE_SWEEPS = 400, 15, 3  # the first is all but exact
SETTLED = 1e-10  # of the mean level: no share changed by more


@dataclass(frozen=True, kw_only=True)
class LayerProblem:
    """What a search of one layer is given."""

    num_ranks: int
    slots_per_rank: int
    weight_K: list[float]  # of the scenarios; their sum is 1
    work_KE: list[list[float]]  # seconds a step of an expert's rows, wherever they run
    rows_KE: list[list[float]]  # rows a step
    expert_s: float  # reading one expert's weights
    held_P: list[int]  # where the search starts: legal; EMPTY slots allowed
    had_RE: list[list[bool]]  # where experts are today: bringing one there again is no move
    frozen_E: list[bool]  # pinned: stay as they are
    extra_max: int  # replicas beyond the first
    moves_max: int
    steps_max: int
    near_steps_max: int  # of those with all scenarios
    target: float  # search until the expected maximum is within this factor of the mean
    near: float  # while the first scenario's maximum is beyond this factor of its mean, only that one counts
    per_move: bool  # prefer much gain for few moves, not the largest gain


class Edit(NamedTuple):
    """`expert` comes to (or leaves) `slot`."""

    step: int
    slot: int
    expert: int
    comes: bool


@dataclass
class Path:
    """Placements reached: moves so far and maximum level of each, the first is the start's."""

    moves: list[int] = field(default_factory=list)
    level_max: list[float] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)


class Layer:
    """The state of a search."""

    def __init__(self, problem: LayerProblem) -> None:
        self.problem = problem
        num_experts = len(problem.frozen_E)
        self.held_P = list(problem.held_P)
        self.slots_E: list[list[int]] = [[] for _ in range(num_experts)]
        for slot, expert in enumerate(self.held_P):
            if expert != EMPTY:
                self.slots_E[expert].append(slot)
        self.scenarios = range(len(problem.weight_K))
        self.fixed_KE = [[self.fixed(k, e, len(self.slots_E[e])) for e in range(num_experts)] for k in self.scenarios]
        self.share_KP = [[0.0] * len(self.held_P) for _ in self.scenarios]
        for k in self.scenarios:
            for expert, slots in enumerate(self.slots_E):
                for slot in slots:
                    self.share_KP[k][slot] = problem.work_KE[k][expert] / len(slots)
        self.level_KR = [[0.0] * problem.num_ranks for _ in self.scenarios]
        self.moves = sum(
            not problem.had_RE[self.rank(slot)][expert] for slot, expert in enumerate(self.held_P) if expert != EMPTY
        )

    def rank(self, slot: int) -> int:
        return slot // self.problem.slots_per_rank

    def fixed(self, k: int, expert: int, num_replicas: int) -> float:
        """What each of so many replicas costs beside its rows."""
        return self.problem.expert_s * (1.0 - math.exp(-self.problem.rows_KE[k][expert] / num_replicas))

    def slot_of(self, rank: int, expert: int) -> int:
        """EMPTY as an expert finds the first free slot; EMPTY as the answer: there is none."""
        first = rank * self.problem.slots_per_rank
        for slot in range(first, first + self.problem.slots_per_rank):
            if self.held_P[slot] == expert:
                return slot
        return EMPTY

    # Water

    def settle(self, sweeps: int) -> None:
        """Evens the levels by other shares, in each scenario."""
        for k in self.scenarios:
            self.settle_scenario(k, sweeps)

    def settle_scenario(self, k: int, sweeps: int) -> None:
        problem = self.problem
        for rank in range(problem.num_ranks):
            level = 0.0
            first = rank * problem.slots_per_rank
            for slot in range(first, first + problem.slots_per_rank):
                if self.held_P[slot] != EMPTY:
                    level += self.fixed_KE[k][self.held_P[slot]] + self.share_KP[k][slot]
            self.level_KR[k][rank] = level
        tolerance = SETTLED * self.mean(k)
        for _ in range(sweeps):
            change = 0.0
            for expert, slots in enumerate(self.slots_E):
                if len(slots) > 1:
                    change = max(change, self._fill(k, problem.work_KE[k][expert], slots))
            if change <= tolerance:
                break

    def _fill(self, k: int, work: float, slots: list[int]) -> float:
        """Splits one expert anew; the largest change of a share."""
        level_R, share_P = self.level_KR[k], self.share_KP[k]
        order: list[tuple[float, int]] = []  # (level without this expert, slot), lowest first; ties by slot
        for slot in slots:
            entry = (level_R[self.rank(slot)] - share_P[slot], slot)
            place = len(order)
            while place > 0 and order[place - 1][0] > entry[0]:
                place -= 1
            order.insert(place, entry)
        total, surface = work, 0.0
        for index, (level, _) in enumerate(order):
            if index and surface <= level:
                break
            total += level
            surface = total / (index + 1)
        change = 0.0
        for level, slot in order:
            share = surface - level if level < surface else 0.0
            change = max(change, abs(share - share_P[slot]))
            share_P[slot] = share
            level_R[self.rank(slot)] = level + share
        return change

    def mean(self, k: int) -> float:
        return sum_in_order(self.level_KR[k]) / self.problem.num_ranks

    def squares(self, used: int) -> float:
        """The sum over scenarios and ranks."""
        weight_K, level_KR = self.problem.weight_K, self.level_KR
        return sum_in_order(weight_K[k] * sum_in_order(level * level for level in level_KR[k]) for k in range(used))

    def expected_max(self) -> float:
        return sum_in_order(self.problem.weight_K[k] * max(self.level_KR[k]) for k in self.scenarios)

    def expected_mean(self) -> float:
        return sum_in_order(self.problem.weight_K[k] * self.mean(k) for k in self.scenarios)

    # Edits

    def add(self, slot: int, expert: int, shares_K: list[float]) -> None:
        self.held_P[slot] = expert
        slots = self.slots_E[expert]
        place = len(slots)
        while place > 0 and slots[place - 1] > slot:
            place -= 1
        slots.insert(place, slot)
        for k in self.scenarios:
            self.share_KP[k][slot] = shares_K[k]
            self.fixed_KE[k][expert] = self.fixed(k, expert, len(slots))
        self.moves += not self.problem.had_RE[self.rank(slot)][expert]

    def drop(self, slot: int) -> list[float]:
        """Its rows go to another replica. What to add it with elsewhere: its rows, if there is none, else nothing."""
        expert = self.held_P[slot]
        slots = self.slots_E[expert]
        slots.remove(slot)
        self.held_P[slot] = EMPTY
        shares_K = [share_P[slot] for share_P in self.share_KP]
        for k in self.scenarios:
            if slots:
                levels = [self.level_KR[k][self.rank(other)] for other in slots]
                self.share_KP[k][slots[levels.index(min(levels))]] += self.share_KP[k][slot]
                self.fixed_KE[k][expert] = self.fixed(k, expert, len(slots))
                shares_K[k] = 0.0
            self.share_KP[k][slot] = 0.0
        self.moves -= not self.problem.had_RE[self.rank(slot)][expert]
        return shares_K


def sum_in_order(values: Iterable[float]) -> float:
    """sum() compensates from Python 3.12 on."""
    total = 0.0
    for value in values:
        total += value
    return total
