"""Replicas as insurance, in plain Python: the reference of csrc/placement/insurance.cpp.

Once a layer is even for the load that is foretold, its free slots get replicas of the experts with most rows per
replica, so that the router can level what nobody foretold: rows flow between two ranks if they hold replicas of one
expert, and along chains of such ranks. So a replica goes to a low rank that is not yet connected with its expert's
ranks. A replica whose expert would be far below the hottest even without it is stale and makes room first.
At last replicas are swapped where ranks have little slack (slack_reference.py).

Letters: E logical experts, R ranks.
"""

from __future__ import annotations

from switchgear.placement.layer_reference import (
    EMPTY,
    SETTLE_SWEEPS,
    Edit,
    Layer,
    LayerProblem,
    Path,
)
from switchgear.placement.slack_reference import widen_slack

SETTLE_SWEEPS_FIRST = 10
STALE = 0.8  # of the largest rows a replica has
CONNECTED = 0.5  # of the mean level


def insure(problem: LayerProblem, stale_max: int) -> Path:
    """By the first scenario. The path has three points: the start, filled, and swapped."""
    layer, path = Layer(problem), Path()
    layer.settle(SETTLE_SWEEPS_FIRST)
    path.moves.append(layer.moves)
    path.level_max.append(layer.expected_max())
    _drop_stale(layer, stale_max, path)
    component_R = _components(layer)
    full_E = list(problem.frozen_E)
    while sum(expert != EMPTY for expert in layer.held_P) - len(layer.slots_E) < problem.extra_max:
        candidates = [expert for expert, full in enumerate(full_E) if not full]
        if not candidates:
            break
        expert = max(candidates, key=lambda e: _rows_per_replica(layer, e, 0))
        home, mean = component_R[layer.rank(layer.slots_E[expert][0])], layer.mean(0)
        ranks = [
            rank
            for rank in range(problem.num_ranks)
            if layer.slot_of(rank, EMPTY) != EMPTY
            and layer.slot_of(rank, expert) == EMPTY
            and layer.moves + (not problem.had_RE[rank][expert]) <= problem.moves_max
        ]
        if not ranks:
            full_E[expert] = True  # and stays so: free slots only become fewer
            continue
        scores = [
            layer.level_KR[0][r] + CONNECTED * mean if component_R[r] == home else layer.level_KR[0][r] for r in ranks
        ]
        best = ranks[scores.index(min(scores))]
        slot = layer.slot_of(best, EMPTY)
        path.edits.append(Edit(1, slot, expert, True))
        layer.add(slot, expert, [0.0] * len(problem.weight_K))
        joined = component_R[best]
        component_R = [home if component == joined else component for component in component_R]
        layer.settle_scenario(0, SETTLE_SWEEPS)  # the others once, at the end
    layer.settle(SETTLE_SWEEPS_FIRST)
    path.moves.append(layer.moves)
    path.level_max.append(layer.expected_max())
    num_edits = len(path.edits)
    widen_slack(layer, 2, path)
    if len(path.edits) > num_edits:
        layer.settle(SETTLE_SWEEPS_FIRST)
    path.moves.append(layer.moves)
    path.level_max.append(layer.expected_max())
    return path


def _rows_per_replica(layer: Layer, expert: int, fewer: int) -> float:
    return layer.problem.rows_KE[0][expert] / (len(layer.slots_E[expert]) - fewer)


def _drop_stale(layer: Layer, stale_max: int, path: Path) -> None:
    problem = layer.problem
    for count in range(stale_max):
        if layer.moves + count >= problem.moves_max:
            return
        free = [expert for expert, frozen in enumerate(problem.frozen_E) if not frozen]
        replicated = [expert for expert in free if len(layer.slots_E[expert]) > 1]
        if not replicated:
            return
        stale = min(replicated, key=lambda e: _rows_per_replica(layer, e, 1))
        if _rows_per_replica(layer, stale, 1) >= STALE * max(_rows_per_replica(layer, e, 0) for e in free):
            return
        worst = max(layer.slots_E[stale], key=lambda slot: layer.level_KR[0][layer.rank(slot)])
        path.edits.append(Edit(1, worst, stale, False))
        layer.drop(worst)
        layer.settle_scenario(0, SETTLE_SWEEPS)


def _components(layer: Layer) -> list[int]:
    component_R = list(range(layer.problem.num_ranks))
    for slots in layer.slots_E:
        for slot in slots[1:]:
            joined, home = component_R[layer.rank(slot)], component_R[layer.rank(slots[0])]
            component_R = [home if component == joined else component for component in component_R]
    return component_R
