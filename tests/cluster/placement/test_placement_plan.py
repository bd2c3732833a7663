"""Maps from presence, moves between maps: slots are kept, sources are right."""

from __future__ import annotations

import numpy as np
import pytest

from switchgear.placement.plan import arrange, moves_between, presence
from switchgear.placement.policy import POLICIES, CostModel, PlacementProblem, Topology
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.moe.expert_map import EMPTY, ExpertMap

COST = CostModel(expert_bytes=1000, row_flops=100.0)


def problem_of(expert_map: ExpertMap, slots_per_rank: int, **settings: object) -> PlacementProblem:
    topology = Topology.even(expert_map.num_ranks, 2 if expert_map.num_ranks > 1 else 1)
    return PlacementProblem(topology=topology, slots_per_rank=slots_per_rank, cost=COST, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(50))
def test_arrange_keeps_slots_and_holds_what_was_asked(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layers, experts, ranks = int(rng.integers(1, 4)), int(rng.integers(2, 12)), int(rng.integers(1, 5))
    current = ExpertMap.random(rng, layers, experts, ranks, num_redundant=int(rng.integers(0, 4)), epoch=7)
    wanted = presence(ExpertMap.random(rng, layers, experts, ranks, num_redundant=2))
    slots = int(wanted.sum(axis=2).max())
    new = arrange(wanted, current, slots)
    assert np.array_equal(presence(new), wanted), f"seed {seed}"
    assert new.epoch == (7 if new is current else 8)
    assert new.slots_per_rank == slots
    for layer in range(layers):
        for rank in range(ranks):
            old, now = current.local_experts(layer, rank), new.local_experts(layer, rank)
            for slot, expert in enumerate(old[:slots]):
                if expert != EMPTY and wanted[layer, rank, expert]:
                    assert now[slot] == expert, f"seed {seed}"
    moves = moves_between(current, new, problem_of(new, slots).topology)
    got = {(move.layer, move.slot // slots, move.expert) for move in moves}
    assert len(got) == len(moves)
    had = presence(current)
    assert got == {tuple(index) for index in np.argwhere(wanted & ~had).tolist()}, f"seed {seed}"
    for move in moves:
        assert new.physical_to_logical_LP[move.layer, move.slot] == move.expert
        assert move.source_rank is not None
        assert had[move.layer, move.source_rank, move.expert]


def test_an_unchanged_map_keeps_its_epoch() -> None:
    current = ExpertMap.contiguous(2, 6, 3, epoch=4)
    assert arrange(presence(current), current, current.slots_per_rank) is current


def test_sources_prefer_the_own_host() -> None:
    physical = np.array([[0, 1, EMPTY, 0, EMPTY, EMPTY, EMPTY, EMPTY]], np.int32)  # expert 0 on ranks 0 and 1
    current = ExpertMap(epoch=0, num_ranks=4, num_experts=2, physical_to_logical_LP=physical)
    wanted = presence(current)
    wanted[0, 2, 0] = wanted[0, 3, 1] = True
    topology = Topology(num_ranks=4, hosts=("a", "b", "b", "a"))
    moves = moves_between(current, arrange(wanted, current, 2), topology)
    assert [(move.expert, move.slot // 2, move.source_rank) for move in moves] == [(0, 2, 1), (1, 3, 0)]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_all_zero_load_is_valid(name: str) -> None:
    current = ExpertMap.contiguous(2, 6, 3)
    plan = POLICIES[name]().plan(np.zeros((2, 6), np.int64), current, problem_of(current, 3))
    plan.expert_map.validate()


def test_impossible_problems_say_what_to_change() -> None:
    current = ExpertMap.contiguous(2, 6, 3)
    load = np.ones((2, 6), np.int64)
    with pytest.raises(ConfigError, match="at least 2"):
        POLICIES["static"]().plan(load, current, problem_of(current, 1))
    with pytest.raises(ConfigError, match="pool_slots=3"):
        POLICIES["static"]().plan(load, current, problem_of(current, 2, pool_slots=3))
    with pytest.raises(ConfigError, match="negative"):
        POLICIES["static"]().plan(-load, current, problem_of(current, 2))
    with pytest.raises(ConfigError, match="shape"):
        POLICIES["static"]().plan(load[:, :5], current, problem_of(current, 2))
