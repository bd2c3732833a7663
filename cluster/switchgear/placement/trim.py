"""A map made to fit smaller pools, for when ranks have joined: `trim`. Pure.

A pool is sized for the number of ranks, so that with more of them each has fewer slots, while the ranks that stay still
hold all the replicas of before.

Letters: L MoE layers, R ranks, E logical experts.
"""

from __future__ import annotations

import numpy as np

from switchgear.placement.plan import Bool, arrange, presence
from switchgear_runtime.moe.expert_map import ExpertMap


def trim(expert_map: ExpertMap, columns: int, pool_slots: int) -> ExpertMap:
    """At most `columns` experts of a layer and `pool_slots` over all layers on any rank, if all ranks together have that
    room: replicas go, and what is nobody else's moves to where there is room. The epoch stays.

    Example, pools of 1: [[0, 1 | 1, -1]] becomes [[0, -1 | 1, -1]].
    """
    present_LRE = presence(expert_map)
    for layer in range(expert_map.num_layers):
        _shrink(present_LRE[layer : layer + 1], columns, columns)
    _shrink(present_LRE, columns, pool_slots)
    if np.array_equal(present_LRE, presence(expert_map)):
        return expert_map
    width = max(expert_map.slots_per_rank, int(present_LRE.sum(axis=2).max()))
    return arrange(present_LRE, expert_map, width).with_epoch(expert_map.epoch)


def _shrink(present_LRE: Bool, columns: int, room: int) -> None:
    """In place, until no rank holds more than `room` of these layers. The fullest goes first."""
    for rank in np.argsort(-present_LRE.sum(axis=(0, 2)), kind="stable").tolist():
        excess = int(present_LRE[:, rank].sum()) - room
        if excess <= 0:
            continue
        # First the replicas that another rank need not give up as well, then those of which there are most.
        has_room_R = present_LRE.sum(axis=(0, 2)) <= room
        safe_LE = (present_LRE & has_room_R[:, None]).sum(axis=1)
        copies_LE = present_LRE.sum(axis=1)
        layers, experts = np.nonzero(present_LRE[:, rank] & (copies_LE > 1))
        order = np.lexsort((-copies_LE[layers, experts], safe_LE[layers, experts] == 0))[:excess]
        present_LRE[layers[order], rank, experts[order]] = False
    for rank in range(present_LRE.shape[1]):
        for layer, expert in np.argwhere(present_LRE[:, rank])[::-1].tolist():
            if present_LRE[:, rank].sum() <= room:
                break
            held_R = present_LRE.sum(axis=(0, 2))
            free_R = (held_R < room) & (present_LRE[layer].sum(axis=1) < columns) & ~present_LRE[layer, :, expert]
            if free_R.any():
                present_LRE[layer, rank, expert] = False
                present_LRE[layer, int(np.where(free_R, held_R, held_R.max() + 1).argmin()), expert] = True
