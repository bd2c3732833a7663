"""Slack: a replica goes where a rank could be left with too many rows of its own, or too few within reach."""

from __future__ import annotations

import random

import numpy as np
import pytest

from switchgear.placement.layer_reference import EMPTY, Layer, LayerProblem, Path
from switchgear.placement.slack_reference import DEVIATIONS, VOLATILITY_UNKNOWN, Risk, volatility, widen_slack


def layer_of(rows_KE: list[list[float]], held: list[list[int]]) -> Layer:
    num_experts = len(rows_KE[0])
    return Layer(
        LayerProblem(
            num_ranks=len(held),
            slots_per_rank=len(held[0]),
            weight_K=[1.0 / len(rows_KE)] * len(rows_KE),
            work_KE=rows_KE,
            rows_KE=rows_KE,
            expert_s=0.0,
            held_P=[expert for slots in held for expert in slots],
            had_RE=[[expert in slots for expert in range(num_experts)] for slots in held],
            frozen_E=[False] * num_experts,
            extra_max=1 << 40,
            moves_max=1 << 40,
            steps_max=8,
            near_steps_max=8,
            target=1.0,
            near=1.0,
            per_move=False,
        )
    )


def test_a_rank_with_too_much_of_its_own_shares_it() -> None:
    """Rank 0 alone has the two hottest experts; the replica of a cold one makes way for one of them."""
    layer = layer_of([[50.0, 45.0, 5.0, 40.0, 30.0, 30.0]], [[0, 1, 2], [2, 3, 4], [5, 4, EMPTY]])
    layer.settle(10)
    path = Path()
    widen_slack(layer, 1, path)
    assert path.edits, "nothing was swapped"
    shared = {expert for expert in (0, 1) if len(layer.slots_E[expert]) > 1}
    assert shared, "the hottest rank's own experts stayed its own"
    assert all(layer.slots_E), "an expert has no rank"


def test_even_and_calm_loads_are_left_alone() -> None:
    rows = [30.0] * 6
    layer = layer_of([rows, rows], [[0, 1, 2], [2, 3, 4], [4, 5, 0]])
    path = Path()
    widen_slack(layer, 1, path)
    assert not path.edits


def test_volatility_is_that_of_the_scenarios() -> None:
    assert volatility([[3.0, 4.0]]) == VOLATILITY_UNKNOWN
    assert volatility([[3.0, 4.0], [3.0 * 1.2, 4.0 * 0.8]]) == pytest.approx(0.2)
    assert volatility([[0.0], [1.0]]) == 0.0


def test_a_swap_lowers_the_risk_by_what_it_says() -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    rng = np.random.default_rng(seed)
    num_swaps = 0
    for run in range(200):
        ranks, experts, slots = int(rng.integers(2, 6)), int(rng.integers(4, 14)), 0
        slots = -(-experts // ranks) + 2
        rows = (rng.lognormal(0, 1.5, experts) * 100).tolist()
        held = [[EMPTY] * slots for _ in range(ranks)]
        for expert in range(experts):
            held[expert % ranks][held[expert % ranks].index(EMPTY)] = expert
        for slots_of_rank in held:
            for slot, expert in enumerate(slots_of_rank):
                if expert == EMPTY:
                    others = [e for e in range(experts) if e not in slots_of_rank]
                    if others:
                        slots_of_rank[slot] = int(rng.choice(others))
        layer = layer_of([rows], held)
        mean, deviations = sum(rows) / ranks, DEVIATIONS * VOLATILITY_UNKNOWN
        risk = Risk(layer, mean, deviations)
        swap = risk.best_swap(0.0)
        if swap is None:
            continue
        num_swaps += 1
        layer.drop(swap.slot)
        layer.add(swap.slot, swap.expert, [0.0])
        after = Risk(layer, mean, deviations)
        assert risk.total() - after.total() == pytest.approx(swap.gain, rel=1e-6, abs=1e-6), f"seed {seed}, run {run}"
    assert num_swaps > 50, f"seed {seed}"
