"""Local search over the placement of one layer, in plain Python: the reference of csrc/placement/search.cpp.

A rank's level is what its experts cost in a step: for each expert held a fixed part (reading its weights, as often as
it is touched) and its rows. Rows of an expert with replicas are split so that levels are even: one expert after the
other is filled like water into its ranks, which converges to the split of least squares, and that one has the least
maximum too (loads that a placement allows are the bases of a polymatroid). The search takes the hottest rank, tries
all ways to relieve it (a replica elsewhere, a move, a swap, a drop), takes the best and goes on: a path of
placements, each with its number of moves and its maximum level, from which the planner picks.

Both sides do the same floating-point operations in the same order, so results are equal to the bit.

Letters: E logical experts, R ranks, S slots per rank, P = R * S slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

EMPTY = -1
SETTLE_SWEEPS_FIRST, SETTLE_SWEEPS = 100, 3
SETTLED = 1e-10  # of the mean level: no share changed by more
HOT_RANKS_TRIED = 4
PROGRESS = 1e-9  # of the sum of squares: less is none


@dataclass(frozen=True, kw_only=True)
class LayerProblem:
    """What a search of one layer is given."""

    num_ranks: int
    slots_per_rank: int
    work_E: list[float]  # seconds a step of an expert's rows, wherever they run
    rows_E: list[float]  # rows a step
    expert_s: float  # reading one expert's weights
    held_P: list[int]  # where the search starts: legal; EMPTY slots allowed
    had_RE: list[list[bool]]  # where experts are today: bringing one there again is no move
    frozen_E: list[bool]  # pinned: stay as they are
    extra_max: int  # replicas beyond the first
    moves_max: int
    steps_max: int
    target: float  # search until the maximum is within this factor of the mean
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
        num_experts = len(problem.work_E)
        self.held_P = list(problem.held_P)
        self.share_P = [0.0] * len(self.held_P)
        self.slots_E: list[list[int]] = [[] for _ in range(num_experts)]
        for slot, expert in enumerate(self.held_P):
            if expert != EMPTY:
                self.slots_E[expert].append(slot)
        self.fixed_E = [self.fixed(expert, len(slots)) for expert, slots in enumerate(self.slots_E)]
        for expert, slots in enumerate(self.slots_E):
            for slot in slots:
                self.share_P[slot] = problem.work_E[expert] / len(slots)
        self.level_R = [0.0] * problem.num_ranks
        self.moves = sum(
            not problem.had_RE[self.rank(slot)][expert] for slot, expert in enumerate(self.held_P) if expert != EMPTY
        )

    def rank(self, slot: int) -> int:
        return slot // self.problem.slots_per_rank

    def fixed(self, expert: int, num_replicas: int) -> float:
        """What each of so many replicas costs beside its rows."""
        return self.problem.expert_s * (1.0 - math.exp(-self.problem.rows_E[expert] / num_replicas))

    def slot_of(self, rank: int, expert: int) -> int:
        """EMPTY as an expert finds the first free slot; EMPTY as the answer: there is none."""
        first = rank * self.problem.slots_per_rank
        for slot in range(first, first + self.problem.slots_per_rank):
            if self.held_P[slot] == expert:
                return slot
        return EMPTY

    # Water

    def settle(self, sweeps: int) -> None:
        """Evens the levels by other shares."""
        problem = self.problem
        for rank in range(problem.num_ranks):
            level = 0.0
            first = rank * problem.slots_per_rank
            for slot in range(first, first + problem.slots_per_rank):
                if self.held_P[slot] != EMPTY:
                    level += self.fixed_E[self.held_P[slot]] + self.share_P[slot]
            self.level_R[rank] = level
        tolerance = SETTLED * self.mean()
        for _ in range(sweeps):
            change = 0.0
            for expert, slots in enumerate(self.slots_E):
                if len(slots) > 1:
                    change = max(change, self._fill(problem.work_E[expert], slots))
            if change <= tolerance:
                break

    def _fill(self, work: float, slots: list[int]) -> float:
        """Splits one expert anew; the largest change of a share."""
        order = []  # (level without this expert, slot), lowest first; ties keep the order of slots
        for slot in slots:
            entry = (self.level_R[self.rank(slot)] - self.share_P[slot], slot)
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
            change = max(change, abs(share - self.share_P[slot]))
            self.share_P[slot] = share
            self.level_R[self.rank(slot)] = level + share
        return change

    def mean(self) -> float:
        total = 0.0
        for level in self.level_R:
            total += level
        return total / self.problem.num_ranks

    def squares(self) -> float:
        total = 0.0
        for level in self.level_R:
            total += level * level
        return total

    # Edits

    def add(self, slot: int, expert: int) -> None:
        self.held_P[slot] = expert
        self.share_P[slot] = 0.0
        slots = self.slots_E[expert]
        place = len(slots)
        while place > 0 and slots[place - 1] > slot:
            place -= 1
        slots.insert(place, slot)
        self.fixed_E[expert] = self.fixed(expert, len(slots))
        self.moves += not self.problem.had_RE[self.rank(slot)][expert]

    def drop(self, slot: int) -> None:
        """Its rows go to another replica; with none left they stay at the expert until it is added again."""
        expert = self.held_P[slot]
        slots = self.slots_E[expert]
        slots.remove(slot)
        self.held_P[slot] = EMPTY
        if slots:
            heir = min(slots, key=lambda other: self.level_R[self.rank(other)])
            self.share_P[heir] += self.share_P[slot]
            self.fixed_E[expert] = self.fixed(expert, len(slots))
        self.share_P[slot] = 0.0
        self.moves -= not self.problem.had_RE[self.rank(slot)][expert]

    # Search

    def best_action(self, hot: int) -> Action | None:
        """The one that promises the largest decrease of the sum of squares, or of that per move."""
        problem = self.problem
        size = problem.slots_per_rank
        num_extra = sum(expert != EMPTY for expert in self.held_P) - len(self.slots_E)
        room = num_extra < problem.extra_max
        best, best_score = None, 0.0

        def offer(action: Action, gain: float, moves: int) -> None:
            nonlocal best, best_score
            score = gain / (max(moves, 0) + 0.5) if problem.per_move else gain
            if self.moves + moves <= problem.moves_max and score > best_score:
                best, best_score = action, score

        hot_level = self.level_R[hot]
        for slot in range(hot * size, hot * size + size):
            expert = self.held_P[slot]
            if expert == EMPTY or problem.frozen_E[expert]:
                continue
            fixed, share = self.fixed_E[expert], self.share_P[slot]
            cost = fixed + share
            replicas = len(self.slots_E[expert])
            fixed_more = self.fixed(expert, replicas + 1)
            gone = -1 if not problem.had_RE[hot][expert] else 0
            if replicas > 1:
                heir = self._heir(slot)
                after, heir_after = hot_level - cost, self.level_R[heir] + share
                gain = hot_level * hot_level + _square(self.level_R[heir]) - _square(after) - _square(heir_after)
                offer(Action("drop", slot, hot, EMPTY), gain, gone)
            for rank in range(problem.num_ranks):
                level = self.level_R[rank]
                if level >= hot_level or self.slot_of(rank, expert) != EMPTY:
                    continue
                come = 0 if problem.had_RE[rank][expert] else 1
                before = hot_level * hot_level + level * level
                if self.slot_of(rank, EMPTY) != EMPTY:
                    if room:
                        gain = before - _leveled(hot_level - fixed + fixed_more, level + fixed_more, share)
                        offer(Action("replicate", slot, rank, EMPTY), gain, come)
                    gain = before - _square(hot_level - cost) - _square(level + cost)
                    offer(Action("move", slot, rank, EMPTY), gain, come + gone)
                for other in range(rank * size, rank * size + size):
                    resident = self.held_P[other]
                    if resident == EMPTY or problem.frozen_E[resident]:
                        continue
                    leaves = -1 if not problem.had_RE[rank][resident] else 0
                    resident_cost = self.fixed_E[resident] + self.share_P[other]
                    if len(self.slots_E[resident]) > 1:
                        heir = self._heir(other)
                        low = level - resident_cost
                        if heir == hot:
                            high, squares = hot_level + self.share_P[other], before
                        else:
                            heir_after = self.level_R[heir] + self.share_P[other]
                            high, squares = hot_level, before + _square(self.level_R[heir]) - _square(heir_after)
                        gain = squares - _leveled(high - fixed + fixed_more, low + fixed_more, share)
                        offer(Action("replicate", slot, rank, other), gain, come + leaves)
                        gain = squares - _square(high - cost) - _square(low + cost)
                        offer(Action("move", slot, rank, other), gain, come + gone + leaves)
                    if resident_cost < cost and self.slot_of(hot, resident) == EMPTY:
                        difference = cost - resident_cost
                        gain = before - _square(hot_level - difference) - _square(level + difference)
                        back = 0 if problem.had_RE[hot][resident] else 1
                        offer(Action("swap", slot, rank, other), gain, come + gone + leaves + back)
        return best

    def _heir(self, slot: int) -> int:
        """The lowest rank of the other replicas."""
        others = [self.rank(other) for other in self.slots_E[self.held_P[slot]] if other != slot]
        return min(others, key=self.level_R.__getitem__)

    def take(self, action: Action, step: int, path: Path) -> None:
        """Carries it out and settles."""

        def drop(slot: int) -> int:
            expert = self.held_P[slot]
            path.edits.append(Edit(step, slot, expert, False))
            self.drop(slot)
            return expert

        def add(slot: int, expert: int, share: float) -> None:
            path.edits.append(Edit(step, slot, expert, True))
            self.add(slot, expert)
            self.share_P[slot] = share

        if action.kind == "drop":
            drop(action.slot)
        elif action.kind == "swap":
            shares = self.share_P[action.slot], self.share_P[action.other]
            replicated = [len(self.slots_E[self.held_P[slot]]) > 1 for slot in (action.slot, action.other)]
            expert, resident = drop(action.slot), drop(action.other)
            add(action.other, expert, 0.0 if replicated[0] else shares[0])
            add(action.slot, resident, 0.0 if replicated[1] else shares[1])
        else:
            if action.other != EMPTY:
                drop(action.other)
            target = self.slot_of(action.rank, EMPTY)
            expert, share = self.held_P[action.slot], self.share_P[action.slot]
            if action.kind == "move":
                replicated_here = len(self.slots_E[expert]) > 1
                drop(action.slot)
                add(target, expert, 0.0 if replicated_here else share)
            else:
                add(target, expert, 0.0)
        self.settle(SETTLE_SWEEPS)


def _square(value: float) -> float:
    return value * value  # value**2 calls pow, which may round otherwise


def _leveled(high: float, low: float, share: float) -> float:
    """The sum of squares after as much of `share` as evens them went from high to low."""
    flow = (high - low) / 2.0
    flow = 0.0 if flow < 0.0 else min(flow, share)
    return _square(high - flow) + _square(low + flow)


def search(problem: LayerProblem) -> Path:
    """From `held_P` on."""
    layer, path = Layer(problem), Path()
    layer.settle(SETTLE_SWEEPS_FIRST)
    path.moves.append(layer.moves)
    path.level_max.append(max(layer.level_R))
    for step in range(1, problem.steps_max + 1):
        if max(layer.level_R) <= problem.target * layer.mean():
            break
        tried: list[int] = []
        squares = layer.squares()
        for _ in range(HOT_RANKS_TRIED):
            rest = [rank for rank in range(problem.num_ranks) if rank not in tried]
            if not rest:
                return path
            hot = max(rest, key=layer.level_R.__getitem__)
            action = layer.best_action(hot)
            if action is not None:
                saved = _save(layer)
                num_edits = len(path.edits)
                layer.take(action, step, path)
                if layer.squares() < squares * (1.0 - PROGRESS):
                    break
                _restore(layer, saved)
                del path.edits[num_edits:]
            tried.append(hot)
        else:
            return path
        path.moves.append(layer.moves)
        path.level_max.append(max(layer.level_R))
    return path


def _save(layer: Layer) -> tuple[list[int], list[float], list[list[int]], list[float], list[float], int]:
    slots_E = [list(slots) for slots in layer.slots_E]
    return list(layer.held_P), list(layer.share_P), slots_E, list(layer.fixed_E), list(layer.level_R), layer.moves


def _restore(
    layer: Layer, saved: tuple[list[int], list[float], list[list[int]], list[float], list[float], int]
) -> None:
    layer.held_P, layer.share_P, layer.slots_E, layer.fixed_E, layer.level_R, layer.moves = saved
