"""A placement by local search in all layers and one choice among their paths: what incremental and adaptive share.

Letters: L MoE layers, E logical experts, R ranks, P slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from switchgear.placement.choice import Int64, choose
from switchgear.placement.limits import frozen
from switchgear.placement.plan import Bool, presence
from switchgear.placement.problem import PlacementProblem
from switchgear.placement.score import Float64
from switchgear_runtime.moe.expert_map import EMPTY, ExpertMap
from switchgear_runtime.placement import planner

Scenarios = Sequence[tuple[float, Float64]]  # weight and load [L, E] of a window, the likeliest first


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSettings:
    steps_max: int  # of a layer
    target: float  # a layer is even enough when its slowest rank is within this factor of the mean
    per_move: bool
    near_steps_max: int = planner.UNLIMITED  # of those with all scenarios
    near: float = 1.1  # only the likeliest scenario counts while a layer is not within this factor


def slots_of(present_LRE: Bool, slots_per_rank: int) -> planner.Int32:
    """[L, P]: each rank's experts in its first slots."""
    num_layers, num_ranks, _ = present_LRE.shape
    held_LRS = np.full((num_layers, num_ranks, slots_per_rank), EMPTY, np.int32)
    layer, rank, expert = np.nonzero(present_LRE)
    group = layer * num_ranks + rank
    held_LRS[layer, rank, np.arange(group.size) - np.searchsorted(group, group)] = expert
    return held_LRS.reshape(num_layers, -1)


def presence_of(held_P: planner.Int32, num_ranks: int, num_experts: int) -> Bool:
    """[R, E]"""
    present_RE = np.zeros((num_ranks, num_experts + 1), np.bool_)
    present_RE[np.repeat(np.arange(num_ranks), len(held_P) // num_ranks), held_P] = True
    return present_RE[:, :-1]


def search_from(
    start_LRE: Bool,
    current: ExpertMap,
    scenarios: Scenarios,
    problem: PlacementProblem,
    settings: SearchSettings,
    moves_max_L: Int64 | None = None,
) -> planner.Search:
    """The arguments of a search that starts at `start_LRE`."""
    rows_KLE = np.stack([load_LE for _, load_LE in scenarios]) / problem.num_steps
    limit = problem.replica_budget_per_layer
    return planner.Search(
        weight_K=np.array([weight for weight, _ in scenarios]),
        work_KLE=rows_KLE * problem.cost.row_s,
        rows_KLE=rows_KLE,
        expert_s=problem.cost.expert_s,
        held_LP=slots_of(start_LRE, problem.slots_per_rank),
        had_LRE=presence(current),
        frozen_LE=frozen(start_LRE.shape, problem),
        extra_max=planner.UNLIMITED if limit is None else limit,
        moves_max_L=moves_max_L,
        steps_max=settings.steps_max,
        near_steps_max=settings.near_steps_max,
        target=settings.target,
        near=settings.near,
        per_move=settings.per_move,
    )


def chosen_presence(
    searches: list[planner.Paths],
    current: ExpertMap,
    *,
    moves_max: int,
    gain_per_move_s: float,
    room_R: Int64 | None,
) -> Bool:
    """[L, R, E]: of each layer, one point of one of the searches."""
    num_ranks, num_experts = current.num_ranks, current.num_experts
    origins: list[list[tuple[int, int]]] = []  # of each point: (search, point of its path)
    points_L = []
    for layer in range(current.num_layers):
        origin = [(s, point) for s, paths in enumerate(searches) for point in range(int(paths.num_points_L[layer]))]
        origins.append(origin)
        points_L.append(
            [
                (int(searches[s].moves_LN[layer, point]), float(searches[s].level_max_LN[layer, point]))
                for s, point in origin
            ]
        )

    def held(layer: int, index: int) -> Bool:
        s, point = origins[layer][index]
        return presence_of(searches[s].held(layer, point), num_ranks, num_experts)

    had_LRE = presence(current)
    chosen = choose(
        points_L,
        moves_max=moves_max,
        gain_per_move_s=gain_per_move_s,
        room_R=room_R,
        needs=lambda layer, index: np.asarray((held(layer, index) & ~had_LRE[layer]).sum(axis=1), np.int64),
    )
    return np.stack([held(layer, index) for layer, index in enumerate(chosen)])


def with_replicas(search: planner.Search, *, filling: float, swapping: float) -> tuple[Bool, Float64, Float64]:
    """Free slots filled, where that costs a layer no more than this fraction of its predicted time, and then replicas
    swapped likewise: ([L, R, E], seconds of each layer before, and after)."""
    num_layers, num_ranks, num_experts = search.had_LRE.shape
    paths = search.insured()
    before_L, filled_L, swapped_L = paths.level_max_LN[:, :3].T
    point_L = np.where(filled_L <= before_L * (1.0 + filling), 1, 0)
    point_L = np.where((point_L == 1) & (swapped_L <= filled_L * (1.0 + swapping)), 2, point_L)
    held_LP = [paths.held(layer, point) for layer, point in enumerate(point_L.tolist())]
    present_LRE = np.stack([presence_of(held_P, num_ranks, num_experts) for held_P in held_LP])
    return present_LRE, before_L, paths.level_max_LN[np.arange(num_layers), point_L]
