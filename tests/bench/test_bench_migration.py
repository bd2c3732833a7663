"""`switchgear bench migration`: experts really move while its steps are timed, and its maps are legal."""

from __future__ import annotations

import numpy as np
import pytest

from switchgear.config import bundled_model
from switchgear_bench import migration
from switchgear_bench.migration_worker import swapped
from switchgear_runtime.moe.expert_map import ExpertMap


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_rank_gets_its_number_of_experts(num_ranks: int) -> None:
    current = ExpertMap.contiguous(4, 32, num_ranks)
    for epoch in range(1, 20):
        following = swapped(current, np.random.default_rng((3, epoch)), 16, epoch)
        following.validate()
        for rank in range(num_ranks):
            new = [
                set(following.local_experts(layer, rank).tolist()) - set(current.local_experts(layer, rank).tolist())
                for layer in range(4)
            ]
            assert sum(map(len, new)) == 16
        current = following


@pytest.mark.ranks
def test_a_short_run_measures_what_it_says() -> None:
    setup = migration.Setup(
        model=str(bundled_model()),
        steps=900,  # about a second an arm: a fast machine steps 80 times before the niced stager has its first turn
        block_steps=310,
        experts_per_s=100_000,
        moves_per_map=4,
        expert_bytes=1 << 18,
    )
    row = migration.run(setup)
    assert row["steps_per_arm"] >= 900
    assert row["num_flips"] >= 1
    assert row["experts_moved"] >= 8
    assert row["native"]
    for clock in ("wall", "cpu"):
        for percentile in ("p50", "p99", "p99.9"):
            assert row[clock][percentile]["migrating_us"] > 0
