"""Routes between random maps: each hop is legal, fits the pools beside what it comes from, and the last is the target."""

from __future__ import annotations

import numpy as np
import pytest

from switchgear.placement.epochs import same_place
from switchgear.placement.plan import presence
from switchgear.placement.route import route_to
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.moe.expert_map import ExpertMap


def pool_of(expert_map: ExpertMap) -> int:
    """What `survive=1` gives."""
    share = -(-expert_map.num_experts // max(1, expert_map.num_ranks - 1)) + 1
    return expert_map.num_layers * min(expert_map.num_experts, share)


def test_random_maps_are_reached_within_the_pools() -> None:
    num_hops = []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        shape = int(rng.integers(1, 5)), int(rng.integers(6, 20)), int(rng.integers(2, 5))
        current, target = (ExpertMap.random(rng, *shape, num_redundant=int(rng.integers(3))) for _ in range(2))
        pool = pool_of(current)
        if max(presence(one).sum(axis=(0, 2)).max() for one in (current, target)) > pool:
            continue
        route = route_to(target, current, pool)
        num_hops.append(len(route))
        assert route[-1] is target, f"seed {seed}"
        for before, after in zip((current, *route), route, strict=False):
            after.validate()
            assert (presence(before) | presence(after)).sum(axis=(0, 2)).max() <= pool, f"seed {seed}"
    assert len(num_hops) > 50
    assert max(num_hops) > 1
    print(f"{len(num_hops)} routes, {max(num_hops)} hops at most")


def test_what_fits_goes_at_once() -> None:
    current = ExpertMap.contiguous(2, 8, 2)
    target = ExpertMap.random(np.random.default_rng(0), 2, 8, 2)
    assert route_to(target, current, 16) == (target,)


def test_pools_without_a_free_slot_leave_no_way() -> None:
    current = ExpertMap.contiguous(1, 4, 2)
    target = ExpertMap.from_json({"epoch": 0, "num_ranks": 2, "num_experts": 4, "physical_to_logical": [[2, 3, 0, 1]]})
    assert not same_place(current, target)
    with pytest.raises(ConfigError, match="pools of 2 slots are too full"):
        route_to(target, current, 2)
    assert len(route_to(target, current, 3)) > 1
