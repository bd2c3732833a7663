"""What every policy's map must obey: slots, pools, pins. And whether one does.

Letters: L MoE layers, E logical experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from switchgear.placement.plan import Bool, presence
from switchgear.placement.problem import PlacementProblem
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.moe.expert_map import ExpertMap

Int64 = NDArray[np.int64]


def start_presence(current: ExpertMap, problem: PlacementProblem) -> Bool:
    """Where experts are today, once pins are obeyed. ConfigError if today's map does not fit the problem."""
    if current.num_ranks != problem.topology.num_ranks:
        raise ConfigError(
            f"placement: the map is for {current.num_ranks} ranks, the topology has {problem.topology.num_ranks}; "
            "re-home the map first"
        )
    present_LRE = presence(current)
    most = int(present_LRE.sum(axis=2).max())
    if most > problem.slots_per_rank:
        raise ConfigError(f"placement: a rank holds {most} experts of a layer; slots_per_rank={problem.slots_per_rank}")
    return pinned(present_LRE, problem)


def pinned(present_LRE: Bool, problem: PlacementProblem) -> Bool:
    """With pinned experts exactly where they are pinned; whom they displace goes where there is room."""
    if not problem.pinned:
        return present_LRE
    present_LRE = present_LRE.copy()
    frozen_LE = frozen(present_LRE.shape, problem)
    for (layer, expert), ranks in problem.pinned.items():
        present_LRE[layer, :, expert] = False
        present_LRE[layer, list(ranks), expert] = True
    for layer in sorted({layer for layer, _ in problem.pinned}):
        _make_room(present_LRE[layer], frozen_LE[layer], problem.slots_per_rank, layer)
    return present_LRE


def _make_room(present_RE: Bool, frozen_E: Bool, slots_per_rank: int, layer: int) -> None:
    """Evicts replicas, else moves experts, from ranks that hold too many."""
    for rank in np.flatnonzero(present_RE.sum(axis=1) > slots_per_rank).tolist():
        while present_RE[rank].sum() > slots_per_rank:
            movable_E = present_RE[rank] & ~frozen_E
            replicated_E = movable_E & (present_RE.sum(axis=0) > 1)
            if replicated_E.any():
                present_RE[rank, int(replicated_E.argmax())] = False
                continue
            free_R = present_RE.sum(axis=1) < slots_per_rank
            if not movable_E.any() or not free_R.any():
                free_R = _evict_elsewhere(present_RE, frozen_E, slots_per_rank)
            if not movable_E.any() or not free_R.any():
                raise ConfigError(f"placement: layer {layer}: rank {rank} has more pinned experts than room; pin fewer")
            expert = int(movable_E.argmax())
            present_RE[rank, expert] = False
            present_RE[int(free_R.argmax()), expert] = True


def _evict_elsewhere(present_RE: Bool, frozen_E: Bool, slots_per_rank: int) -> Bool:
    """Frees one slot by dropping any unpinned replica; which ranks have room then."""
    spare_RE = present_RE & ~frozen_E & (present_RE.sum(axis=0) > 1)
    if spare_RE.any():
        rank, expert = divmod(int(spare_RE.argmax()), present_RE.shape[1])
        present_RE[rank, expert] = False
    return np.asarray(present_RE.sum(axis=1) < slots_per_rank)


def frozen(shape_LRE: tuple[int, ...], problem: PlacementProblem) -> Bool:
    """[L, E]: whether an expert is pinned."""
    frozen_LE = np.zeros((shape_LRE[0], shape_LRE[2]), np.bool_)
    for layer, expert in problem.pinned:
        frozen_LE[layer, expert] = True
    return frozen_LE


def pool_room(current: ExpertMap, problem: PlacementProblem) -> Int64 | None:
    """How many experts each rank can take beside those it holds; None: as many as there are slots.

    What a plan drops is dropped only once the new map is in force, so it makes no room for this plan.
    """
    if problem.pool_slots is None:
        return None
    return np.asarray(problem.pool_slots - presence(current).sum(axis=(0, 2)), np.int64)


def affordable(
    wanted_LRE: Bool, start_LRE: Bool, current: ExpertMap, problem: PlacementProblem, order: Sequence[int]
) -> Bool:
    """Whole layers of `wanted_LRE`, in this order, while budget and pools last; the others from `start_LRE`."""
    room_R = pool_room(current, problem)
    if room_R is None and problem.byte_budget is None:
        return wanted_LRE
    had_LRE = presence(current)
    wanted_moves_LR, start_moves_LR = ((present & ~had_LRE).sum(axis=2) for present in (wanted_LRE, start_LRE))
    moves_R, chosen_LRE = start_moves_LR.sum(axis=0), start_LRE.copy()
    for layer in order:
        next_R = moves_R + wanted_moves_LR[layer] - start_moves_LR[layer]
        if problem.byte_budget is not None and next_R.sum() * problem.cost.expert_bytes > problem.byte_budget:
            continue
        if room_R is None or (next_R <= room_R).all():
            chosen_LRE[layer], moves_R = wanted_LRE[layer], next_R
    return chosen_LRE


def check_legal(present_LRE: Bool, current: ExpertMap, problem: PlacementProblem) -> None:
    """ConfigError that names the limit which a map of these experts breaks."""
    had_LRE = presence(current)
    coming_LRE = present_LRE & ~had_LRE
    if not present_LRE.any(axis=1).all():
        raise ConfigError("placement: an expert would have no rank")
    if present_LRE.sum(axis=2).max() > problem.slots_per_rank:
        raise ConfigError(f"placement: a rank would hold more than slots_per_rank={problem.slots_per_rank}")
    room_R = pool_room(current, problem)
    if room_R is not None and (coming_LRE.sum(axis=(0, 2)) > np.maximum(room_R, 0)).any():
        raise ConfigError(f"placement: a rank would get more than its pool of {problem.pool_slots} has free")
    extra_max = problem.replica_budget_per_layer
    if extra_max is not None:
        extra_L, had_L = (present.sum(axis=(1, 2)) - present.shape[2] for present in (present_LRE, had_LRE))
        if (extra_L > np.maximum(extra_max, had_L)).any():
            raise ConfigError(f"placement: a layer would have more than {extra_max} replicas beyond the first")
    if problem.byte_budget is not None and coming_LRE.sum() * problem.cost.expert_bytes > problem.byte_budget:
        raise ConfigError(f"placement: the moves exceed byte_budget={problem.byte_budget}")
    for (layer, expert), ranks in problem.pinned.items():
        if sorted(np.flatnonzero(present_LRE[layer, :, expert]).tolist()) != sorted(ranks):
            raise ConfigError(f"placement: layer {layer}, expert {expert} would not be on {ranks}, where it is pinned")
