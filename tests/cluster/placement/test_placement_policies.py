"""Every policy's plans are legal on thousands of random instances; policies are pure; pins, pools and budgets hold."""

from __future__ import annotations

import os

import numpy as np
import pytest

from switchgear.placement.policy import POLICIES, CostModel, PlacementPlan, PlacementProblem, Topology
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.moe.expert_map import EMPTY, ExpertMap

RUNS = 450  # for each of five policies


def random_instance(rng: np.random.Generator) -> tuple[np.ndarray, ExpertMap, PlacementProblem]:
    layers, ranks = int(rng.integers(1, 4)), int(rng.integers(1, 7))
    experts = int(rng.integers(1, 25))
    current = ExpertMap.random(
        rng, layers, experts, ranks, num_redundant=int(rng.integers(0, 6)), epoch=int(rng.integers(9))
    )
    held_max = max(
        int((current.local_experts(layer, rank) != EMPTY).sum()) for layer in range(layers) for rank in range(ranks)
    )
    least = max(held_max, -(-experts // ranks))
    slots = int(rng.integers(least, least + 4))
    pairs_max = max(
        sum(int((current.local_experts(layer, rank) != EMPTY).sum()) for layer in range(layers))
        for rank in range(ranks)
    )
    expert_bytes = int(rng.integers(1, 5000))
    cost = CostModel(
        expert_bytes=expert_bytes,
        row_flops=float(rng.choice([1e3, 1e9])),
        move_bytes_per_s=float(rng.choice([1e3, 1e12])),
        memory_bytes_per_s=float(rng.choice([1e5, 1e12])),
    )
    windows = rng.zipf(1.3, (int(rng.integers(1, 5)), layers, experts)).clip(max=10**6)
    windows *= rng.integers(0, 2, windows.shape) if rng.random() < 0.3 else 1
    problem = PlacementProblem(
        topology=Topology.even(ranks, int(rng.integers(1, ranks + 1))),
        slots_per_rank=slots,
        cost=cost,
        pool_slots=None if rng.random() < 0.5 else pairs_max + int(rng.integers(0, 4)),
        byte_budget=None
        if rng.random() < 0.4
        else int(rng.integers(0, 12)) * expert_bytes + int(rng.integers(expert_bytes)),
        replica_budget_per_layer=None if rng.random() < 0.6 else int(rng.integers(0, 6)),
        num_steps=int(rng.choice([1, 10, 10**5])),
    )
    return windows, current, problem


def assert_legal(plan: PlacementPlan, current: ExpertMap, problem: PlacementProblem, where: str) -> None:
    """Counted from the map alone, expert by expert."""
    new = plan.expert_map
    new.validate()
    assert new.num_ranks == current.num_ranks, where
    old_slots, new_slots = current.slots_per_rank, new.slots_per_rank
    moved = set()
    union: list[int] = []
    for rank in range(new.num_ranks):
        pairs = 0
        for layer in range(new.num_layers):
            old = [e for e in current.local_experts(layer, rank).tolist() if e != EMPTY]
            now = [e for e in new.local_experts(layer, rank).tolist() if e != EMPTY]
            assert len(now) <= problem.slots_per_rank, where
            pairs += len({*old, *now})
            moved |= {(layer, rank, expert) for expert in now if expert not in old}
            for slot, expert in enumerate(current.local_experts(layer, rank).tolist()[: min(old_slots, new_slots)]):
                if expert != EMPTY and expert in now:
                    assert new.local_experts(layer, rank)[slot] == expert, f"{where}: expert {expert} changed its slot"
        union.append(pairs)
    assert {(move.layer, move.slot // new_slots, move.expert) for move in plan.moves} == moved, where
    assert len(plan.moves) == len(moved), where
    assert plan.moved_bytes == len(moved) * problem.cost.expert_bytes, where
    for move in plan.moves:
        assert move.source_rank is not None
        assert move.expert in current.local_experts(move.layer, move.source_rank), where
    if problem.pool_slots is not None:
        assert max(union) <= problem.pool_slots, where
    if problem.byte_budget is not None:
        assert plan.moved_bytes <= problem.byte_budget, where
    if problem.replica_budget_per_layer is not None:
        for layer in range(new.num_layers):
            extra, had = (int((m.physical_to_logical_LP[layer] != EMPTY).sum()) - m.num_experts for m in (new, current))
            assert extra <= max(problem.replica_budget_per_layer, had), where
    assert new.epoch == (current.epoch if new is current else current.epoch + 1), where
    assert plan.predicted_after_s >= 0, where
    assert plan.reason, where


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_plans_are_legal(name: str) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    rng = np.random.default_rng(seed)
    policy, num_changed = POLICIES[name](), 0
    for run in range(RUNS):
        windows, current, problem = random_instance(rng)
        before = windows.copy()
        plan = policy.plan(windows, current, problem)
        assert_legal(plan, current, problem, f"{name}, seed {seed}, run {run}")
        assert np.array_equal(windows, before), "the load was written to"
        num_changed += plan.expert_map is not current
        if run % 10 == 0:
            again = POLICIES[name]().plan(windows, current, problem)
            assert again == plan, f"{name}, seed {seed}, run {run}: not a pure function"
    assert (num_changed == 0) == (name == "static"), f"{name}, seed {seed}: {num_changed} plans changed the map"


@pytest.mark.parametrize("name", [name for name in sorted(POLICIES) if name != "static"])
def test_pinned_experts_go_where_they_are_pinned_and_stay(name: str) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    rng = np.random.default_rng(seed)
    for run in range(60):
        layers, experts, ranks = 2, int(rng.integers(4, 16)), int(rng.integers(2, 5))
        current = ExpertMap.contiguous(layers, experts, ranks)
        slots = current.slots_per_rank + 2
        pinned = {}
        for _ in range(int(rng.integers(1, 3))):
            ranks_of_it = rng.choice(ranks, int(rng.integers(1, 3)), replace=False)
            pinned[int(rng.integers(layers)), int(rng.integers(experts))] = tuple(int(rank) for rank in ranks_of_it)
        problem = PlacementProblem(
            topology=Topology.even(ranks),
            slots_per_rank=slots,
            cost=CostModel(expert_bytes=10, row_flops=1e6),
            pinned=pinned,
        )
        expert_map = current
        for window in rng.zipf(1.5, (3, layers, experts)).clip(max=10**6):
            expert_map = POLICIES[name]().plan(window, expert_map, problem).expert_map
            for (layer, expert), expected in pinned.items():
                found = {slot // expert_map.slots_per_rank for slot in expert_map.replicas(layer, expert)}
                assert found == set(expected), f"{name}, seed {seed}, run {run}"


def test_too_many_pins_are_refused() -> None:
    current = ExpertMap.contiguous(1, 4, 2)
    problem = PlacementProblem(
        topology=Topology.even(2),
        slots_per_rank=2,
        cost=CostModel(expert_bytes=10, row_flops=1e6),
        pinned={(0, expert): (0,) for expert in range(3)},
    )
    with pytest.raises(ConfigError, match="pin fewer"):
        POLICIES["adaptive"]().plan(np.ones((1, 4), np.int64), current, problem)


def test_a_map_that_does_not_fit_is_refused() -> None:
    current = ExpertMap.contiguous(1, 4, 2)
    problem = PlacementProblem(
        topology=Topology.even(4), slots_per_rank=2, cost=CostModel(expert_bytes=10, row_flops=1e6)
    )
    with pytest.raises(ConfigError, match="re-home"):
        POLICIES["adaptive"]().plan(np.ones((1, 4), np.int64), current, problem)


def test_traffic_that_alternates_at_the_window_stays_within_the_budget_and_settles() -> None:
    """Hot sets that change places at every window: the forecast learns that the average serves best."""
    layers, experts, ranks = 2, 32, 4
    hot = np.ones((2, layers, experts), np.int64) * 100
    hot[0, :, :4], hot[1, :, 8:12] = 5000, 5000
    cost = CostModel(expert_bytes=10**6, row_flops=1e6, flops_per_s=1e9)
    expert_map = ExpertMap.contiguous(layers, experts, ranks)
    budget = 3 * cost.expert_bytes
    problem = PlacementProblem(
        topology=Topology.even(ranks), slots_per_rank=10, cost=cost, byte_budget=budget, num_steps=10
    )
    history, moved = [], []
    for window in range(40):
        history.append(hot[window % 2])
        plan = POLICIES["adaptive"]().plan(np.stack(history[-8:]), expert_map, problem)
        assert plan.moved_bytes <= budget
        moved.append(plan.moved_bytes)
        expert_map = plan.expert_map
    assert sum(moved[20:]) == 0, f"still moving: {moved}"
