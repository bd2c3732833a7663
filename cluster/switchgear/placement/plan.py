"""What a policy answers: `PlacementPlan`, with the moves that make its map true.

Letters: L MoE layers, E logical experts, R ranks, S slots per rank, M moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from switchgear.placement.topology import Topology
from switchgear_runtime.moe.expert_map import EMPTY, ExpertMap

Bool = NDArray[np.bool_]


class Move(NamedTuple):
    """An expert that `slot`'s rank must get. `source_rank` holds it now; None: nobody in this generation does."""

    layer: int
    expert: int
    slot: int  # global, of the new map
    source_rank: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementPlan:
    """`expert_map` has the current epoch plus one if it differs from the current map, else it is the current map."""

    expert_map: ExpertMap
    moves: tuple[Move, ...]
    moved_bytes: int
    predicted_before_s: float  # a step, on the load that the policy plans for
    predicted_after_s: float
    reason: str  # why this plan, or why none: one line for logs and the admin API


def presence(expert_map: ExpertMap) -> Bool:
    """[L, R, E]: whether rank r holds expert e."""
    num_layers, num_ranks = expert_map.num_layers, expert_map.num_ranks
    held_LRS = expert_map.physical_to_logical_LP.reshape(num_layers, num_ranks, -1)
    present = np.zeros((num_layers, num_ranks, expert_map.num_experts + 1), np.bool_)  # the last column is for EMPTY
    layers, ranks = np.ogrid[:num_layers, :num_ranks]
    present[layers[..., None], ranks[..., None], held_LRS] = True
    return present[:, :, :-1]


def arrange(present_LRE: Bool, current: ExpertMap, slots_per_rank: int) -> ExpertMap:
    """The map that holds just these experts. Those that stay on their rank keep their slot, if the map still has it."""
    num_layers, num_ranks, num_experts = present_LRE.shape
    physical_LRS = np.full((num_layers, num_ranks, slots_per_rank), EMPTY, np.int32)
    new_LRE = present_LRE.copy()
    if current.num_ranks == num_ranks:
        kept = min(slots_per_rank, current.slots_per_rank)
        old_LRS = current.physical_to_logical_LP.reshape(num_layers, num_ranks, -1)[:, :, :kept]
        layers, ranks = np.ogrid[:num_layers, :num_ranks]
        stays = (old_LRS != EMPTY) & present_LRE[layers[..., None], ranks[..., None], old_LRS]
        physical_LRS[:, :, :kept] = np.where(stays, old_LRS, EMPTY)
        layer, rank, slot = np.nonzero(stays)
        new_LRE[layer, rank, old_LRS[layer, rank, slot]] = False
    layer, rank, expert = np.nonzero(new_LRE)
    if layer.size:
        group = layer * num_ranks + rank  # ascending; the k-th new expert of a group takes its k-th free slot
        index = np.arange(group.size) - np.searchsorted(group, group)
        free_first_LRS = np.argsort(physical_LRS != EMPTY, axis=2, kind="stable")
        physical_LRS[layer, rank, free_first_LRS[layer, rank, index]] = expert
    expert_map = ExpertMap(
        epoch=current.epoch + 1,
        num_ranks=num_ranks,
        num_experts=num_experts,
        physical_to_logical_LP=physical_LRS.reshape(num_layers, -1),
    )
    expert_map.physical_to_logical_LP.flags.writeable = False
    expert_map.validate()
    if current.num_ranks == num_ranks and np.array_equal(
        expert_map.physical_to_logical_LP, current.physical_to_logical_LP
    ):
        return current
    return expert_map


def moves_between(current: ExpertMap, new: ExpertMap, topology: Topology) -> tuple[Move, ...]:
    """What each rank must get; of those that hold it, the next rank of the same host is the source, else the next."""
    if new is current:
        return ()
    held_LRS = new.physical_to_logical_LP.reshape(new.num_layers, new.num_ranks, -1)
    had_LRE = presence(current) if current.num_ranks == new.num_ranks else np.zeros_like(presence(new))
    layers, ranks = np.ogrid[: new.num_layers, : new.num_ranks]
    is_new_LRS = (held_LRS != EMPTY) & ~had_LRE[layers[..., None], ranks[..., None], held_LRS]
    layer_M, rank_M, slot_M = np.nonzero(is_new_LRS)
    expert_M = held_LRS[layer_M, rank_M, slot_M]
    hosts_R, ranks_R = topology.host_of_rank_R, np.arange(new.num_ranks)
    farness_RR = (ranks_R - ranks_R[:, None]) % new.num_ranks + (hosts_R != hosts_R[:, None]) * new.num_ranks
    farness_MR = np.where(had_LRE[layer_M, :, expert_M], farness_RR[rank_M], 2 * new.num_ranks)
    source_M = farness_MR.argmin(axis=1)
    nobody_M = farness_MR.min(axis=1, initial=2 * new.num_ranks) == 2 * new.num_ranks
    slots = (rank_M * new.slots_per_rank + slot_M).tolist()
    sources = [None if nobody else source for nobody, source in zip(nobody_M.tolist(), source_M.tolist(), strict=True)]
    return tuple(map(Move, layer_M.tolist(), expert_M.tolist(), slots, sources))
