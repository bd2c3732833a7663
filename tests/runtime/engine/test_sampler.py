"""The sampler's arrays: each sequence's parameters reach its own row, whoever shares the batch."""

from __future__ import annotations

import random

import pytest
import torch
from scheduling import make_sequence

from switchgear_runtime.batch import Batch, ScheduledSequence
from switchgear_runtime.sampler import Sampler
from switchgear_runtime.sequence import Sequence

VOCAB_SIZE = 50


def batch_of(sequences: list[Sequence], *, mates: bool = False) -> Batch:
    entries = []
    for sequence in sequences:
        if mates:  # one that is in mid-prefill and samples nothing
            entries.append(ScheduledSequence(make_sequence(99, [1, 2, 3]), 0, 2, False))
        entries.append(ScheduledSequence(sequence, 0, sequence.num_tokens, True))
    return Batch(tuple(entries))


def draw_sequence(rng: random.Random, sequence_id: int) -> Sequence:
    return make_sequence(
        sequence_id,
        [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 9))],
        outputs=[rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(5))],
        max_tokens=20,
        temperature=rng.choice([0.0, 0.7, 1.5]),
        top_k=rng.choice([-1, 0, 1, 5, 1 << 31]),
        top_p=rng.choice([1.0, 0.5]),
        min_p=rng.choice([0.0, 0.1]),
        presence_penalty=rng.choice([0.0, 1.0]),
        frequency_penalty=rng.choice([0.0, -1.0]),
        repetition_penalty=rng.choice([1.0, 2.0]),
        logit_bias=rng.choice([{}, {3: 50.0}, {7: -100.0, 1: 2.5}]),
        stop_token_ids=(3, 4),
        min_tokens=rng.choice([0, 3, 20]),
        logprobs=rng.choice([None, 0, 2, 5]),
        seed=rng.getrandbits(64),
    )


@pytest.mark.parametrize("seed", range(10))
def test_a_row_does_not_depend_on_its_mates(seed: int) -> None:
    rng = random.Random(seed)
    sequences = [draw_sequence(rng, sequence_id) for sequence_id in range(12)]
    logits_BV = torch.randn(12, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3
    together = Sampler()(logits_BV, batch_of(sequences, mates=True))
    for row, sequence in enumerate(sequences):
        (alone,) = Sampler()(logits_BV[row : row + 1].clone(), batch_of([sequence]))
        assert alone == together[row]
        if sequence.sampling.logprobs is None:
            assert (alone.logprob, alone.top_logprobs) == (None, None)
        else:
            assert alone.logprob == pytest.approx(float(logits_BV[row].log_softmax(-1)[alone.token_id]), abs=1e-5)
            assert len(alone.top_logprobs or ()) == sequence.sampling.logprobs
        if sequence.num_output_tokens < sequence.sampling.min_tokens:
            assert alone.token_id not in (3, 4)


def test_seed_and_index_key_the_draw() -> None:
    logits_BV = torch.zeros(1, VOCAB_SIZE)

    def draw(seed: int, num_outputs: int) -> int:
        sequence = make_sequence(0, [1], outputs=[2] * num_outputs, temperature=1.0, seed=seed, max_tokens=99)
        return Sampler()(logits_BV, batch_of([sequence]))[0].token_id

    tokens = {(seed, index): draw(seed, index) for seed in (0, 1, (1 << 64) - 1) for index in range(20)}
    assert tokens == {key: draw(*key) for key in tokens}
    assert len(set(tokens.values())) > 10


def test_an_empty_batch_samples_nothing() -> None:
    assert Sampler()(torch.zeros(0, VOCAB_SIZE), Batch()) == []


@pytest.mark.parametrize("seed", range(6))
def test_a_kept_layout_changes_nothing(seed: int) -> None:
    """One sampler over many steps, whose batch stays, shrinks or grows, against a new sampler each step."""
    rng = random.Random(seed)
    plain = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "min_tokens": 0}
    sequences = [
        make_sequence(i, [1, 2], max_tokens=99, temperature=1.0, logprobs=rng.choice([None, 2]), seed=i, **plain)
        for i in range(4)
    ]
    if seed % 2:
        sequences.append(draw_sequence(rng, 4))
    sampler = Sampler()
    for step in range(12):
        members = sequences if step % 5 else rng.sample(sequences, 3)
        logits_BV = torch.randn(len(members), VOCAB_SIZE)
        drawn = sampler(logits_BV, batch_of(members))
        assert drawn == Sampler()(logits_BV, batch_of(members)), (seed, step)
        for sequence, token in zip(members, drawn, strict=True):
            sequence.token_ids.append(token.token_id)
