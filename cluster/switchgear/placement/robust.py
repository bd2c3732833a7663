"""The policy for hostile traffic: a layout of replicas that no choice of experts hits hard, whatever the history.

History cannot help against traffic that moves faster than its window; a layout can (hall.py). Experts are edges
between the ranks that hold their two replicas, and the worst is many edges on few ranks. So no two experts share both
ranks while other pairs are left, and pairs join two halves of the ranks, for bipartite graphs have fewer dense spots.
Slots beyond two for each expert go to the hottest; with fewer, the hottest have two, and the others are spread.
Load decides among equals. A layer whose layout is as good already stays as it is.

This needs tens of milliseconds a layer where ranks are many; it is meant to be planned once, and when the number of ranks changes.

Letters: L MoE layers, E logical experts, R ranks.
"""

from __future__ import annotations

import numpy as np

from switchgear.placement.eplb_reference import replicate_experts
from switchgear.placement.forecast import Float64, forecast
from switchgear.placement.hall import hall_density
from switchgear.placement.limits import affordable, pinned, start_presence
from switchgear.placement.outcome import planned
from switchgear.placement.plan import Bool, PlacementPlan
from switchgear.placement.problem import Int64, PlacementProblem, checked_windows
from switchgear.placement.score import balanced_split, rank_rows
from switchgear_runtime.moe.expert_map import ExpertMap

UNEVEN_MAX = 1.25  # of the foretold load, before a layout is made anew for that
SHARED_PAIR = 1e3  # in mean rank loads: more than any load


class Robust:
    """`top_k`: experts of a token, for which the worst case is judged."""

    name = "robust"

    def __init__(self, top_k: int = 8) -> None:
        self.top_k = top_k

    def plan(self, windows_WLE: Int64, current: ExpertMap, problem: PlacementProblem) -> PlacementPlan:
        windows = checked_windows(windows_WLE, current)
        problem.check(current)
        start_LRE = start_presence(current, problem)
        load_LE = forecast(windows)
        rows_LR = rank_rows(balanced_split(load_LE, current), current.num_ranks)
        wanted_LRE = start_LRE.copy()
        density_L = np.zeros(current.num_layers)
        for layer in range(current.num_layers):
            laid_out_RE = lay_out(load_LE[layer], _num_held(current, problem), problem)
            density_L[layer] = hall_density(start_LRE[layer], self.top_k)
            uneven = rows_LR[layer].max() > UNEVEN_MAX * rows_LR[layer].mean()
            if uneven or hall_density(laid_out_RE, self.top_k) < density_L[layer]:
                wanted_LRE[layer] = laid_out_RE
        order = np.argsort(-density_L, kind="stable").tolist()
        present_LRE = affordable(pinned(wanted_LRE, problem), start_LRE, current, problem, order)
        return planned(self.name, present_LRE, current, load_LE, problem)


def _num_held(current: ExpertMap, problem: PlacementProblem) -> int:
    """Experts that a layer holds, replicas too."""
    num_ranks, num_experts = problem.topology.num_ranks, current.num_experts
    held = num_ranks * min(problem.slots_per_rank, num_experts)
    if problem.pool_slots is not None:
        held = min(held, num_ranks * (problem.pool_slots // current.num_layers))
    if problem.replica_budget_per_layer is not None:
        held = min(held, num_experts + problem.replica_budget_per_layer)
    return max(held, num_experts)


def lay_out(load_E: Float64, num_held: int, problem: PlacementProblem) -> Bool:
    """[R, E] of one layer, from nothing."""
    num_ranks, num_experts = problem.topology.num_ranks, len(load_E)
    mean = float(load_E.mean()) or 1.0
    loads_E = load_E + mean  # half of it is what anybody may send anywhere
    copies_E: Int64 = np.ones(num_experts, np.int64)
    twice = min(num_held - num_experts, num_experts) if num_ranks > 1 else 0
    copies_E[np.argsort(-loads_E, kind="stable")[:twice]] = 2
    rest = num_held - int(copies_E.sum())
    if rest > 0:
        weights = [np.float32(load / 2) for load in loads_E.tolist()]
        more_E = np.array(replicate_experts(weights, num_experts + rest)[1], np.int64) - 1
        copies_E = np.asarray(copies_E + np.minimum(more_E, num_ranks - 2), np.int64)
    layout = _Layout(problem, float(loads_E.sum()) / num_ranks)
    for expert in np.argsort(-copies_E * np.max(loads_E) * 2 - loads_E, kind="stable").tolist():
        layout.place(expert, int(copies_E[expert]), float(loads_E[expert]), num_experts)
    return layout.presence(num_experts)


class _Layout:
    def __init__(self, problem: PlacementProblem, mean_level: float) -> None:
        num_ranks = problem.topology.num_ranks
        self._free_R = np.full(num_ranks, problem.slots_per_rank)
        self._level_R = np.zeros(num_ranks)
        self._alone_R = np.zeros(num_ranks)
        self._shared_RR = np.zeros((num_ranks, num_ranks))
        self._ranks: dict[int, list[int]] = {}
        self._penalty = SHARED_PAIR * mean_level
        # Two halves of hosts, where there are: the replicas of an expert then lie on two hosts.
        parts = problem.topology.host_of_rank_R.tolist() if problem.topology.num_hosts % 2 == 0 else range(num_ranks)
        half_R = np.array([part % 2 for part in parts])
        self._same_half_RR = np.equal.outer(half_R, half_R) * self._penalty / 2 + np.diag(np.full(num_ranks, np.inf))

    def place(self, expert: int, copies: int, load: float, num_experts: int) -> None:
        full_R = np.where(self._free_R > 0, 0.0, np.inf)
        reserved = num_experts - len(self._ranks) - 1  # a slot for each expert still to come
        copies = max(1, min(copies, int(self._free_R.sum()) - reserved, int((self._free_R > 0).sum())))
        if copies == 1:
            ranks = [int((full_R + self._alone_R * self._penalty + self._level_R).argmin())]
            self._alone_R[ranks[0]] += 1
        else:
            cost_R = full_R + self._level_R
            cost_RR = cost_R + cost_R[:, None] + self._shared_RR * self._penalty + self._same_half_RR
            ranks = list(divmod(int(cost_RR.argmin()), len(full_R)))
            while len(ranks) < copies:
                cost_R = full_R + self._level_R + self._shared_RR[ranks].sum(axis=0) * self._penalty
                cost_R[ranks] = np.inf
                ranks.append(int(cost_R.argmin()))
        for rank in ranks:
            self._free_R[rank] -= 1
            self._level_R[rank] += load / len(ranks)
            self._shared_RR[rank, [other for other in ranks if other != rank]] += 1
        self._ranks[expert] = ranks

    def presence(self, num_experts: int) -> Bool:
        present_RE = np.zeros((len(self._free_R), num_experts), np.bool_)
        for expert, ranks in self._ranks.items():
            present_RE[ranks, expert] = True
        return present_RE
