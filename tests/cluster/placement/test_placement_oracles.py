"""The planner against independent solvers: LP and subset enumeration for a fixed placement, MILP for joint ones.

Gaps are printed (`pytest -s`). SciPy's HiGHS is the solver.
"""

from __future__ import annotations

import os
from itertools import combinations

import numpy as np
import pytest

from switchgear.placement.choice import choose
from switchgear.placement.eplb_reference import rebalance
from switchgear.placement.hall import hall_density
from switchgear.placement.plan import presence
from switchgear.placement.policy import POLICIES, CostModel, PlacementProblem, Topology
from switchgear.placement.robust import lay_out
from switchgear.placement.score import balanced_split, equal_split, rank_rows
from switchgear_runtime.moe.expert_map import EMPTY, ExpertMap

optimize = pytest.importorskip("scipy.optimize", reason="the oracles need SciPy (pip install switchgear[dev])")

ROWS_ONLY = CostModel(expert_bytes=1, row_flops=1e9, memory_bytes_per_s=1e15)  # weights cost nothing: max load counts


def fresh_rng() -> tuple[int, np.random.Generator]:
    seed = int.from_bytes(os.urandom(4), "little")
    return seed, np.random.default_rng(seed)


def best_split_lp(load_E: np.ndarray, present_RE: np.ndarray) -> float:
    """The least maximum of a rank's rows where replicas may share in any way, by linear programming."""
    pairs = np.argwhere(present_RE)
    num_ranks, num_experts = present_RE.shape
    cost = np.zeros(len(pairs) + 1)
    cost[-1] = 1.0
    upper = np.zeros((num_ranks, len(pairs) + 1))
    upper[pairs[:, 0], np.arange(len(pairs))] = 1.0
    upper[:, -1] = -1.0
    equal = np.zeros((num_experts, len(pairs) + 1))
    equal[pairs[:, 1], np.arange(len(pairs))] = 1.0
    result = optimize.linprog(cost, A_ub=upper, b_ub=np.zeros(num_ranks), A_eq=equal, b_eq=load_E)
    assert result.status == 0
    return float(result.fun)


def best_split_by_subsets(load_E: np.ndarray, present_RE: np.ndarray) -> float:
    """The same by its dual: the densest set of ranks."""
    num_ranks = len(present_RE)
    best = 0.0
    for size in range(1, num_ranks + 1):
        for ranks in combinations(range(num_ranks), size):
            outside = [rank for rank in range(num_ranks) if rank not in ranks]
            best = max(best, load_E[~present_RE[outside].any(axis=0)].sum() / size)
    return best


def best_placement_milp(load_E: np.ndarray, num_ranks: int, slots: int) -> float:
    """The least maximum over all placements and splits: who holds what (0 or 1), and how much of it."""
    num_experts = len(load_E)
    num_pairs = num_experts * num_ranks  # variables: held [E, R], rows [E, R], maximum
    size = 2 * num_pairs + 1
    rows: list[np.ndarray] = []
    lower, upper = [], []

    def constrain(row: np.ndarray, low: float, high: float) -> None:
        rows.append(row)
        lower.append(low)
        upper.append(high)

    for expert in range(num_experts):
        total = np.zeros(size)
        total[num_pairs + expert * num_ranks : num_pairs + (expert + 1) * num_ranks] = 1.0
        constrain(total, load_E[expert], load_E[expert])
        exists = np.zeros(size)
        exists[expert * num_ranks : (expert + 1) * num_ranks] = 1.0
        constrain(exists, 1.0, np.inf)
        for rank in range(num_ranks):
            only_held = np.zeros(size)
            only_held[num_pairs + expert * num_ranks + rank] = 1.0
            only_held[expert * num_ranks + rank] = -load_E[expert]
            constrain(only_held, -np.inf, 0.0)
    for rank in range(num_ranks):
        places, maximum = np.zeros(size), np.zeros(size)
        places[rank:num_pairs:num_ranks] = 1.0
        constrain(places, 0.0, slots)
        maximum[num_pairs + rank : 2 * num_pairs : num_ranks] = 1.0
        maximum[-1] = -1.0
        constrain(maximum, -np.inf, 0.0)
    cost = np.zeros(size)
    cost[-1] = 1.0
    result = optimize.milp(
        cost,
        constraints=optimize.LinearConstraint(np.array(rows), lower, upper),
        integrality=np.r_[np.ones(num_pairs), np.zeros(num_pairs + 1)],
        bounds=optimize.Bounds(0, np.r_[np.ones(num_pairs), np.full(num_pairs + 1, np.inf)]),
        options={"time_limit": 20},
    )
    assert result.status == 0, result.message
    return float(result.fun)


def test_balanced_split_is_the_optimum_of_the_placement() -> None:
    seed, rng = fresh_rng()
    worst = 0.0
    for run in range(150):
        ranks, experts = int(rng.integers(2, 7)), int(rng.integers(2, 20))
        expert_map = ExpertMap.random(rng, 1, experts, ranks, num_redundant=int(rng.integers(0, 12)))
        load_LE = rng.zipf(1.4, (1, experts)).clip(max=10**6) * rng.integers(0, 4, (1, experts))
        split_LP = balanced_split(load_LE, expert_map)
        got = float(rank_rows(split_LP, ranks).max())
        present_RE = presence(expert_map)[0]
        by_lp, by_subsets = best_split_lp(load_LE[0], present_RE), best_split_by_subsets(load_LE[0], present_RE)
        where = f"seed {seed}, run {run}"
        assert by_lp == pytest.approx(by_subsets, rel=1e-6, abs=1e-6), where
        assert got >= by_subsets * (1 - 1e-9), where
        assert got <= by_subsets * (1 + 1e-4) + 1e-6, where
        worst = max(worst, got / max(by_subsets, 1e-300) - 1)
    print(f"water-filling over the optimum, worst of 150: {worst:.2e}")


def legal_eplb(load_E: np.ndarray, ranks: int, slots: int) -> tuple[float, ExpertMap]:
    """(Its maximum with equal shares, as published; its placement with one of two replicas on a rank left out)."""
    physical = rebalance(load_E.tolist(), ranks * slots, 1, 1, ranks)
    counts_E = np.bincount(physical, minlength=len(load_E))
    equal = float((load_E / counts_E)[physical].reshape(ranks, slots).sum(axis=1).max())
    rows = np.array(physical, np.int32).reshape(ranks, slots)
    for row in rows:
        seen: set[int] = set()
        for slot, expert in enumerate(row.tolist()):
            row[slot] = EMPTY if expert in seen else expert
            seen.add(expert)
    expert_map = ExpertMap(
        epoch=0, num_ranks=ranks, num_experts=len(load_E), physical_to_logical_LP=rows.reshape(1, -1)
    )
    return equal, expert_map


def test_adaptive_without_budget_is_never_worse_than_eplb_on_its_window() -> None:
    """Against EPLB with equal shares, as it is published, and with its placement's optimal shares, which is harder."""
    seed, rng = fresh_rng()
    ratios = []
    hard = [np.array([19, 35, 17, 5, 2, 5, 116, 21143]), 8, 2]
    for run in range(400):
        ranks = int(rng.integers(2, 9))
        experts = int(rng.integers(ranks, 40))
        slots = -(-experts // ranks) + int(rng.integers(0, 3))
        load_E = np.ceil(rng.pareto(rng.choice([0.5, 1.0, 3.0]), experts) * 100).clip(max=1e9).astype(np.int64)
        if run == 0:
            load_E, ranks, slots = hard
            experts = len(load_E)
        current = ExpertMap.contiguous(1, experts, ranks)
        problem = PlacementProblem(topology=Topology.even(ranks), slots_per_rank=slots, cost=ROWS_ONLY)
        plan = POLICIES["adaptive"]().plan(load_E[None], current, problem)
        ours = best_split_by_subsets(load_E, presence(plan.expert_map)[0])
        equal, eplb_map = legal_eplb(load_E, ranks, slots)
        theirs = best_split_by_subsets(load_E, presence(eplb_map)[0])
        where = f"seed {seed}, run {run}"
        assert ours <= theirs * (1 + 1e-5), where
        assert ours <= equal * (1 + 1e-5), where
        ratios.append((ours / theirs, ours / equal))
    of_best, of_equal = np.array(ratios).T
    print(f"ours over EPLB, 400 instances: optimal shares mean {of_best.mean():.4f} least {of_best.min():.4f}; "
          f"equal shares mean {of_equal.mean():.4f} least {of_equal.min():.4f}")  # fmt: skip
    assert of_best.min() < 1


def test_gap_to_the_joint_optimum() -> None:
    seed, rng = fresh_rng()
    gaps = {"adaptive": [], "eplb": [], "incremental": []}
    for run in range(25):
        ranks, experts = int(rng.integers(2, 5)), int(rng.integers(4, 9))
        slots = -(-experts // ranks) + int(rng.integers(0, 2))
        load_E = np.ceil(rng.pareto(1.0, experts) * 100).clip(max=1e6).astype(np.int64)
        optimum = best_placement_milp(load_E, ranks, slots)
        current = ExpertMap.contiguous(1, experts, ranks)
        problem = PlacementProblem(topology=Topology.even(ranks), slots_per_rank=slots, cost=ROWS_ONLY)
        for name, found in gaps.items():
            expert_map = POLICIES[name]().plan(load_E[None], current, problem).expert_map
            value = best_split_by_subsets(load_E, presence(expert_map)[0])
            assert value >= optimum * (1 - 1e-6), f"seed {seed}, run {run}: {name} beats the optimum"
            found.append(value / optimum - 1)
    for name, found in gaps.items():
        print(f"{name} over the joint optimum, 25 instances: mean {np.mean(found):.2%}, worst {np.max(found):.2%}")
    assert np.mean(gaps["adaptive"]) < 0.05, f"seed {seed}: {gaps['adaptive']}"
    assert np.mean(gaps["adaptive"]) <= np.mean(gaps["eplb"]) + 1e-9, f"seed {seed}"


def test_choice_is_the_optimum_up_to_one_segment() -> None:
    """Against all combinations of points."""
    seed, rng = fresh_rng()
    for run in range(100):
        points_L = []
        for _ in range(3):
            moves = [0, *np.cumsum(rng.integers(1, 4, 3)).tolist()]
            points_L.append([(m, float(s)) for m, s in zip(moves, rng.random(4), strict=True)])
        budget = int(rng.integers(0, 15))
        chosen = choose(
            points_L, moves_max=budget, gain_per_move_s=0.0, room_R=None, needs=lambda *_: np.zeros(1, np.int64)
        )
        picked = [points[index] for points, index in zip(points_L, chosen, strict=True)]
        assert sum(moves for moves, _ in picked) <= budget, f"seed {seed}, run {run}"
        best = min(
            sum(points[index][1] for points, index in zip(points_L, indices, strict=True))
            for indices in np.ndindex(4, 4, 4)
            if sum(points[index][0] for points, index in zip(points_L, indices, strict=True)) <= budget
        )
        largest = max(points[0][1] - min(s for _, s in points) for points in points_L)
        assert sum(seconds for _, seconds in picked) <= best + largest + 1e-12, f"seed {seed}, run {run}"


def test_hall_density_is_exact_and_robust_layouts_have_less() -> None:
    """Against all sets of at most k experts."""
    seed, rng = fresh_rng()
    for run in range(40):
        ranks, experts, top_k = int(rng.integers(1, 6)), int(rng.integers(1, 9)), int(rng.integers(1, 4))
        present_RE = presence(ExpertMap.random(rng, 1, experts, ranks, num_redundant=int(rng.integers(0, 6))))[0]
        best = max(
            len(chosen) / present_RE[:, chosen].any(axis=1).sum()
            for size in range(1, min(top_k, experts) + 1)
            for chosen in combinations(range(experts), size)
        )
        assert hall_density(present_RE, top_k) == pytest.approx(best), f"seed {seed}, run {run}"
    for ranks, experts, slots, top_k in ((8, 32, 8, 4), (12, 64, 12, 8), (32, 256, 16, 8)):
        problem = PlacementProblem(topology=Topology.even(ranks), slots_per_rank=slots, cost=ROWS_ONLY)
        load_E = rng.multinomial(10**6, rng.dirichlet(np.ones(experts)))
        robust = hall_density(lay_out(load_E.astype(float), ranks * slots, problem), top_k)
        eplb = hall_density(presence(legal_eplb(load_E, ranks, slots)[1])[0], top_k)
        scale = ranks / top_k
        print(
            f"R={ranks} E={experts} k={top_k}: worst case over mean: robust {robust * scale:.2f}, EPLB {eplb * scale:.2f}"
        )
        assert robust < eplb, f"seed {seed}"
    # two replicas each: edges of the complete bipartite graph of 16 and 16 ranks, known to have 5.33
    assert robust * scale == pytest.approx(16 / 3)


def test_equal_split_is_what_it_says() -> None:
    expert_map = ExpertMap(
        epoch=0, num_ranks=2, num_experts=2, physical_to_logical_LP=np.array([[0, 1, 0, EMPTY]], np.int32)
    )
    assert equal_split(np.array([[10, 3]]), expert_map).tolist() == [[5.0, 3.0, 5.0, 0.0]]
    assert balanced_split(np.array([[10, 3]]), expert_map).tolist() == [[3.5, 3.0, 6.5, 0.0]]
