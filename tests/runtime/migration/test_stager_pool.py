"""What a rank may stage: what fits its pool, and above that only what adds nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from switchgear_runtime.errors import ConfigError
from switchgear_runtime.migration.stager import Stager
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.system import RealSystem


def refusal(current: list[int], staged: list[int], pool_slots: int) -> str:
    """Of rank 0 of 2, with 4 experts; empty if there is none."""
    runner: Any = SimpleNamespace(pool_slots=pool_slots)
    stager = Stager(runner, rank=0, system=RealSystem(), deliver=lambda _: None)

    def made(row: list[int]) -> ExpertMap:
        return ExpertMap.from_json({"epoch": 0, "num_ranks": 2, "num_experts": 4, "physical_to_logical": [row]})

    job: Any = SimpleNamespace(current=lambda: made(current))
    try:
        stager._check(job, made(staged))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("pool_slots", [1, 2, 3])
def test_a_map_that_adds_nothing_passes_on_a_rank_above_its_pool(pool_slots: int) -> None:
    full = [0, 1, 2, 3, 3, -1, -1, -1]
    assert refusal(full, full, pool_slots) == ""
    assert refusal(full, [0, 1, 2, -1, 3, -1, -1, -1], pool_slots) == ""
    assert "4 experts would be held" in refusal([0, 1, 2, -1, 3, 2, -1, -1], full, pool_slots)
