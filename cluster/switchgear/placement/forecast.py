"""What the next window's load will be, from the last ones.

An average in which each window counts `keep` times the next one. How long a memory serves best hangs on the traffic
(a drift asks for a short one, noise and traffic that alternates for a long one), so each layer takes the `keep` that
would have foretold its own past windows best. Then experts are drawn towards their mean by as much as the counts are
noise (empirical Bayes, with the variance of counts; James and Stein's shrinkage).

Letters: W windows, L MoE layers, E logical experts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from switchgear.placement.problem import Int64

Float64 = NDArray[np.float64]

KEEPS = (0.0, 0.35, 0.6, 0.8, 0.9)
PRIOR_WINDOWS = 1.0  # of evidence that the middle one is right, so that few windows do not decide
SCENARIOS_MAX = 8
BACK_WINDOWS = (2, 5)
DRIFT_MAX = 4.0  # of an expert's share, as a factor
DRIFT_FLOOR = 0.02  # of the mean share, so that a few tokens more are no drift


def forecast(windows_WLE: Int64) -> Float64:
    """The window after the last, [L, E], in counts of a window as large as that. A single window foretells itself."""
    if len(windows_WLE) == 1:
        return np.asarray(windows_WLE[0], np.float64)
    totals_WL = windows_WLE.sum(axis=2)
    sizes_L = totals_WL[-1].astype(np.float64)
    num_keeps = len(KEEPS)
    loss_KL = np.zeros((num_keeps, len(sizes_L)))
    sums_KLE = np.zeros((num_keeps, *windows_WLE.shape[1:]))
    weights_KL, squares_KL = np.zeros_like(loss_KL), np.zeros_like(loss_KL)  # of tokens, and of their squared weights
    evidence_L = np.zeros(len(sizes_L))
    for counts_LE, total_L in zip(windows_WLE.astype(np.float64), totals_WL.astype(np.float64), strict=True):
        has_L = total_L > 0
        known_KL = (weights_KL > 0) & has_L
        shares_KLE = sums_KLE / np.where(weights_KL > 0, weights_KL, 1.0)[..., None]
        miss_KLE = shares_KLE - (counts_LE / np.where(has_L, total_L, 1.0)[:, None])
        loss_KL += np.where(known_KL, np.square(miss_KLE).sum(axis=2), 0.0)
        evidence_L += known_KL[0]
        for index, keep in enumerate(KEEPS):
            faded_L = np.where(has_L, keep, 1.0)
            sums_KLE[index] = sums_KLE[index] * faded_L[:, None] + counts_LE
            weights_KL[index] = weights_KL[index] * faded_L + total_L
            squares_KL[index] = squares_KL[index] * np.where(has_L, keep * keep, 1.0) + total_L
    loss_KL += PRIOR_WINDOWS * _prior(loss_KL, evidence_L)
    best_L = loss_KL.argmin(axis=0)
    layers = np.arange(len(best_L))
    weight_L = np.where(weights_KL[best_L, layers] > 0, weights_KL[best_L, layers], 1.0)
    shares_LE = sums_KLE[best_L, layers] / weight_L[:, None]
    noise_L = shares_LE.mean(axis=1) * squares_KL[best_L, layers] / np.square(weight_L)
    variance_L = shares_LE.var(axis=1)
    signal_L = np.clip(1.0 - noise_L / np.where(variance_L > 0, variance_L, 1.0), 0.0, 1.0)
    mean_L1 = shares_LE.mean(axis=1, keepdims=True)
    load_LE: Float64 = (mean_L1 + signal_L[:, None] * (shares_LE - mean_L1)) * sizes_L[:, None]
    return load_LE


def scenarios_around(
    load_LE: Float64, windows_WLE: Int64, count_max: int = SCENARIOS_MAX
) -> list[tuple[float, Float64]]:
    """(weight, load): the forecast; what if experts' loads change once more as they did from one of the last windows to
    the next, latest first; and what if what has changed for some windows turns back. All weigh the same: what has happened
    is what may happen."""
    sizes_WL1 = windows_WLE.sum(axis=2, keepdims=True).astype(np.float64)
    shares_WLE = windows_WLE / np.where(sizes_WL1 > 0, sizes_WL1, 1.0) + DRIFT_FLOOR / windows_WLE.shape[2]
    known_WL1 = sizes_WL1 > 0
    last = len(windows_WLE) - 1

    def factor_LE(then: int, now: int) -> Float64:
        known_L1 = known_WL1[then] & known_WL1[now]
        drift_LE = np.clip(shares_WLE[now] / shares_WLE[then], 1.0 / DRIFT_MAX, DRIFT_MAX)
        return np.asarray(np.where(known_L1, drift_LE, 1.0))

    back = [1.0 / factor_LE(last - windows, last) for windows in BACK_WINDOWS if windows <= last]
    again = [factor_LE(now - 1, now) for now in range(last, 0, -1)][: max(1, count_max - 1 - len(back))]
    loads = [load_LE]
    for changed_LE in (load_LE * factor for factor in (*again, *back)):
        scale_L1 = load_LE.sum(axis=1, keepdims=True) / np.maximum(changed_LE.sum(axis=1, keepdims=True), 1e-300)
        loads.append(changed_LE * scale_L1)
    return [(1.0 / len(loads), load) for load in loads]


def _prior(loss_KL: Float64, evidence_L: Float64) -> Float64:
    """One window's loss of the mean candidate, and a little more the further a candidate is from the middle."""
    typical_L = loss_KL.mean(axis=0) / np.where(evidence_L > 0, evidence_L, 1.0)
    middle = len(KEEPS) // 2
    distance_K = np.abs(np.arange(len(KEEPS)) - middle) / middle
    return np.asarray(np.where(evidence_L > 0, typical_L, 1.0) * (1.0 + 0.5 * distance_K[:, None]))
