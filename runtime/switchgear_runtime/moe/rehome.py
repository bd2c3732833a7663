"""A map for another set of ranks that moves as little as can be: `rehome`. Pure, imports no torch.

Ranks that stay keep what they hold, and lost experts alone find new places, so that after a death the next generation
loads those and nothing else. A rank that joins takes a fair part of each layer from the fullest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from switchgear_runtime.moe.expert_map import EMPTY, ExpertMap, Int32


def rehome(expert_map: ExpertMap, origins: Sequence[int | None], *, epoch: int) -> ExpertMap:
    """`origins[new rank]`: its rank in `expert_map`, or None for a rank that has just joined.

    Example, rank 1 of 2 leaves [[0, 1, 2, 3]]: rehome(map, [0], epoch=1) is [[0, 1, 2, 3]] with 4 slots on rank 0.
    """
    old_LRS = expert_map.physical_to_logical_LP.reshape(expert_map.num_layers, expert_map.num_ranks, -1)
    slots_per_rank = max(expert_map.slots_per_rank, -(-expert_map.num_experts // len(origins)))
    new_LRS = np.full((expert_map.num_layers, len(origins), expert_map.num_experts), EMPTY, np.int32)
    for rank, origin in enumerate(origins):
        if origin is not None:
            new_LRS[:, rank, : expert_map.slots_per_rank] = old_LRS[:, origin]
    for row_RS in new_LRS:
        _place_lost(row_RS, expert_map.num_experts)
        for rank, origin in enumerate(origins):
            if origin is None:
                _fill(row_RS, rank, expert_map.num_experts // len(origins))
    used = int((new_LRS != EMPTY).any(axis=(0, 1)).nonzero()[0].max(initial=0)) + 1
    width = max(min(slots_per_rank, expert_map.num_experts), used)
    physical_LP = new_LRS[:, :, :width].reshape(expert_map.num_layers, -1)
    return ExpertMap.of(physical_LP, num_ranks=len(origins), num_experts=expert_map.num_experts, epoch=epoch)


def resized(expert_map: ExpertMap, num_ranks: int) -> ExpertMap:
    """The same for more or fewer ranks, who keep their numbers."""
    if expert_map.num_ranks == num_ranks:
        return expert_map
    stay = [rank if rank < expert_map.num_ranks else None for rank in range(num_ranks)]
    return rehome(expert_map, stay, epoch=expert_map.epoch)


def _place_lost(row_RS: Int32, num_experts: int) -> None:
    """Each expert that nobody holds goes to the rank that holds fewest."""
    for expert in np.setdiff1d(np.arange(num_experts), row_RS).tolist():
        rank = int((row_RS != EMPTY).sum(axis=1).argmin())
        row_RS[rank, _free_slot(row_RS, rank)] = expert


def _fill(row_RS: Int32, rank: int, num_wanted: int) -> None:
    """Move experts to `rank` from those that hold most, until it has its part."""
    while (row_RS[rank] != EMPTY).sum() < num_wanted:
        held_R = (row_RS != EMPTY).sum(axis=1)
        held_R[rank] = -1
        for giver in np.argsort(-held_R, kind="stable").tolist():
            (slots,) = np.nonzero((row_RS[giver] != EMPTY) & ~np.isin(row_RS[giver], row_RS[rank]))
            if giver != rank and len(slots):
                slot = int(slots[-1])
                row_RS[rank, _free_slot(row_RS, rank)] = row_RS[giver, slot]
                row_RS[giver, slot] = EMPTY
                break
        else:
            return  # it holds every expert that the others hold


def _free_slot(row_RS: Int32, rank: int) -> int:
    return int(np.nonzero(row_RS[rank] == EMPTY)[0][0])
