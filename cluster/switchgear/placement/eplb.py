"""DeepSeek's EPLB as a policy: the baseline, planned anew from the last window's counts.

The placement is exactly theirs (eplb_reference.py), with what our maps ask for: where EPLB puts two replicas of an
expert onto one rank, the rank keeps one and the other slot stays empty; and experts that are on their rank already
keep their slot, as vLLM and SGLang do it. Ranks play GPUs, hosts play nodes; the hierarchical algorithm runs where
groups of experts divide by hosts. Where a budget or a pool does not allow all layers, those that gain most go first.

Letters: L MoE layers, E logical experts, R ranks.
"""

from __future__ import annotations

import numpy as np

from switchgear.placement.limits import affordable, pinned, start_presence
from switchgear.placement.outcome import planned
from switchgear.placement.plan import Bool, PlacementPlan
from switchgear.placement.problem import Int64, PlacementProblem, checked_windows
from switchgear.placement.score import balanced_split, rank_rows
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
        wanted_LRE = pinned(eplb_presence(load_LE, problem, self.num_groups), problem)
        rows_LR = rank_rows(balanced_split(load_LE, current), current.num_ranks)
        worst_first = np.argsort(rows_LR.mean(axis=1) - rows_LR.max(axis=1), kind="stable")
        present_LRE = affordable(wanted_LRE, start_presence(current, problem), current, problem, worst_first.tolist())
        return planned(self.name, present_LRE, current, load_LE.astype(np.float64), problem)
