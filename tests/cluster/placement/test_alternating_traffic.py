"""Traffic that changes its hot experts exactly at the controller's window: the worst rhythm for whoever follows load.

On a simulated clock, against a controller that never moves anything: at most the budgeted bytes move, and the predicted
time of all steps, with what the moves take, is no more than a few windows' mistakes above that of standing still.
"""

from __future__ import annotations

import numpy as np
import pytest
from placement_rig import COST, Rig

from switchgear.placement.policy import POLICIES
from switchgear.placement.problem import PlacementProblem
from switchgear.placement.score import equal_split, step_time_s
from switchgear.placement.settings import PlacementSettings
from switchgear.placement.topology import Topology
from switchgear_runtime.moe.expert_map import ExpertMap

NUM_RANKS, NUM_LAYERS, NUM_EXPERTS = 4, 2, 16
WINDOW_S = 10.0
NUM_WINDOWS = 200
STEPS = 1000  # of a window
BYTES_PER_S = 400  # four experts a window


def two_hot_sets(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Loads whose hot experts lie together on one rank of the contiguous map, another rank each."""
    loads = []
    for rank in rng.choice(NUM_RANKS, 2, replace=False).tolist():
        load_LE = rng.integers(50, 150, (NUM_LAYERS, NUM_EXPERTS))
        load_LE[:, rank * 4 : rank * 4 + 4] += rng.integers(2000, 6000, (NUM_LAYERS, 4))
        loads.append(load_LE)
    return loads[0], loads[1]


def total_s(rig: Rig, loads: list[np.ndarray]) -> float:
    """Predicted seconds of all steps, each window under the map that was in force during it, and of all moves."""
    problem = PlacementProblem(
        topology=Topology.even(NUM_RANKS), slots_per_rank=NUM_EXPERTS, cost=COST, num_steps=STEPS
    )
    sum_s = 0.0
    for load_LE in loads:
        expert_map = rig.controller.expert_map
        assert expert_map is not None
        sum_s += STEPS * step_time_s(equal_split(load_LE, expert_map), problem)
        rig.window(load_LE.reshape(-1).tolist())
    return sum_s + COST.move_s(rig.controller.counters.migrated_bytes)


def make_rig(policy: str) -> Rig:
    settings = PlacementSettings(policy=policy, window_s=WINDOW_S, bytes_per_s=BYTES_PER_S)
    rig = Rig(NUM_RANKS, NUM_LAYERS, NUM_EXPERTS, settings=settings)
    rig.begin()
    return rig


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"static"}))
@pytest.mark.parametrize("seed", range(3))
def test_at_most_the_budget_moves_and_standing_still_is_not_much_better(policy: str, seed: int) -> None:
    one, other = two_hot_sets(np.random.default_rng(seed))
    loads = [one, other] * (NUM_WINDOWS // 2)
    rig, still = make_rig(policy), make_rig("static")
    taken_s, static_s = total_s(rig, loads), total_s(still, loads)
    assert rig.controller.counters.migrated_bytes <= BYTES_PER_S * WINDOW_S * (NUM_WINDOWS + 1), f"seed {seed}"
    assert still.controller.counters.migrated_bytes == 0
    print(f"{policy}, seed {seed}: {taken_s / static_s:.3f} of static's time, {len(rig.committed)} migrations")
    assert taken_s <= static_s, f"seed {seed}"


def test_a_controller_that_was_fooled_recovers_when_traffic_settles() -> None:
    one, other = two_hot_sets(np.random.default_rng(9))
    rig, still = make_rig("incremental"), make_rig("static")
    for load_LE in [one, other] * 20:
        rig.window(load_LE.reshape(-1).tolist())
    settled = [one] * 150
    assert total_s(rig, settled) < 0.8 * total_s(still, settled)


def test_map_in_force_is_legal_throughout() -> None:
    rng = np.random.default_rng(4)
    rig = make_rig("incremental")
    for _ in range(60):
        rig.window(rng.integers(0, 5000, NUM_LAYERS * NUM_EXPERTS).tolist())
        expert_map = rig.controller.expert_map
        assert isinstance(expert_map, ExpertMap)
        rig.settings.check_map(expert_map, NUM_LAYERS, NUM_EXPERTS, num_ranks=NUM_RANKS)
