"""Real skew as a sanity check: recorded counts that are not part of the project, where they lie beside it."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from switchgear.placement.policy import POLICIES, CostModel, PlacementProblem, Topology
from switchgear.placement.score import balanced_split, rank_rows
from switchgear_runtime.moe.expert_map import ExpertMap

TRACES = Path(__file__).resolve().parents[4] / "shared" / "traces"


def windows_of(path: Path) -> np.ndarray:
    """[iterations, L, E], of all source ranks."""
    with path.open(encoding="utf-8") as file:
        rows = [[int(cell) for cell in row] for row in list(csv.reader(file))[1:]]
    table = np.array(rows)
    windows = np.zeros((table[:, 0].max() + 1, table[:, 1].max() + 1, table.shape[1] - 3), np.int64)
    np.add.at(windows, (table[:, 0], table[:, 1]), table[:, 3:])
    return windows


@pytest.mark.parametrize(
    ("name", "ranks", "slots"), [("qwen", 6, 11), ("switch-exp64", 8, 9), ("switch-exp128", 8, 18)]
)
def test_next_iteration_is_as_even_as_eplbs_for_fewer_bytes(name: str, ranks: int, slots: int) -> None:
    path = TRACES / f"{name}.csv"
    if not path.is_file():
        pytest.skip("recorded traces are not here; they are not part of the project")
    windows = windows_of(path)
    num_layers, num_experts = windows.shape[1:]
    cost = CostModel(expert_bytes=10**6, row_flops=1e7, memory_bytes_per_s=1e15)
    found = {}
    for policy in ("static", "eplb", "adaptive"):
        current = ExpertMap.contiguous(num_layers, num_experts, ranks)
        budget = found["eplb"][1] // 2 if policy == "adaptive" else None
        problem = PlacementProblem(
            topology=Topology.even(ranks), slots_per_rank=slots, cost=cost, byte_budget=budget, num_steps=1
        )
        plan = POLICIES[policy]().plan(windows[:1], current, problem)
        rows_LR = rank_rows(balanced_split(windows[1], plan.expert_map), ranks)
        found[policy] = (float((rows_LR.max(axis=1) / rows_LR.mean(axis=1)).mean()), plan.moved_bytes)
    print(name, {policy: (round(ratio, 4), num_bytes) for policy, (ratio, num_bytes) in found.items()})
    assert found["adaptive"][0] < found["static"][0]
    assert found["adaptive"][0] <= found["eplb"][0] * 1.02
    assert found["adaptive"][1] <= found["eplb"][1] / 2
