"""bf16 is as good as Transformers' bf16: the KL divergence to its fp32 logits, ours over theirs, over many
checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny_checkpoints import (
    ARCHITECTURES,
    BUNDLED,
    all_logits,
    contiguous_map,
    make_checkpoint,
    make_runner,
    reference_logits,
    reference_model,
    run_ranks,
)

NUM_SEEDS = 3  # of each architecture
RATIO_MAX = 1.25
NUM_TOKENS = 96


class Ratio(NamedTuple):
    """KL to Transformers' fp32 logits, ours over Transformers' own; the same bf16 weights for all three."""

    mean: float  # over the tokens; a few whose router was near a tie and took another expert decide it
    median: float


def kl(exact_TV: torch.Tensor, approximate_TV: torch.Tensor) -> torch.Tensor:
    p, q = exact_TV.double().log_softmax(-1), approximate_TV.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def kl_ratio(model_dir: Path, seed: int) -> Ratio:
    token_ids = torch.randint(130, (NUM_TOKENS,), generator=torch.Generator().manual_seed(seed)).tolist()
    exact_TV = reference_logits(reference_model(model_dir), token_ids)
    theirs_T = kl(exact_TV, reference_logits(reference_model(model_dir, torch.bfloat16), token_ids))

    def run(_rank: int, transport: Any) -> torch.Tensor:
        runner = make_runner(model_dir)
        assert runner.dtype == torch.bfloat16
        runner.begin(transport, contiguous_map(runner))
        return all_logits(runner, token_ids, range(NUM_TOKENS // 16))

    ours_T = kl(exact_TV, run_ranks(1, run)[0])
    return Ratio(float(ours_T.mean() / theirs_T.mean()), float(ours_T.median() / theirs_T.median()))


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def test_geometric_mean_of_the_kl_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ratios = {
        arch: [
            kl_ratio(make_checkpoint(tmp_path, arch, seed, dtype="bfloat16", std=std), seed)
            for seed, std in zip(range(NUM_SEEDS), (0.05, 0.1, 0.2), strict=True)
        ]
        for arch in ARCHITECTURES
    }
    means = [ratio.mean for of_arch in ratios.values() for ratio in of_arch]
    medians = {arch: geometric_mean([ratio.median for ratio in of_arch]) for arch, of_arch in ratios.items()}
    with capsys.disabled():
        print(f"\nbf16: KL ours / Transformers, geometric mean of {len(means)}: {geometric_mean(means):.3f}", end="; ")
        print("medians:", ", ".join(f"{arch} {median:.3f}" for arch, median in medians.items()))
    assert len(means) >= 20
    assert geometric_mean(means) <= RATIO_MAX
    for arch, median in medians.items():
        assert median <= RATIO_MAX, arch


def test_the_bundled_model() -> None:
    assert kl_ratio(BUNDLED, 0).mean <= RATIO_MAX
