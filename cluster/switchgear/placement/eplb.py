"""DeepSeek's EPLB as a policy: the baseline, planned anew from the last window's counts.

The placement is exactly theirs (eplb_reference.py), with what our maps ask for: where EPLB puts two replicas of an
expert onto one rank, the rank keeps one and the other slot stays empty; and experts that are on their rank already
keep their slot, as vLLM and SGLang do it. Ranks play GPUs, hosts play nodes; the hierarchical algorithm runs where
groups of experts divide by hosts. Where a budget or a pool does not allow all layers, those that gain most go first.

Letters: L MoE layers, E logical experts, R ranks.
"""

from __future__ import annotations

import numpy as np

from switchgear.placement.limits import pinned, pool_room, start_presence
from switchgear.placement.outcome import planned
from switchgear.placement.plan import Bool, PlacementPlan, presence
from switchgear.placement.problem import Int64, PlacementProblem, checked_windows
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.placement import planner


def eplb_presence(load_LE: Int64, problem: PlacementProblem, num_groups: int = 1) -> Bool:
    """[L, R, E], with as many replicas as slots, pool and replica budget allow on all ranks alike."""
    num_layers, num_experts = load_LE.shape
    num_ranks = problem.topology.num_ranks
    slots = problem.slots_per_rank
    if problem.pool_slots is not None:
        slots = min(slots, problem.pool_slots // num_layers)
    if problem.replica_budget_per_layer is not None:
        slots = min(slots, (num_experts + problem.replica_budget_per_layer) // num_ranks)
    slots = max(slots, -(-num_experts // num_ranks))
    hosts_R = problem.topology.host_of_rank_R
    num_hosts = problem.topology.num_hosts
    even = num_ranks % num_hosts == 0 and (np.diff(hosts_R) >= 0).all() and len(set(np.bincount(hosts_R))) == 1
    if not even or num_experts % num_groups or num_groups % num_hosts:
        num_hosts = num_groups = 1
    physical_LP = planner.eplb(load_LE, num_ranks * slots, num_groups, num_hosts, num_ranks)
    present_LRE = np.zeros((num_layers, num_ranks, num_experts), np.bool_)
    layers, ranks = np.ogrid[:num_layers, :num_ranks]
    present_LRE[layers[..., None], ranks[..., None], physical_LP.reshape(num_layers, num_ranks, slots)] = True
    extra_max = problem.replica_budget_per_layer
    if extra_max is not None and num_ranks * slots - num_experts > extra_max:  # experts do not divide by ranks
        for present_RE in present_LRE:
            _drop_replicas(present_RE, num_experts + extra_max)
    return present_LRE


def _drop_replicas(present_RE: Bool, held_max: int) -> None:
    while present_RE.sum() > held_max:
        spare_RE = present_RE & (present_RE.sum(axis=0) > 1)
        rank, expert = divmod(int(spare_RE.argmax()), present_RE.shape[1])
        present_RE[rank, expert] = False


class Eplb:
    """`num_groups`: the model's expert groups (DeepSeek's group-limited routing); 1 for models without."""

    name = "eplb"

    def __init__(self, num_groups: int = 1) -> None:
        self.num_groups = num_groups

    def plan(self, windows_WLE: Int64, current: ExpertMap, problem: PlacementProblem) -> PlacementPlan:
        load_LE = checked_windows(windows_WLE, current)[-1]
        problem.check(current)
        start_LRE = start_presence(current, problem)
        had_LRE = presence(current)
        wanted_LRE = pinned(eplb_presence(load_LE, problem, self.num_groups), problem)
        return planned(
            self.name,
            self._affordable(wanted_LRE, start_LRE, had_LRE, load_LE, current, problem),
            current,
            load_LE.astype(np.float64),
            problem,
        )

    def _affordable(
        self,
        wanted_LRE: Bool,
        start_LRE: Bool,
        had_LRE: Bool,
        load_LE: Int64,
        current: ExpertMap,
        problem: PlacementProblem,
    ) -> Bool:
        """Layers one after the other, the worst balanced first, while budget and pools last; others as they are."""
        room_R = pool_room(current, problem)
        moves_max = planner.UNLIMITED
        if problem.byte_budget is not None:
            moves_max = problem.byte_budget // problem.cost.expert_bytes
        if room_R is None and moves_max == planner.UNLIMITED:
            return wanted_LRE
        num_moves_L = (wanted_LRE & ~had_LRE).sum(axis=(1, 2))
        start_moves_L = (start_LRE & ~had_LRE).sum(axis=(1, 2))
        rows_LR = (start_LRE * (load_LE / start_LRE.sum(axis=1))[:, None, :]).sum(axis=2)
        order = np.argsort(-(rows_LR.max(axis=1) - rows_LR.mean(axis=1)), kind="stable")
        chosen_LRE, moves = start_LRE.copy(), int(start_moves_L.sum())
        used_R = (start_LRE & ~had_LRE).sum(axis=(0, 2))
        for layer in order.tolist():
            more = int(num_moves_L[layer] - start_moves_L[layer])
            need_R = (wanted_LRE[layer] & ~had_LRE[layer]).sum(axis=1) - (start_LRE[layer] & ~had_LRE[layer]).sum(
                axis=1
            )
            if moves + more <= moves_max and (room_R is None or (used_R + need_R <= room_R).all()):
                chosen_LRE[layer] = wanted_LRE[layer]
                moves, used_R = moves + more, used_R + need_R
        return chosen_LRE
