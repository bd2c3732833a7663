"""The forecast: a short memory for drift, a long one for noise and for traffic that alternates."""

from __future__ import annotations

import numpy as np
import pytest

from switchgear.placement.forecast import forecast, scenarios_around

RNG_SEED = 7


def error(foretold_LE: np.ndarray, windows_WLE: np.ndarray) -> float:
    truth = windows_WLE / windows_WLE.sum()
    return float(np.abs(foretold_LE / foretold_LE.sum() - truth).sum())


def test_one_window_foretells_itself() -> None:
    window = np.array([[3, 0, 9]])
    assert forecast(window[None]).tolist() == [[3.0, 0.0, 9.0]]
    assert scenarios_around(window.astype(float), window[None])[0][0] == 1.0


def test_noise_is_averaged_and_shrunk() -> None:
    """Few tokens of an unchanging popularity: the last window alone is a poor forecast."""
    rng = np.random.default_rng(RNG_SEED)
    shares = rng.dirichlet(np.full(32, 5.0))
    better = 0
    for _ in range(20):
        windows = rng.multinomial(200, shares, size=(8, 1))
        better += error(forecast(windows), shares[None]) < error(windows[-1].astype(float), shares[None])
    assert better == 20


def test_a_switch_is_followed() -> None:
    """Many tokens that change for good: the past is forgotten within two windows."""
    rng = np.random.default_rng(RNG_SEED)
    before, after = rng.dirichlet(np.ones(32)), rng.dirichlet(np.ones(32))
    windows = np.stack([rng.multinomial(10**6, shares, size=1) for shares in [before] * 2 + [after] * 6])
    assert error(forecast(windows), after[None]) < 0.05


def test_alternating_traffic_gets_its_average() -> None:
    one, other = np.array([[1000, 0, 500]]), np.array([[0, 1000, 500]])
    foretold = forecast(np.stack([one, other] * 4))
    average = (one + other) / 2
    assert error(foretold, average) < 0.5 * error(one.astype(float), average)


def test_windows_without_tokens_say_nothing() -> None:
    rng = np.random.default_rng(RNG_SEED)
    windows = rng.integers(0, 1000, (5, 2, 8))
    windows[1] = 0
    without = np.delete(windows, 1, axis=0)
    np.testing.assert_allclose(forecast(windows), forecast(without))
    assert not forecast(np.zeros((3, 2, 8), np.int64)).any()


def test_scenarios_keep_the_size_and_weigh_one() -> None:
    rng = np.random.default_rng(RNG_SEED)
    windows = rng.integers(0, 1000, (6, 2, 8))
    windows[-1, 0, 3] = windows[0, 1, 2] = 0
    load = forecast(windows)
    scenarios = scenarios_around(load, windows)
    assert sum(weight for weight, _ in scenarios) == pytest.approx(1.0)
    assert np.array_equal(scenarios[0][1], load)
    for _, scenario in scenarios:
        assert (scenario >= 0).all()
        np.testing.assert_allclose(scenario.sum(axis=1), load.sum(axis=1))
