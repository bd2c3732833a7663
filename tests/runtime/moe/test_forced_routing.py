"""Forced routing: the load comes out as the trace's, from seed and position alone."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from switchgear_runtime.errors import ConfigError
from switchgear_runtime.moe.forced_routing import NUM_ORDERS, NUM_ROWS, ForcedRouting, draw
from switchgear_runtime.moe.load_window import LoadWindow
from switchgear_runtime.moe.routing_trace import RoutingTrace, TokenRoutes


def make_trace(routed_WLE: np.ndarray, top_k: int) -> RoutingTrace:
    windows = [
        LoadWindow(begin_step=i, end_step=i + 1, routed_SLE=routed_LE[None]) for i, routed_LE in enumerate(routed_WLE)
    ]
    return RoutingTrace.of(windows, top_k=top_k)


def test_rows_hold_each_expert_as_often_as_it_is_due() -> None:
    seeds, squares = [], []
    for _ in range(200):
        seed = random.SystemRandom().randrange(1 << 30)
        rng = np.random.default_rng(seed)
        num_experts = int(rng.integers(1, 70))
        top_k = int(rng.integers(1, min(8, num_experts) + 1))
        num_tokens = int(rng.integers(1, 300))
        # a router's counts: each token takes top_k different experts, some liked more than others
        likes_E = rng.dirichlet(np.full(num_experts, rng.choice([0.05, 0.5, 5.0]))) + 1e-9
        counts_E = np.zeros(num_experts, np.int64)
        for _ in range(num_tokens):
            counts_E[rng.choice(num_experts, top_k, replace=False, p=likes_E / likes_E.sum())] += 1
        rows = draw(counts_E, top_k, [seed])
        assert rows.shape == (NUM_ROWS, top_k)
        assert (np.diff(np.sort(rows, axis=1), axis=1) > 0).all(), f"seed {seed}: an expert twice in a row"
        drawn_E = np.bincount(rows.reshape(-1), minlength=num_experts)
        due_E = counts_E * (NUM_ROWS / num_tokens)
        assert np.abs(drawn_E - due_E).max() < NUM_ORDERS, f"seed {seed}"
        seeds.append(seed)
        squares.append(float(np.square(drawn_E - due_E).mean()))
    # Each of the orders rounds by less than one, with a variance of at most 1/4, and independently of the others. (A
    # mean of 200 draws whose own spread is about that of a chi-square: 1.5 is five of its standard deviations.)
    assert np.mean(squares) < NUM_ORDERS / 4 * 1.5, f"seeds {seeds}"


def test_two_experts_are_not_rounded_the_same_way_in_every_order() -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    drawn_S2 = np.stack([np.bincount(draw(np.array([213, 5]), 1, [seed, i]).reshape(-1)) for i in range(400)])
    due_2 = np.array([213, 5]) * (NUM_ROWS / 218)
    # the mean of 400 draws has a standard deviation of at most sqrt(16 / 4 / 400)
    assert np.abs(drawn_S2.mean(axis=0) - due_2).max() < 6 * math.sqrt(NUM_ORDERS / 4 / 400), f"seed {seed}"


def test_any_counts_give_legal_rows() -> None:
    for _ in range(200):
        seed = random.SystemRandom().randrange(1 << 30)
        rng = np.random.default_rng(seed)
        num_experts = int(rng.integers(1, 20))
        top_k = int(rng.integers(1, num_experts + 1))
        counts_E = rng.integers(0, 1 << 32, num_experts) * (rng.random(num_experts) < 0.4)
        counts_E[rng.integers(num_experts)] *= 5
        rows = draw(counts_E, top_k, [seed])
        assert rows.max() < num_experts
        assert (np.diff(np.sort(rows, axis=1), axis=1) > 0).all(), f"seed {seed}: {counts_E}, top {top_k}"
        if counts_E.max() * top_k > counts_E.sum() > 0:
            assert (rows == counts_E.argmax()).any(axis=1).mean() > 0.97, f"seed {seed}: {counts_E}, top {top_k}"


def test_the_seed_chooses_the_window_and_nothing_else_matters() -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    rng = np.random.default_rng(seed)
    routed_WLE = np.zeros((3, 2, 9), np.int64)
    for window in range(3):
        routed_WLE[window, :, 3 * window : 3 * window + 3] = 10
    trace = make_trace(routed_WLE, 2)
    routing = ForcedRouting(trace, num_layers=2, num_experts=9, top_k=2)
    seeds = [int(value) for value in rng.integers(0, 1 << 63, 20)] + [2**64 - 1]
    sizes = rng.integers(0, 9, len(seeds)).tolist()
    positions = [
        range(start, start + size) for start, size in zip(rng.integers(0, 1000, 21).tolist(), sizes, strict=True)
    ]
    ids_LTK = routing.ids_LTK(seeds, sizes, [position for part in positions for position in part])
    assert ids_LTK.shape == (2, sum(sizes), 2)
    assert ids_LTK.dtype == np.int32
    assert ids_LTK.flags.c_contiguous
    begin = 0
    for one, size, part in zip(seeds, sizes, positions, strict=True):
        own_LTK = ids_LTK[:, begin : begin + size]
        begin += size
        assert (own_LTK // 3 == one % 3).all(), f"seed {seed}"
        for index, position in enumerate(part):  # a token alone, in another object
            alone = ForcedRouting(trace, num_layers=2, num_experts=9, top_k=2).ids_LTK([one], [1], [position])
            assert np.array_equal(alone[:, 0], own_LTK[:, index]), f"seed {seed}"
            break


def test_long_requests_are_routed_as_their_window_was() -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    rng = np.random.default_rng(seed)
    counts_E = 1 + rng.integers(0, 50, 32)
    routing = ForcedRouting(make_trace(counts_E[None, None], 4), num_layers=1, num_experts=32, top_k=4)
    ids = routing.ids_LTK(list(range(50)), [400] * 50, [position for _ in range(50) for position in range(400)])
    actual_E = np.bincount(ids.reshape(-1), minlength=32) / ids.size
    assert np.abs(actual_E - counts_E / counts_E.sum()).sum() / 2 < 0.03, f"seed {seed}"


def test_a_trace_of_another_model_is_refused() -> None:
    trace = make_trace(np.ones((1, 2, 9), np.int64), 2)
    with pytest.raises(ConfigError, match=r"\(2, 9\).*\(3, 9\)"):
        ForcedRouting(trace, num_layers=3, num_experts=9, top_k=2)


def test_recorded_tokens_are_drawn_whole() -> None:
    """A row is one token in all layers: in this trace a token's experts in layer 1 follow from those in layer 0."""
    rng = np.random.default_rng(5)
    first_TK = np.argsort(rng.random((40, 9)), axis=1)[:, :2]
    ids_TLK = np.stack([first_TK, (first_TK + 1) % 9], axis=1).astype(np.uint16)
    counts_LE = np.stack([np.bincount(ids_TLK[:, layer].reshape(-1), minlength=9) for layer in range(2)])
    window = LoadWindow(begin_step=0, end_step=1, routed_SLE=counts_LE[None])
    tokens = TokenRoutes(num_tokens_WS=np.array([[40]]), topk_ids_TLK=ids_TLK)
    trace = RoutingTrace.of([window], top_k=2, tokens=tokens)
    drawn_LTK = ForcedRouting(trace, num_layers=2, num_experts=9, top_k=2).ids_LTK([3], [200], range(200))
    assert np.array_equal(drawn_LTK[1], (drawn_LTK[0] + 1) % 9)
    assert len(np.unique(drawn_LTK[0], axis=0)) > 20
    # another top-k than was recorded: drawn from the counts
    assert ForcedRouting(trace, num_layers=2, num_experts=9, top_k=3).ids_LTK([3], [4], range(4)).shape == (2, 4, 3)
