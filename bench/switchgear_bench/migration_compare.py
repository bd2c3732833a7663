"""What migration does to a step's time, and what two equal arms differ by: `compare`.

All arms take part in every round, in random order, with the same requests, so what drifts over minutes is in all of
them. The 95 % intervals are of the bootstrap over rounds, arms together. The bound of equal arms is a randomisation
test's: in each round either of the two arms without migration is called the migrating one, and the bound is what 95 % of
such relabellings stay under, either way. There one arm is held against one, but migration against the two together,
whose percentile varies less; the bound's logarithm is scaled to that.

Letters: B rounds, N steps of a block that count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

ARMS = ("none", "none again", "migrating")
PERCENTILES = (50.0, 99.0, 99.9)
RISE_MAX = 1.05  # of a percentile, where equal arms differ by less
_DRAWS = 1000
_TWO_REFERENCES = (1.5 / 2.0) ** 0.5  # var(x - mean of two) / var(x - y)
Float64 = NDArray[np.float64]


def compare(steps: Mapping[str, Float64]) -> dict[str, Any]:
    """`steps`: [B, N] seconds of each arm."""
    none, again, migrating = (steps[arm] for arm in ARMS)
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for percentile in PERCENTILES:

        def ratio_of(rounds: NDArray[np.int64], percentile: float = percentile) -> float:
            return _ratio(migrating[rounds], np.stack([none[rounds], again[rounds]]), percentile)

        num_rounds = len(none)
        ratio = ratio_of(np.arange(num_rounds))
        drawn = [ratio_of(rng.integers(num_rounds, size=num_rounds)) for _ in range(_DRAWS)]
        bound = equal_arms_bound(rng, none, again, percentile)
        found[f"p{percentile:g}"] = {
            **{f"{arm.replace(' ', '_')}_us": float(np.percentile(steps[arm], percentile) * 1e6) for arm in ARMS},
            "ratio": ratio,
            "ratio_95": np.percentile(drawn, [2.5, 97.5]).tolist(),
            "equal_arms_ratio": _ratio(again, none, percentile),
            "equal_arms_bound": bound,
            "allowed": max(RISE_MAX, bound),
        }
    found["mean_us"] = {arm: float(steps[arm].mean() * 1e6) for arm in ARMS}
    return found


def equal_arms_bound(rng: np.random.Generator, one_BN: Float64, other_BN: Float64, percentile: float) -> float:
    """The ratio to one, upwards, that 95 % of relabellings stay under."""
    both = np.stack([one_BN, other_BN])
    rounds = np.arange(len(one_BN))
    logs = []
    for _ in range(_DRAWS):
        swaps = rng.integers(2, size=len(rounds))
        logs.append(abs(np.log(_ratio(both[swaps, rounds], both[1 - swaps, rounds], percentile))))
    return float(np.exp(_TWO_REFERENCES * np.percentile(logs, 95.0)))


def _ratio(one: Float64, reference: Float64, percentile: float) -> float:
    return float(np.percentile(one, percentile) / np.percentile(reference, percentile))
