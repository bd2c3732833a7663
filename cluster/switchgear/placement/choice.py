"""How far each layer goes along its path of placements, with one budget for all: `choose`.

A path's points are (moves, seconds of its slowest rank). Of each layer's points only those on the lower convex hull
matter; hull segments of all layers are taken by seconds saved per move, steepest first, while each pays for its moves
and the budget lasts. Up to the last segment's size that is the optimum of the (fractional) knapsack.

Letters: L MoE layers, R ranks, N points.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
Points = Sequence[tuple[int, float]]  # (moves, seconds)
Needs = Callable[[int, int], Int64]  # (layer, point) -> experts that each rank gets, [R]


def hull(points: Points) -> list[int]:
    """Indices of the points from the first on that no other beats: fewer seconds for more moves, ever less per move.

    >>> hull([(0, 10.0), (1, 9.5), (2, 5.0), (3, 4.9), (4, 6.0)])
    [0, 2, 3]
    """
    order = sorted(range(len(points)), key=lambda index: (points[index][0], points[index][1], index))
    found: list[int] = []
    for index in order:
        moves, seconds = points[index]
        if found and (seconds >= points[found[-1]][1] or moves == points[found[-1]][0]):
            continue
        while len(found) > 1 and _slope(points, found[-2], found[-1]) <= _slope(points, found[-1], index):
            found.pop()
        found.append(index)
    return found


def _slope(points: Points, start: int, end: int) -> float:
    """Seconds saved per move."""
    (moves, seconds), (more_moves, fewer_seconds) = points[start], points[end]
    return (seconds - fewer_seconds) / (more_moves - moves)


def choose(
    points_L: Sequence[Points], *, moves_max: int, gain_per_move_s: float, room_R: Int64 | None, needs: Needs
) -> list[int]:
    """The point of each layer. `gain_per_move_s`: what a move must save of each step."""
    hulls = [hull(points) for points in points_L]
    chosen = [points[0] for points in hulls]
    moves = sum(points_L[layer][index][0] for layer, index in enumerate(chosen))
    used_LR = None if room_R is None else [needs(layer, index) for layer, index in enumerate(chosen)]
    heap: list[tuple[float, int, int]] = []  # (-slope, layer, position on the hull)

    def push(layer: int, position: int) -> None:
        if position < len(hulls[layer]):
            slope = _slope(points_L[layer], hulls[layer][position - 1], hulls[layer][position])
            if slope > gain_per_move_s:
                heapq.heappush(heap, (-slope, layer, position))

    for layer in range(len(hulls)):
        push(layer, 1)
    while heap:
        _, layer, position = heapq.heappop(heap)
        index = hulls[layer][position]
        extra = points_L[layer][index][0] - points_L[layer][chosen[layer]][0]
        if moves + extra > moves_max:
            continue  # later segments of this layer need even more
        if used_LR is not None and room_R is not None:
            need_R = needs(layer, index)
            if (sum(used_LR) - used_LR[layer] + need_R > room_R).any():
                continue
            used_LR[layer] = need_R
        moves += extra
        chosen[layer] = index
        push(layer, position + 1)
    return chosen
