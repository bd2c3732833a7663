"""ServerCore: choices wait for the first one to compute their prompt; prompt logprobs arrive once and in order."""

from __future__ import annotations

import dataclasses

import pytest
from ranks_by_hand import FACTS, STATS, Hand, deal

from switchgear_runtime.errors import RankFailed, RequestError
from switchgear_runtime.messages import PromptLogprobs, Rejected, StepFrame
from switchgear_runtime.sampling_params import SamplingParams

LONG = list(range(100, 140))


def start(hand: Hand, prompt: list[int], **params: object) -> str:
    settings = SamplingParams(max_tokens=4, **params)  # type: ignore[arg-type]
    return hand.core.submit([prompt], settings, sink=hand.events.append).request_id


def score(hand: Hand, sequence_id: int, start: int, logprobs: list[float], incarnation: int = 1) -> None:
    part = PromptLogprobs(sequence_id, incarnation, start, logprobs, [[] for _ in logprobs])
    rank = hand.submitted[sequence_id][0]
    frame = StepFrame(rank=rank, generation=1, step=1, tokens=[], stats=STATS, prompt_logprobs=[part])
    hand.core.on_message(rank, frame)


def test_others_start_after_the_first_token_on_the_same_rank() -> None:
    hand = deal(num_ranks=3)
    start(hand, LONG, n=3)
    assert list(hand.submitted) == [0]
    hand.play(0, [7])
    assert {rank for rank, _ in hand.submitted.values()} == {hand.submitted[0][0]}
    assert list(hand.submitted) == [0, 1, 2]
    seeds = {message.sampling.seed for _, message in hand.submitted.values()}
    assert len(seeds) == 3
    for sequence_id, first in ((0, 1), (1, 0), (2, 0)):
        hand.play(sequence_id, [8] * (4 - first), "length", start=first)
    assert len(hand.finishes()) == 3
    assert hand.core.num_live == 0


def test_a_short_prompt_or_no_cache_spreads_at_once() -> None:
    hand = deal(num_ranks=3)
    start(hand, [5] * 16, n=3)
    assert {rank for rank, _ in hand.submitted.values()} == {0, 1, 2}
    hand = deal(num_ranks=3, facts=dataclasses.replace(FACTS, prefix_caching=False))
    start(hand, LONG, n=3)
    assert len(hand.submitted) == 3


@pytest.mark.parametrize("end", ["abort", "rejected", "all"])
def test_each_choice_ends_once_whatever_becomes_of_the_first(end: str) -> None:
    hand = deal()
    request_id = start(hand, LONG, n=3)
    rank = hand.submitted[0][0]
    if end == "abort":
        hand.core.abort(request_id)
    elif end == "all":
        hand.core.fail_all("no rank left")
    else:
        for sequence_id in (0, 1, 2):
            hand.core.on_message(rank, Rejected(sequence_id, 1, "too long"))
    finishes = [event.finish for event in hand.finishes()]
    assert len(finishes) == 3
    assert hand.core.num_live == 0
    if end in ("abort", "all"):
        assert list(hand.submitted) == [0], "nothing may be started that has ended"
    kinds = {"rejected": RequestError, "all": RankFailed}
    for finish in finishes:
        assert finish is not None
        assert isinstance(finish.error, kinds[end]) if end in kinds else finish.reason == "abort"


def test_prompt_logprobs_come_once_whole_before_the_first_token() -> None:
    hand = deal()
    prompt = [5, 6, 7, 8, 9]
    start(hand, prompt, n=2, prompt_logprobs=0)
    assert hand.submitted[0][1].sampling.prompt_logprobs == 0
    score(hand, 0, 1, [-1.0, -2.0])
    score(hand, 0, 1, [-1.0], incarnation=9)  # of another life
    score(hand, 0, 1, [-1.0, -2.0, -3.0])  # computed again, and one more
    assert not hand.events
    score(hand, 0, 4, [-4.0])
    hand.play(0, [20, 21])
    first = hand.events[0]
    assert first.prompt_logprobs is not None and first.token_ids == []
    assert [(one.token_id, one.logprob) for one in first.prompt_logprobs] == [
        (6, -1.0),
        (7, -2.0),
        (8, -3.0),
        (9, -4.0),
    ]
    assert all(event.prompt_logprobs is None for event in hand.events[1:])
    assert hand.submitted[1][1].sampling.prompt_logprobs is None, "the choices have one prompt"
    moved = hand.core._sequences[0].submit()
    assert moved.sampling.prompt_logprobs is None, "another rank need not score the prompt again"


def test_a_prompt_of_one_token_has_an_empty_list() -> None:
    hand = deal()
    start(hand, [5], prompt_logprobs=3)
    hand.play(0, [20])
    assert hand.events[0].prompt_logprobs == []
