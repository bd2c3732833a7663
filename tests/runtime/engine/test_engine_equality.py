"""The signature: tokens and logprobs are, bit for bit, those of one rank serving the request alone.

World sizes, batch mates, chunked prefill, prefix cache, preemption, greedy and sampled; then a property test that draws
everything. The model is real (2 layers, 8 experts, random), the ranks are threads over a LoopbackHub.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduling import make_submit
from tiny_cluster import EOS, VOCAB_SIZE, Alone, ClusterRun, content, make_tiny_checkpoint, run_cluster

from switchgear_runtime.messages import Submit

MODES = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.9},
    "top_k": {"temperature": 1.2, "top_k": 7},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "min_p": {"temperature": 1.5, "min_p": 0.05, "top_k": -1},
    "penalties": {"temperature": 0.7, "presence_penalty": 0.6, "frequency_penalty": 0.4, "repetition_penalty": 1.3},
    "greedy penalties": {"temperature": 0.0, "repetition_penalty": 1.5, "frequency_penalty": 1.0},
    "bias": {"temperature": 0.8, "logit_bias": {3: 4.0, 9: -100.0}, "stop_token_ids": (3, EOS), "min_tokens": 6},
}
Lab = tuple[Path, Alone]


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    seed = random.randrange(1 << 20)  # in the directory's name, which every failure shows
    model_dir = make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed, dtype=request.param)
    return model_dir, Alone(model_dir)


def draw_submits(rng: random.Random, count: int, *, longest: int = 60) -> list[Submit]:
    """Requests of all modes; about half begin with a common text, so that the prefix cache has hits."""
    common = [rng.randrange(1, VOCAB_SIZE) for _ in range(longest)]
    submits = []
    for sequence_id in range(count):
        prompt = common[: rng.randrange(longest)] if rng.random() < 0.5 else []
        prompt += [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, longest))]
        mode = rng.choice(list(MODES))
        sampling = {"stop_token_ids": (EOS,), "max_tokens": rng.randrange(1, 24), "seed": rng.getrandbits(64)} | MODES[
            mode
        ]
        sampling["max_tokens"] = max(sampling["max_tokens"], sampling.get("min_tokens", 0))
        logprobs = rng.choice([None, 0, 1, 5])
        submits.append(make_submit(sequence_id, prompt, logprobs=logprobs, **sampling))
    return submits


def assert_as_alone(lab: Lab, submits: list[Submit], run: ClusterRun) -> None:
    for submit in submits:
        expected = content(lab[1].outputs(submit))
        assert content(run.outputs[submit.sequence_id]) == expected, f"model {lab[0].name}, {submit}"


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_on_four_ranks(lab: Lab, mode: str) -> None:
    rng = random.Random(f"{lab[0].name} {mode}")
    submits = [
        make_submit(
            sequence_id,
            [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 50))],
            max_tokens=16,
            logprobs=3,
            seed=rng.getrandbits(64),
            **MODES[mode],
        )
        for sequence_id in range(6)
    ]
    assert_as_alone(lab, submits, run_cluster(lab[0], 4, submits))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_any_number_of_ranks_among_32_mates(lab: Lab, world_size: int) -> None:
    submits = draw_submits(random.Random(f"{lab[0].name} {world_size}"), 33)
    run = run_cluster(lab[0], world_size, submits)
    assert_as_alone(lab, submits, run)
    assert run.expert_load == run.expert_rows > 0


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize("enable_chunked_prefill", [True, False])
def test_chunked_prefill_and_prefix_cache(
    lab: Lab, world_size: int, enable_prefix_caching: bool, enable_chunked_prefill: bool
) -> None:
    submits = draw_submits(random.Random(f"{lab[0].name} {world_size}"), 24)
    run = run_cluster(
        lab[0],
        world_size,
        submits,
        max_num_seqs=8,
        max_num_batched_tokens=24 if enable_chunked_prefill else 128,
        enable_prefix_caching=enable_prefix_caching,
        enable_chunked_prefill=enable_chunked_prefill,
    )
    assert_as_alone(lab, submits, run)
    num_hits = sum(stats.prefix_cache_hit_tokens for stats in run.stats.values())
    if not enable_prefix_caching:
        assert num_hits == 0
    elif world_size == 1:  # with more ranks, those that share a beginning may never meet
        assert num_hits > 0


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_forced_preemption(lab: Lab, world_size: int, enable_prefix_caching: bool) -> None:
    rng = random.Random(lab[0].name)
    submits = [
        make_submit(
            sequence_id,
            [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(12, 17))],
            max_tokens=40,
            seed=sequence_id,
            logprobs=1,
            **MODES[rng.choice(["greedy", "top_p", "penalties"])],
        )
        for sequence_id in range(4 * world_size)
    ]
    run = run_cluster(
        lab[0], world_size, submits, num_kv_blocks=9, max_model_len=64, enable_prefix_caching=enable_prefix_caching
    )
    assert_as_alone(lab, submits, run)
    assert all(stats.num_preemptions > 0 for stats in run.stats.values())


def test_going_on_from_another_life(lab: Lab) -> None:
    """A sequence handed over with its first outputs goes on with the very tokens that would have followed."""
    rng = random.Random(lab[0].name)
    first = draw_submits(rng, 12)
    handed_over = []
    for submit in first:
        token_ids = [output.token_id for output in lab[1].outputs(submit)]
        num_kept = rng.randrange(len(token_ids))
        handed_over.append(
            Submit(
                sequence_id=submit.sequence_id,
                incarnation=2,
                prompt_token_ids=submit.prompt_token_ids,
                output_token_ids=token_ids[:num_kept],
                sampling=submit.sampling,
            )
        )
    run = run_cluster(lab[0], 2, handed_over)
    for submit, again in zip(first, handed_over, strict=True):
        expected = content(lab[1].outputs(submit))[len(again.output_token_ids) :]
        assert content(run.outputs[submit.sequence_id]) == expected


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 1 << 32),
    world_size=st.sampled_from([1, 2, 3, 4, 5, 8]),
    count=st.integers(1, 20),
    max_num_seqs=st.integers(1, 8),
    spare_budget=st.integers(0, 64),
    block_size=st.sampled_from([16, 32, 48]),
    scarce=st.booleans(),
    enable_prefix_caching=st.booleans(),
    enable_chunked_prefill=st.booleans(),
)
def test_any_configuration(
    lab: Lab,
    seed: int,
    world_size: int,
    count: int,
    max_num_seqs: int,
    spare_budget: int,
    block_size: int,
    scarce: bool,
    enable_prefix_caching: bool,
    enable_chunked_prefill: bool,
) -> None:
    submits = draw_submits(random.Random(seed), count, longest=40)
    budget = max_num_seqs + spare_budget
    run = run_cluster(
        lab[0],
        world_size,
        submits,
        max_model_len=112,
        block_size=block_size,
        num_kv_blocks=(112 if scarce else 448) // block_size + 1,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget if enable_chunked_prefill else max(budget, 80),
        enable_prefix_caching=enable_prefix_caching,
        enable_chunked_prefill=enable_chunked_prefill,
    )
    assert not run.rejected
    assert_as_alone(lab, submits, run)
