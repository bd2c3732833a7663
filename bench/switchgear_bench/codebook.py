"""Derives the int4 codebook and its scale candidates: `python -m switchgear_bench.codebook` prints both.

Trained weights are close to normal within a group of 32. Lloyd's algorithm on normal groups (S. P. Lloyd, "Least
squares quantization in PCM", 1982), with one more degree of freedom: before each step every group picks its best scale,
of either sign, so that the levels serve what the scale search leaves. Then the candidates: a greedy choice of what the
group's largest weight becomes, improved by exchanges.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32
NUM_CODES = 16
LARGEST = 127  # the magnitude of the most negative level
NUM_DIVISORS = 8
_POOL = (*range(-176, -80, 4), *range(84, 164, 4))


def normal_groups(num_groups: int, seed: int) -> Tensor:
    return torch.randn((num_groups, GROUP), generator=torch.Generator().manual_seed(seed))


def _codes(groups_GI: Tensor, scales_G: Tensor, levels: Tensor) -> Tensor:
    return torch.bucketize(groups_GI / scales_G[:, None], (levels[1:] + levels[:-1]) / 2)


def _errors(groups_GI: Tensor, scales_G: Tensor, levels: Tensor) -> Tensor:
    quantised_GI = levels[_codes(groups_GI, scales_G, levels)] * scales_G[:, None]
    return (groups_GI - quantised_GI).square().sum(1)


def _scales(groups_GI: Tensor, divisor: float) -> Tensor:
    return groups_GI.gather(1, groups_GI.abs().argmax(1, keepdim=True))[:, 0] / divisor


def fit_levels(groups_GI: Tensor, *, num_steps: int) -> Tensor:
    """Ascending, the first -LARGEST."""
    levels = torch.arange(-8.0, 8.0) * LARGEST / 8
    for _ in range(num_steps):
        best_error_G = torch.full((len(groups_GI),), torch.inf)
        best_scale_G = torch.ones(len(groups_GI))
        for divisor in _POOL:
            scales_G = _scales(groups_GI, divisor)
            error_G = _errors(groups_GI, scales_G, levels)
            best_scale_G = torch.where(error_G < best_error_G, scales_G, best_scale_G)
            best_error_G = torch.minimum(best_error_G, error_G)
        codes = _codes(groups_GI, best_scale_G, levels).flatten()
        products = (groups_GI * best_scale_G[:, None]).flatten()
        squares = best_scale_G.square().repeat_interleave(GROUP)
        levels = torch.bincount(codes, products, NUM_CODES) / torch.bincount(codes, squares, NUM_CODES)
        levels = levels * (-LARGEST / levels[0])
    return levels


def choose_divisors(groups_GI: Tensor, levels: Tensor, count: int) -> tuple[list[int], float]:
    """(divisors, mean squared error of a weight)."""
    errors_PG = torch.stack([_errors(groups_GI, _scales(groups_GI, divisor), levels) for divisor in _POOL])

    def error(chosen: list[int]) -> float:
        return float(errors_PG[chosen].amin(0).double().mean()) / GROUP

    chosen: list[int] = []
    for _ in range(count):
        chosen.append(min(range(len(_POOL)), key=lambda place: error([*chosen, place])))
    for _ in range(2):
        for turn in range(count):
            exchanged = [[*chosen[:turn], place, *chosen[turn + 1 :]] for place in range(len(_POOL))]
            chosen = min(exchanged, key=error)
    return sorted(_POOL[place] for place in chosen), error(chosen)


def main() -> None:
    levels = fit_levels(normal_groups(20_000, seed=1), num_steps=60).round()
    divisors, error = choose_divisors(normal_groups(20_000, seed=2), levels, NUM_DIVISORS)
    print("levels  ", [int(level) for level in levels.tolist()])
    print("divisors", divisors)
    print(f"mean squared error of a normal weight: {error:.6f}")


if __name__ == "__main__":
    main()
