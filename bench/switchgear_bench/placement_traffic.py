"""Load windows whose hot experts drift: synthetic ones, and single ones of known skew.

Letters: W windows, L MoE layers, E logical experts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]

DOMAINS = 6
SPREAD = 1.5  # standard deviation of a domain's log-weight
MEMORY_WINDOWS = 25.0  # after which a log-weight has forgotten two thirds of what it was
SWITCH_EVERY = 40.0  # windows, on average: then the mixture is drawn anew


def drifting_windows(
    num_windows: int, num_layers: int, num_experts: int, assignments: int, *, seed: int, skew: float = 1.0
) -> Int64:
    """[W, L, E]: each domain has log-normal expert popularity of its own; their mixture walks, and switches at times."""
    rng = np.random.default_rng(seed)
    popularity = np.exp(rng.normal(0, skew, (DOMAINS, num_layers, num_experts)))
    popularity /= popularity.sum(axis=2, keepdims=True)
    keep = float(np.exp(-1.0 / MEMORY_WINDOWS))
    weights = rng.normal(0, SPREAD, DOMAINS)
    windows = np.empty((num_windows, num_layers, num_experts), np.int64)
    for window in windows:
        walked = keep * weights + SPREAD * np.sqrt(1 - keep * keep) * rng.normal(0, 1, DOMAINS)
        weights = rng.normal(0, SPREAD, DOMAINS) if rng.random() < 1 / SWITCH_EVERY else walked
        mixture = np.exp(weights - weights.max())
        shares_LE = np.tensordot(mixture / mixture.sum(), popularity, 1)
        for layer, shares_E in enumerate(shares_LE):
            window[layer] = rng.multinomial(assignments, shares_E)
    return windows


def skewed_window(kind: str, num_layers: int, num_experts: int, assignments: int, *, seed: int) -> Int64:
    """[L, E] with the popularity of `zipf` (exponent 1) or `lognormal` (sigma 1)."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num_layers):
        zipf = rng.permutation(1.0 / np.arange(1, num_experts + 1))
        popularity = zipf if kind == "zipf" else np.exp(rng.normal(0, 1, num_experts))
        rows.append(rng.multinomial(assignments, popularity / popularity.sum()))
    return np.array(rows, np.int64)
