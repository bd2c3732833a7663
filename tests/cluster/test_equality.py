"""The signature, through the front door: tokens and logprobs of any cluster equal those of one rank, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from switchgear import LLM, RequestOutput, SamplingParams
from switchgear.demo_prompts import PROMPTS_BY_DOMAIN
from switchgear_bench.throughput import idle_ranks

SEED = random.SystemRandom().randrange(1 << 32)  # fresh each run, and in every failure's message
Answers = list[tuple[list[int], list[tuple[int, float]]]]


def batch() -> tuple[list[str], list[SamplingParams]]:
    """33 prompts, short and long, each with its own way of drawing."""
    draw = random.Random(SEED)
    texts = [text for group in PROMPTS_BY_DOMAIN.values() for text in group]
    prompts = [" ".join(draw.choices(texts, k=draw.choice((1, 1, 2, 9)))) for _ in range(33)]
    params = [
        SamplingParams(
            max_tokens=draw.randint(1, 24),
            temperature=draw.choice((0.0, 0.7, 1.3)),
            top_k=draw.choice((0, 5)),
            top_p=draw.choice((1.0, 0.9)),
            repetition_penalty=draw.choice((1.0, 1.2)),
            seed=draw.randrange(1 << 40),
            logprobs=3,
            ignore_eos=True,
        )
        for _ in prompts
    ]
    return prompts, params


def answers(outputs: list[RequestOutput]) -> Answers:
    found: Answers = []
    for output in outputs:
        (completion,) = output.outputs
        assert completion.logprobs is not None
        logprobs = [(token, entry.logprob) for step in completion.logprobs for token, entry in step.items()]
        found.append((list(completion.token_ids), logprobs))
    return found


@pytest.fixture(scope="module")
def reference() -> Iterator[Answers]:
    prompts, params = batch()
    with LLM(ranks=1, launcher="local", enable_prefix_caching=False) as llm:
        together = answers(llm.generate(prompts, params, use_tqdm=False))
        for index in (0, 7, 20):  # alone, they are the same
            assert answers(llm.generate(prompts[index], params[index], use_tqdm=False)) == [together[index]], SEED
    yield together


@pytest.mark.ranks
@pytest.mark.parametrize(
    "settings",
    [
        {"ranks": 2, "enable_chunked_prefill": False},
        {"ranks": 4, "num_kv_blocks": 16, "max_model_len": 256},  # few: sequences wait and are preempted
        pytest.param({"ranks": 8, "max_num_batched_tokens": 64, "max_num_seqs": 5}, marks=pytest.mark.slow),
    ],
    ids=["2-whole-prefill", "4-few-blocks", "8-small-chunks"],
)
def test_local(settings: dict[str, Any], reference: Answers) -> None:
    prompts, params = batch()
    with LLM(launcher="local", **settings) as llm:
        for _ in range(2):  # the second time, prefixes come from the cache
            assert answers(llm.generate(prompts, params, use_tqdm=False)) == reference, SEED
        assert idle_ranks(llm) == [], "a rank computed nothing"


@pytest.mark.ray
@pytest.mark.parametrize("ranks", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_ray(ranks: int, reference: Answers) -> None:
    prompts, params = batch()
    with LLM(launcher="ray", ranks=ranks) as llm:
        assert answers(llm.generate(prompts, params, use_tqdm=False)) == reference, SEED
