"""A map for another set of ranks: survivors keep their slots, every expert has a place, joiners get their part."""

from __future__ import annotations

import numpy as np
import pytest

from switchgear_runtime.moe.expert_map import EMPTY, ExpertMap
from switchgear_runtime.moe.rehome import rehome


def held(expert_map: ExpertMap, layer: int, rank: int) -> list[int]:
    return [expert for expert in expert_map.local_experts(layer, rank).tolist() if expert != EMPTY]


@pytest.mark.parametrize("seed", range(40))
def test_survivors_keep_their_slots_and_only_lost_experts_move(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_ranks, num_experts = int(rng.integers(2, 9)), int(rng.integers(8, 40))
    old = ExpertMap.random(rng, 3, num_experts, num_ranks, num_redundant=int(rng.integers(8)), epoch=4)
    survivors = sorted(rng.permutation(num_ranks)[: int(rng.integers(1, num_ranks))].tolist())
    new = rehome(old, survivors, epoch=5)
    new.validate()
    assert (new.epoch, new.num_ranks) == (5, len(survivors)), f"seed {seed}"
    for layer in range(3):
        kept = {expert for rank in survivors for expert in held(old, layer, rank)}
        arrived: list[int] = []
        for rank, origin in enumerate(survivors):
            before = old.local_experts(layer, origin)
            after = new.local_experts(layer, rank)
            where = before != EMPTY
            assert np.array_equal(after[: len(before)][where], before[where]), f"seed {seed}: a survivor's slot changed"
            arrived += set(held(new, layer, rank)) - set(held(old, layer, origin))
        assert sorted(arrived) == sorted(set(range(num_experts)) - kept), f"seed {seed}: more than the lost ones moved"


@pytest.mark.parametrize("seed", range(20))
def test_joiners_take_a_fair_part(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_ranks, num_new = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    old = ExpertMap.contiguous(2, 24, num_ranks, epoch=1)
    new = rehome(old, [*range(num_ranks), *[None] * num_new], epoch=2)
    new.validate()
    for layer in range(2):
        sizes = [len(held(new, layer, rank)) for rank in range(new.num_ranks)]
        assert min(sizes[num_ranks:]) >= 24 // new.num_ranks, f"seed {seed}: {sizes}"
        for rank in range(num_ranks):
            assert set(held(new, layer, rank)) <= set(held(old, layer, rank)), f"seed {seed}"


def test_the_same_ranks_keep_the_same_map() -> None:
    old = ExpertMap.random(np.random.default_rng(3), 2, 12, 3, num_redundant=4, epoch=7)
    new = rehome(old, [0, 1, 2], epoch=8)
    assert np.array_equal(new.physical_to_logical_LP, old.physical_to_logical_LP)
