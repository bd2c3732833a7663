"""Local search over the placement of one layer, in plain Python: the reference of csrc/placement/search_steps.cpp.

The search takes the hottest rank, tries all ways to relieve it (a replica elsewhere, a move, a swap, a drop), takes
the best and goes on, by the first scenario alone while that is far from even. It leaves a path of placements, each with
its number of moves and its expected maximum level, from which the planner picks. layer_reference.py has the rest.

Letters: R ranks, K scenarios.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

from switchgear.placement.layer_reference import (
    EMPTY,
    SETTLE_SWEEPS,
    SETTLE_SWEEPS_FIRST,
    SETTLE_SWEEPS_SCENARIOS,
    Edit,
    Layer,
    LayerProblem,
    Path,
    sum_in_order,
)

HOT_RANKS_TRIED = 4
COLD_RANKS_TRIED = 16
PROGRESS = 1e-7  # of the sum of squares: less is none


class Action(NamedTuple):
    """`expert` of `slot` on the hot rank goes to `rank`; `other` is the slot there that it takes, if one."""

    kind: str  # replicate, move, swap, drop
    slot: int
    rank: int
    other: int  # EMPTY: a free slot


class SearchedLayer(Layer):
    """With the steps of a search."""

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


def _square(value: float) -> float:
    return value * value  # value**2 calls pow, which may round otherwise


def _leveled(high: float, low: float, share: float) -> float:
    """The sum of squares after as much of `share` as evens them went from high to low."""
    flow = (high - low) / 2.0
    flow = 0.0 if flow < 0.0 else min(flow, share)
    return _square(high - flow) + _square(low + flow)


def search(problem: LayerProblem) -> Path:
    """From `held_P` on."""
    layer, path, num_near = SearchedLayer(problem), Path(), 0
    layer.settle(SETTLE_SWEEPS_FIRST if len(problem.weight_K) == 1 else SETTLE_SWEEPS_SCENARIOS)
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


def _step(layer: SearchedLayer, step: int, used: int, path: Path) -> bool:
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
