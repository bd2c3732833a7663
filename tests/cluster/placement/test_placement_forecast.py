"""The forecast: a short memory for drift, a long one for noise and for traffic that alternates."""

from __future__ import annotations

import numpy as np
import pytest

from switchgear.placement.forecast import SCENARIOS_MAX, forecast, scenarios_around

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


def test_scenarios_are_what_happened_lately() -> None:
    """The last window is the forecast here. Expert 2 doubled and expert 3 halved: once more, or back again."""
    windows = np.array([[[800, 200, 1000, 2000]], [[400, 600, 1000, 2000]], [[400, 600, 2000, 1000]]])
    load = windows[-1].astype(float)
    scenarios = scenarios_around(load, windows)
    assert {weight for weight, _ in scenarios} == {1 / 4}
    latest, before, back = (scenario[0] for _, scenario in scenarios[1:])
    np.testing.assert_allclose(latest[2] / latest[3], 2.0 * 4.0, rtol=0.05)
    np.testing.assert_allclose(before[0] / before[1], (2 / 3) * (1 / 2) / 3, rtol=0.1)
    np.testing.assert_allclose(back, windows[0, 0], rtol=0.1)
    rng = np.random.default_rng(RNG_SEED)
    many = rng.integers(1, 1000, (12, 1, 8))
    assert len(scenarios_around(many[-1].astype(float), many)) == SCENARIOS_MAX
    assert len(scenarios_around(many[-1].astype(float), many, 4)) == 4


def test_scenarios_take_nothing_from_windows_without_tokens() -> None:
    windows = np.array([[[5, 5], [0, 0]], [[7, 3], [1, 9]]])
    load = windows[-1].astype(float)
    _, (_, changed) = scenarios_around(load, windows)
    assert changed[1].tolist() == load[1].tolist()
    assert changed[0].tolist() != load[0].tolist()
