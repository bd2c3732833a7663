"""Local search over the placement of one layer, in plain Python: the reference of csrc/placement/search.cpp.

A rank's level is what its experts cost in a step: for each expert held a fixed part (reading its weights, as often as
it is touched) and its rows. Rows of an expert with replicas are split so that levels are even: one expert after the
other is filled like water into its ranks, which converges to the split of least squares, and that one has the least
maximum too (loads that a placement allows are the bases of a polymatroid).

Loads come as scenarios, the likeliest first, each with a weight; a placement is as good as its expected maximum level,
where rows are split anew in each scenario, as the router does by the load of the batch. The search takes the hottest
rank, tries all ways to relieve it (a replica elsewhere, a move, a swap, a drop), takes the best and goes on, by the
first scenario alone while that is far from even. It leaves a path of placements, each with its number of moves and
its expected maximum, from which the planner picks.

Both sides do the same floating-point operations in the same order, so results are equal to the bit.

Letters: E logical experts, R ranks, S slots per rank, P = R * S slots, K scenarios.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

EMPTY = -1
SETTLE_SWEEPS_FIRST, SETTLE_SWEEPS = 100, 3
SETTLED = 1e-10  # of the mean level: no share changed by more
HOT_RANKS_TRIED = 4
COLD_RANKS_TRIED = 16
PROGRESS = 1e-7  # of the sum of squares: less is none


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


class Action(NamedTuple):
    """`expert` of `slot` on the hot rank goes to `rank`; `other` is the slot there that it takes, if one."""

    kind: str  # replicate, move, swap, drop
    slot: int
    rank: int
    other: int  # EMPTY: a free slot


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
            self._settle(k, sweeps)

    def _settle(self, k: int, sweeps: int) -> None:
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

    # Search

    def best_action(self, hot: int, used: int) -> Action | None:
        """The one that promises the largest decrease of the sum of squares, or of that per move."""
        problem, size = self.problem, self.problem.slots_per_rank
        num_extra = sum(expert != EMPTY for expert in self.held_P) - len(self.slots_E)
        room = num_extra < problem.extra_max
        best, best_score = None, 0.0

        def offer(action: Action, gain: float, moves: int) -> None:
            nonlocal best, best_score
            score = gain / (max(moves, 0) + 0.5) if problem.per_move else gain
            if self.moves + moves <= problem.moves_max and score > best_score:
                best, best_score = action, score

        cold = self.cold_ranks(hot, used)
        for slot in range(hot * size, hot * size + size):
            expert = self.held_P[slot]
            if expert == EMPTY or problem.frozen_E[expert]:
                continue
            replicas = len(self.slots_E[expert])
            more_K = [self.fixed(k, expert, replicas + 1) for k in range(used)]
            gone = -1 if not problem.had_RE[hot][expert] else 0
            if replicas > 1:
                gain = sum_in_order(self._gain_of_drop(k, slot, hot) for k in range(used))
                offer(Action("drop", slot, hot, EMPTY), gain, gone)
            for rank in cold:
                if self.slot_of(rank, expert) != EMPTY:
                    continue
                come = 0 if problem.had_RE[rank][expert] else 1
                others = [other for other in range(rank * size, rank * size + size) if self.held_P[other] != EMPTY]
                if len(others) < size:
                    gain, move_gain = self._gains(used, hot, slot, rank, EMPTY, more_K)
                    if room:
                        offer(Action("replicate", slot, rank, EMPTY), gain, come)
                    offer(Action("move", slot, rank, EMPTY), move_gain, come + gone)
                for other in others:
                    resident = self.held_P[other]
                    if problem.frozen_E[resident]:
                        continue
                    leaves = -1 if not problem.had_RE[rank][resident] else 0
                    if len(self.slots_E[resident]) > 1:
                        gain, move_gain = self._gains(used, hot, slot, rank, other, more_K)
                        offer(Action("replicate", slot, rank, other), gain, come + leaves)
                        offer(Action("move", slot, rank, other), move_gain, come + gone + leaves)
                    if self.slot_of(hot, resident) == EMPTY:
                        gain = sum_in_order(self._gain_of_swap(k, hot, slot, rank, other) for k in range(used))
                        back = 0 if problem.had_RE[hot][resident] else 1
                        offer(Action("swap", slot, rank, other), gain, come + gone + leaves + back)
        return best

    def cold_ranks(self, hot: int, used: int) -> list[int]:
        """The lowest ones, lowest first."""
        weight_K = self.problem.weight_K
        levels = [
            sum_in_order(weight_K[k] * self.level_KR[k][rank] for k in range(used))
            for rank in range(self.problem.num_ranks)
        ]
        others = [rank for rank in range(self.problem.num_ranks) if rank != hot]
        return sorted(others, key=levels.__getitem__)[:COLD_RANKS_TRIED]

    def _cost(self, k: int, slot: int) -> float:
        return self.fixed_KE[k][self.held_P[slot]] + self.share_KP[k][slot]

    def _gain_of_drop(self, k: int, slot: int, hot: int) -> float:
        hot_level, heir_level = self.level_KR[k][hot], self.level_KR[k][self._heir(k, slot)]
        after, heir_after = hot_level - self._cost(k, slot), heir_level + self.share_KP[k][slot]
        squares = hot_level * hot_level + _square(heir_level) - _square(after) - _square(heir_after)
        return self.problem.weight_K[k] * squares

    def _gain_of_swap(self, k: int, hot: int, slot: int, rank: int, other: int) -> float:
        hot_level, level = self.level_KR[k][hot], self.level_KR[k][rank]
        difference = self._cost(k, slot) - self._cost(k, other)
        squares = hot_level * hot_level + level * level
        squares = squares - _square(hot_level - difference) - _square(level + difference)
        return self.problem.weight_K[k] * squares

    def _gains(self, used: int, hot: int, slot: int, rank: int, other: int, more_K: list[float]) -> tuple[float, float]:
        """Of a replica and of a move to a free slot, or to that of a replica whose rows go to another one."""
        replica, move = 0.0, 0.0
        for k in range(used):
            hot_level, level = self.level_KR[k][hot], self.level_KR[k][rank]
            share, cost = self.share_KP[k][slot], self._cost(k, slot)
            high, low, squares = hot_level, level, hot_level * hot_level + level * level
            if other != EMPTY:
                heir, other_share = self._heir(k, other), self.share_KP[k][other]
                heir_level = self.level_KR[k][heir]
                low = level - self._cost(k, other)
                if heir == hot:
                    high = hot_level + other_share
                else:
                    squares = squares + _square(heir_level) - _square(heir_level + other_share)
            weight = self.problem.weight_K[k]
            replica += weight * (squares - _leveled(high - (cost - share) + more_K[k], low + more_K[k], share))
            move += weight * (squares - _square(high - cost) - _square(low + cost))
        return replica, move

    def _heir(self, k: int, slot: int) -> int:
        """The lowest rank of the other replicas."""
        others = [self.rank(other) for other in self.slots_E[self.held_P[slot]] if other != slot]
        return min(others, key=self.level_KR[k].__getitem__)

    def take(self, action: Action, step: int, path: Path) -> None:
        """Carries it out and settles."""

        def drop(slot: int) -> list[float]:
            path.edits.append(Edit(step, slot, self.held_P[slot], False))
            return self.drop(slot)

        def add(slot: int, expert: int, shares_K: list[float]) -> None:
            path.edits.append(Edit(step, slot, expert, True))
            self.add(slot, expert, shares_K)

        expert = self.held_P[action.slot]
        if action.kind == "drop":
            drop(action.slot)
        elif action.kind == "swap":
            resident = self.held_P[action.other]
            shares_K, resident_shares_K = drop(action.slot), drop(action.other)
            add(action.other, expert, shares_K)
            add(action.slot, resident, resident_shares_K)
        else:
            if action.other != EMPTY:
                drop(action.other)
            target = self.slot_of(action.rank, EMPTY)
            add(target, expert, drop(action.slot) if action.kind == "move" else [0.0] * len(self.scenarios))
        self.settle(SETTLE_SWEEPS)


def sum_in_order(values: Iterable[float]) -> float:
    """sum() compensates from Python 3.12 on."""
    total = 0.0
    for value in values:
        total += value
    return total


def _square(value: float) -> float:
    return value * value  # value**2 calls pow, which may round otherwise


def _leveled(high: float, low: float, share: float) -> float:
    """The sum of squares after as much of `share` as evens them went from high to low."""
    flow = (high - low) / 2.0
    flow = 0.0 if flow < 0.0 else min(flow, share)
    return _square(high - flow) + _square(low + flow)


def search(problem: LayerProblem) -> Path:
    """From `held_P` on."""
    layer, path, num_near = Layer(problem), Path(), 0
    layer.settle(SETTLE_SWEEPS_FIRST)
    path.moves.append(layer.moves)
    path.level_max.append(layer.expected_max())
    for step in range(1, problem.steps_max + 1):
        if layer.expected_max() <= problem.target * layer.expected_mean():
            break
        is_far = max(layer.level_KR[0]) > problem.near * layer.mean(0)
        if not is_far and num_near == problem.near_steps_max:
            break
        num_near += not is_far
        if not _step(layer, step, 1 if is_far else len(problem.weight_K), path):
            break
        path.moves.append(layer.moves)
        path.level_max.append(layer.expected_max())
    return path


def _step(layer: Layer, step: int, used: int, path: Path) -> bool:
    """Relieves the hottest rank, or one of the next hottest; whether that got anywhere."""
    heat_R = [-math.inf] * layer.problem.num_ranks
    for k in range(used):
        mean = layer.mean(k)
        for rank, level in enumerate(layer.level_KR[k]):
            heat_R[rank] = max(heat_R[rank], layer.problem.weight_K[k] * (level - mean))
    squares = layer.squares(used)
    for _ in range(HOT_RANKS_TRIED):
        hot = max(range(len(heat_R)), key=heat_R.__getitem__)
        if heat_R[hot] == -math.inf:
            return False
        action = layer.best_action(hot, used)
        if action is not None:
            saved, num_edits = copy.deepcopy(layer.__dict__), len(path.edits)
            layer.take(action, step, path)
            if layer.squares(used) < squares * (1.0 - PROGRESS):
                return True
            layer.__dict__.update(saved)
            del path.edits[num_edits:]
        heat_R[hot] = -math.inf
    return False
