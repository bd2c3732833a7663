"""Quotas: legal on thousands of random instances, native equal to the reference, and against exact optima."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from numpy.typing import NDArray

from switchgear_runtime.moe.expert_map import EMPTY, ExpertMap
from switchgear_runtime.moe.native_quotas import NativeQuotas
from switchgear_runtime.moe.quotas import Balance, Instances, Planner

SEED = random.SystemRandom().randrange(1 << 32)
CHOICES = ("waterfill", "lp")


class Case:
    """A random map with replicas, and counts of every kind of skew."""

    def __init__(self, rng: np.random.Generator, *, num_ranks_max: int = 9) -> None:
        self.num_ranks = int(rng.integers(1, num_ranks_max))
        self.num_experts = int(rng.integers(1, 20))
        self.expert_map = ExpertMap.random(
            rng, 1, self.num_experts, self.num_ranks, num_redundant=int(rng.integers(0, 12))
        )
        skew = rng.choice([0.0, 0.5, 1.0, 3.0])
        shares = rng.lognormal(0.0, skew, (self.num_ranks, self.num_experts)) * rng.choice([0, 1, 10, 300])
        self.counts_RE: NDArray[np.int64] = rng.poisson(shares).astype(np.int64)
        if rng.random() < 0.3:
            self.counts_RE[:, rng.integers(self.num_experts)] += int(rng.integers(1, 1000))

    @property
    def held_RS(self) -> NDArray[np.int32]:
        return self.expert_map.physical_to_logical_LP[0].reshape(self.num_ranks, -1)

    def tokens(self, rng: np.random.Generator, source: int) -> NDArray[np.int32]:
        """A batch with these counts, one expert a token."""
        ids = np.repeat(np.arange(self.num_experts, dtype=np.int32), self.counts_RE[source])
        return rng.permutation(ids).reshape(-1, 1)


def draw_balance(rng: np.random.Generator) -> Balance:
    return Balance(
        choice=str(rng.choice(CHOICES)),
        lending=int(rng.choice([0, 1, 2, 5])),
        expert_rows=int(rng.choice([0, 1, 11, 200])),
        lent_expert_rows=[None, 0, 5, 11, 60, 2000][int(rng.integers(6))],
    )


def max_rows(state: Instances, num_ranks: int) -> int:
    rows_R = [0] * num_ranks
    for rank, rows in zip(state.ranks, state.rows, strict=True):
        rows_R[rank] += rows
    return max(rows_R)


def check_legal(case: Case, planner: Planner, plan: Instances | None) -> None:
    sent: dict[int, int] = {}
    for source in range(case.num_ranks):
        for expert, parts in enumerate(planner.quotas(case.counts_RE, plan, source)):
            assert sum(count for _, count in parts) == case.counts_RE[source, expert]
            for slot, count in parts:
                assert count > 0
                rank, local = divmod(slot, planner.stride)
                held = case.held_RS[rank]
                if local < planner.num_slots:
                    assert held[local] == expert
                else:
                    assert local - planner.num_slots == expert
                    assert expert not in held  # nobody borrows what it has
                sent[slot] = sent.get(slot, 0) + count
    if plan is None:
        return
    assert sent == {slot: rows for slot, rows in zip(plan.slots, plan.rows, strict=True) if rows}
    lent = plan.ranks[len(planner.empty.ranks) :]
    assert all(lent.count(rank) <= planner.balance.lending for rank in set(lent))
    costs_R = np.zeros(case.num_ranks, np.int64)
    balance, num_held = planner.balance, len(planner.empty.ranks)
    prices = [balance.expert_rows if i < num_held else balance.lent_price for i in range(len(plan.rows))]
    np.add.at(costs_R, plan.ranks, [rows + (rows > 0) * price for rows, price in zip(plan.rows, prices, strict=True)])
    assert costs_R.tolist() == plan.costs_R


def test_legal_and_native_is_the_reference_on_random_instances() -> None:
    rng = np.random.default_rng(SEED)
    for turn in range(1000):
        case, balance = Case(rng), draw_balance(rng)
        num_variants = int(rng.integers(3))
        planner = Planner(case.held_RS, case.num_experts, balance, num_variants=num_variants)
        plan = planner.plan(case.counts_RE)
        check_legal(case, planner, plan)
        fast = NativeQuotas(case.held_RS, case.num_experts, balance, num_variants=num_variants)
        assert fast.stride == planner.stride
        explained = fast.explain(case.counts_RE)
        where = f"seed {SEED}, turn {turn}, {balance}"
        if plan is None:
            assert explained.instances_I4 is None, where
        else:
            assert explained.instances_I4 is not None, where
            expected = list(zip(plan.experts, plan.ranks, plan.slots, plan.rows, strict=True))
            assert [tuple(row) for row in explained.instances_I4.tolist()] == expected, where
            assert explained.cost == plan.cost() < explained.static_cost, where
        source = int(rng.integers(case.num_ranks))
        topk_ids_TK = case.tokens(rng, source)
        fast.plan(case.counts_RE, source)
        slots = planner.choose(topk_ids_TK, planner.quotas(case.counts_RE, plan, source))
        assert np.array_equal(fast.choose(topk_ids_TK), slots), where


def exact_max_rows(case: Case) -> int:
    """The optimum for the placement, by its dual: over all sets of ranks, the rows that cannot leave them, by rank."""
    totals_E = case.counts_RE.sum(0)
    holders_E = [sum(1 << int(r) for r in np.flatnonzero((case.held_RS == e).any(1))) for e in range(case.num_experts)]
    best = 0
    for ranks in range(1, 1 << case.num_ranks):
        stuck = sum(int(n) for n, holders in zip(totals_E, holders_E, strict=True) if holders & ~ranks == 0)
        best = max(best, -(-stuck // ranks.bit_count()))
    return best


def test_lp_is_optimal_for_the_placement_and_waterfill_near() -> None:
    rng = np.random.default_rng(SEED)
    gaps = []
    for turn in range(200):
        case = Case(rng)
        optimum = exact_max_rows(case)
        found = {}
        for choice in CHOICES:
            plan = Planner(case.held_RS, case.num_experts, Balance(choice=choice)).plan(case.counts_RE)
            static = Planner(case.held_RS, case.num_experts, Balance(choice=choice))._static(case.counts_RE)
            found[choice] = max_rows(plan or static, case.num_ranks)
        assert found["lp"] == optimum, f"seed {SEED}, turn {turn}"
        assert found["waterfill"] >= optimum
        if optimum:
            gaps.append(found["waterfill"] / optimum)
    print(f"waterfill over the optimum, {len(gaps)} instances: mean {np.mean(gaps):.4f}, max {max(gaps):.3f}; lp: 1")


def test_waterfill_is_exact_for_one_replicated_expert() -> None:
    rng = np.random.default_rng(SEED)
    for turn in range(200):
        num_ranks, num_experts = int(rng.integers(2, 7)), int(rng.integers(2, 7))
        held_RS = np.full((num_ranks, num_experts), EMPTY, np.int32)
        for expert in range(1, num_experts):
            held_RS[rng.integers(num_ranks), expert] = expert
        held_RS[:, 0] = 0
        counts_RE = rng.integers(0, 50, (num_ranks, num_experts))
        planner = Planner(held_RS, num_experts, Balance(choice="waterfill"))
        water = planner._water(counts_RE.sum(0).tolist())
        alone_R = [int(counts_RE.sum(0)[held_RS[r][held_RS[r] > 0]].sum()) for r in range(num_ranks)]
        total = int(counts_RE.sum())
        assert max_rows(water, num_ranks) == max(*alone_R, -(-total // num_ranks)), f"seed {SEED}, turn {turn}"


def exact_with_lending(case: Case, lending: int, expert_rows: int, lent_expert_rows: int) -> int:
    """The smallest largest cost over ranks (or a bound below it), by mixed-integer programming."""
    optimize = pytest.importorskip("scipy.optimize", reason="SciPy is the oracle here")
    places = list(itertools.product(range(case.num_experts), range(case.num_ranks)))
    num = len(places)
    totals_E = case.counts_RE.sum(0)
    held = np.array([e in case.held_RS[r] for e, r in places])
    # Variables: rows of each place, whether it has any, the maximum.
    constraints = []
    for expert in range(case.num_experts):
        row = np.zeros(2 * num + 1)
        row[[p for p, (e, _) in enumerate(places) if e == expert]] = 1
        constraints.append((row, totals_E[expert], totals_E[expert]))
    for p, (expert, _) in enumerate(places):
        row = np.zeros(2 * num + 1)
        row[p], row[num + p] = 1, -max(1, int(totals_E[expert]))
        constraints.append((row, -np.inf, 0))
    for rank in range(case.num_ranks):
        own = [p for p, (_, r) in enumerate(places) if r == rank]
        row = np.zeros(2 * num + 1)
        row[own], row[-1] = 1, -1
        row[[num + p for p in own]] = [expert_rows if held[p] else lent_expert_rows for p in own]
        constraints.append((row, -np.inf, 0))
        row = np.zeros(2 * num + 1)
        row[[num + p for p in own if not held[p]]] = 1
        constraints.append((row, 0, lending))
    matrix = np.array([c[0] for c in constraints])
    solution = optimize.milp(
        np.eye(2 * num + 1)[-1],
        constraints=optimize.LinearConstraint(matrix, [c[1] for c in constraints], [c[2] for c in constraints]),
        integrality=np.ones(2 * num + 1),
        bounds=optimize.Bounds(0, np.concatenate([np.full(num, np.inf), np.ones(num), [np.inf]])),
        options={"time_limit": 2.0},
    )
    assert solution.mip_dual_bound is not None, solution.message
    return math.ceil(solution.mip_dual_bound - 1e-6)  # the optimum, or a bound where time ran out


def test_lending_against_the_exact_optimum() -> None:
    rng = np.random.default_rng(SEED)
    gaps = []
    while len(gaps) < 20:
        case = Case(rng, num_ranks_max=5)
        if case.num_ranks == 1 or case.num_experts > 6 or not case.counts_RE.any():
            continue
        for expert_rows, lent_expert_rows in ((0, 0), (11, 11), (11, 60)):
            balance = Balance(choice="lp", lending=2, expert_rows=expert_rows, lent_expert_rows=lent_expert_rows)
            planner = Planner(case.held_RS, case.num_experts, balance)
            plan = planner.plan(case.counts_RE) or planner._static(case.counts_RE)
            optimum = exact_with_lending(case, 2, expert_rows, lent_expert_rows)
            assert plan.cost() >= optimum, f"seed {SEED}"
            gaps.append(plan.cost() / optimum)
    print(f"lp with lending over the optimum, {len(gaps)} instances: mean {np.mean(gaps):.4f}, max {max(gaps):.3f}")


def test_the_static_slots_are_those_of_the_map() -> None:
    rng = np.random.default_rng(SEED)
    for _ in range(50):
        case = Case(rng)
        planner = Planner(case.held_RS, case.num_experts, Balance(choice="static"))
        for source in range(case.num_ranks):
            table_E = case.expert_map.slot_table(0, source)
            assert [planner.static_slot(source, e) for e in range(case.num_experts)] == table_E.tolist(), f"seed {SEED}"


def test_hash_spreads_a_hot_expert_over_its_replicas() -> None:
    held_RS = np.array([[0, 1], [0, 2], [0, 3]], np.int32)
    fast, planner = (kind(held_RS, 4, Balance(choice="hash")) for kind in (NativeQuotas, Planner))
    topk_ids_TK = np.array([[0, 1 + t % 3] for t in range(300)], np.int32)
    slots_TK = fast.choose(topk_ids_TK)
    expected = [[planner.hash_slot(t, int(e)) for e in ids] for t, ids in enumerate(topk_ids_TK)]
    assert slots_TK.tolist() == expected
    assert all(60 < count < 140 for count in np.bincount(slots_TK[:, 0] // 2))


def test_a_hot_set_on_one_rank_is_lent_out() -> None:
    """Half the traffic goes to eight experts of one rank; two borrowed experts a rank level it."""
    num_ranks, num_experts = 32, 256
    rng = np.random.default_rng(SEED)
    shares_E = np.full(num_experts, 0.5 / num_experts)
    shares_E[:8] += 0.5 / 8
    counts_RE = rng.multinomial(4096, shares_E / shares_E.sum(), num_ranks)
    held_RS = np.arange(num_experts, dtype=np.int32).reshape(num_ranks, -1)
    fast = NativeQuotas(held_RS, num_experts, Balance(choice="lp", lending=2, expert_rows=11))
    plan = fast.explain(counts_RE)
    assert plan.instances_I4 is not None
    rows_R = np.bincount(plan.instances_I4[:, 1], weights=plan.instances_I4[:, 3], minlength=num_ranks)
    assert plan.static_cost > 15 * rows_R.mean()
    assert rows_R.max() <= 1.03 * rows_R.mean(), f"seed {SEED}"


@pytest.mark.parametrize(("lent_expert_rows", "is_lent"), [(None, True), (80, True), (700, False)])
def test_a_lent_expert_is_worth_its_read(lent_expert_rows: int | None, is_lent: bool) -> None:
    """Two experts of one rank, 300 rows each; the other rank has nothing to do."""
    held_RS = np.array([[0, 1], [2, EMPTY]], np.int32)
    balance = Balance(choice="lp", lending=2, expert_rows=10, lent_expert_rows=lent_expert_rows)
    plan = NativeQuotas(held_RS, 3, balance).explain(np.array([[300, 300, 0], [0, 0, 0]], np.int64))
    assert plan.static_cost == 620
    assert (plan.instances_I4 is not None) == is_lent
    if lent_expert_rows == 80:
        assert plan.cost in range(350, 361)  # 600 rows and two or three reads over two ranks


def test_an_expert_without_a_slot_is_refused() -> None:
    with pytest.raises(ValueError, match="expert 1 has no slot"):
        NativeQuotas(np.array([[0], [2]], np.int32), 3, Balance())
