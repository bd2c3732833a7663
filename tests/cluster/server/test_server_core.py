"""ServerCore with the ranks played by hand: what is accepted, what each token does, and how sequences end."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from typing import Any

import pytest
from ranks_by_hand import FACTS, STATS, Hand, deal

from switchgear.server.limits import ServerLimits
from switchgear_runtime.errors import RankFailed, RequestError
from switchgear_runtime.messages import Hello, Rejected, StepFrame, TokenOutput
from switchgear_runtime.sampling_params import SamplingParams


def start(hand: Hand, prompts: object, **params: Any) -> str:
    params.setdefault("max_tokens", 20)
    return hand.core.submit(prompts, SamplingParams(**params), sink=hand.events.append).request_id


def ids(hand: Hand, text: str) -> list[int]:
    assert hand.core.tokenizer is not None
    return hand.core.tokenizer.encode(text)


# --- what is accepted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "count"),
    [("hello", 1), (["a", "b"], 2), ([5, 6, 7], 1), ([[5], [6, 7]], 2), (["a", [6, 7]], 2), (("a", "b"), 2)],
)
def test_prompt_types(prompts: object, count: int) -> None:
    hand = deal()
    start(hand, prompts)
    assert len(hand.submitted) == count


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (None, "null"),
        (3, "an integer"),
        ({"a": 1}, "an object"),
        ([], "empty array"),
        ("", "is empty"),
        ([[]], "is empty"),
        ([1, "a"], "mixes token ids with a string"),
        ([1, True], "a boolean"),
        ([[1, 2.5]], "a number"),
        (["a", None], r"prompt\[1\] is null"),
        ([4096], "4096; ids go from 0 to 4095"),
        ([-1], "token id -1"),
        ("\ud800", "not valid Unicode"),
    ],
)
def test_bad_prompts_name_the_fault(prompts: object, words: str) -> None:
    hand = deal()
    with pytest.raises(RequestError, match=words) as caught:
        start(hand, prompts)
    assert (caught.value.param, caught.value.status) == ("prompt", 400)
    assert hand.sent == []
    assert hand.core.num_live == 0


def test_too_long_says_how_long() -> None:
    hand = deal()
    with pytest.raises(RequestError, match=r"is 2048 tokens\. However, you requested 2058 tokens "):
        start(hand, [5] * 2000, max_tokens=58)
    with pytest.raises(RequestError, match=r"2049 tokens \(2048 in the prompt, 1 in the completion"):
        start(hand, [5] * 2048, max_tokens=None)
    start(hand, [5] * 2000, max_tokens=48)
    start(hand, [5] * 2047, max_tokens=None)
    assert hand.submitted[1][1].sampling.max_tokens == 1


def test_a_huge_text_is_refused_without_tokenizing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hand = deal()
    assert hand.core.tokenizer is not None
    monkeypatch.setattr(type(hand.core.tokenizer), "encode", lambda *_: pytest.fail("tokenized"))
    with pytest.raises(RequestError, match="at least"):
        start(hand, "x" * 5_000_000)


def test_limits_come_before_expansion() -> None:
    hand = deal(limits=ServerLimits(max_prompts_per_request=3, max_queued=8))
    with pytest.raises(RequestError, match="4 prompts; the limit is 3"):
        start(hand, ["a"] * 4)
    with pytest.raises(RequestError, match="9 sequences; the limit is 8"):
        start(hand, ["a"] * 3, n=3)
    start(hand, ["a"] * 3, n=2)
    with pytest.raises(RequestError, match="queue is full") as caught:
        start(hand, ["a"] * 3)
    assert caught.value.status == 429
    assert hand.core.num_live == 6
    with pytest.raises(RequestError, match="logit_bias names token 5000"):
        start(hand, "a", logit_bias={5000: 1.0})
    with pytest.raises(RequestError, match="2 sampling parameters came for 1 prompts"):
        hand.core.submit("a", [SamplingParams(), SamplingParams()], sink=hand.events.append)


def test_not_ready_is_503() -> None:
    hand = deal()
    hand.core.set_ready(None)
    with pytest.raises(RequestError, match="not ready") as caught:
        start(hand, "a")
    assert caught.value.status == 503
    hand.core.set_ready([1])
    start(hand, "a")
    assert hand.submitted[0][0] == 1
    hand.core.draining = True
    with pytest.raises(RequestError, match="shutting down"):
        start(hand, "a")


def test_a_rank_with_a_smaller_cache_lowers_the_limit() -> None:
    hand = deal()
    hello = Hello(
        rank=0, pid=1, fingerprint="", num_kv_blocks=4, block_size=16, max_model_len=64, num_layers=2, num_experts=3
    )
    hand.core.on_message(0, hello)
    with pytest.raises(RequestError, match="maximum context length is 64"):
        start(hand, [5] * 64)


# --- how it is expanded -------------------------------------------------------------------------------------------


def test_seeds_depend_on_the_request_alone() -> None:
    hand = deal()
    start(hand, ["a", "b"], n=3, seed=11)
    seeds = [submit.sampling.seed for _, submit in hand.submitted.values()]
    assert seeds[:3] == seeds[3:]
    assert seeds[0] == 11
    assert len(set(seeds)) == 3
    start(hand, ["a", "a"], seed=-1)
    assert hand.submitted[6][1].sampling.seed == (1 << 64) - 1


def test_an_absent_seed_is_drawn_per_prompt_and_returned() -> None:
    hand = deal()
    start(hand, ["a", "a"])
    hand.play(0, [5], "length")
    hand.play(1, [5], "length")
    returned = [event.finish.seed for event in hand.finishes() if event.finish]
    assert returned == [submit.sampling.seed for _, submit in hand.submitted.values()]
    assert returned[0] != returned[1]
    assert max(returned) < 1 << 53


def test_end_of_sequence_stops_unless_ignored() -> None:
    hand = deal()
    start(hand, "a", stop_token_ids=[9, 4])
    start(hand, "a", stop_token_ids=[9, 1 << 31], ignore_eos=True, top_k=1 << 31)
    assert hand.submitted[0][1].sampling.stop_token_ids == (0, 4, 9)
    assert hand.submitted[1][1].sampling.stop_token_ids == (9,)  # no token of the model has the other id
    assert hand.submitted[1][1].sampling.top_k == 0


@pytest.mark.parametrize("seed", range(10))
def test_a_batch_spreads_evenly_over_ranks(seed: int) -> None:
    draw = random.Random(seed)
    num_ranks = draw.randint(1, 8)
    hand = deal(num_ranks)
    length = draw.randint(1, 200)
    start(hand, [[5] * length for _ in range(draw.randint(1, 64))], n=draw.randint(1, 3))
    counts = Counter(rank for rank, _ in hand.submitted.values())
    assert max(counts.values()) - min(counts.get(rank, 0) for rank in range(num_ranks)) <= 1, f"seed {seed}"


def test_a_long_prompt_counts_for_more_than_a_short_one() -> None:
    hand = deal(2)
    for rank in (0, 1):
        hand.core.ranks[rank].num_kv_tokens = 4096
    start(hand, [[5] * 2000, [5], [5], [5]])
    assert [rank for rank, _ in hand.submitted.values()] == [0, 1, 1, 1]


def test_the_ledger_is_empty_when_all_have_ended() -> None:
    hand = deal(2)
    request_id = start(hand, ["a", "b", "c"], n=2)
    hand.play(0, ids(hand, " one two"), "length")
    hand.core.abort(request_id)
    assert [(state.num_sequences, state.num_tokens) for state in hand.core.ranks.states()] == [(0, 0), (0, 0)]
    assert hand.core.num_live == 0
    assert sorted(hand.aborted) == [1, 2, 3, 4, 5]
    assert Counter(event.finish.reason for event in hand.finishes() if event.finish) == {"length": 1, "abort": 5}
    hand.core.abort(request_id)
    assert len(hand.finishes()) == 6


# --- tokens -------------------------------------------------------------------------------------------------------


def test_text_and_finish() -> None:
    hand = deal()
    start(hand, "a")
    rank, submit = hand.submitted[0]
    tokens = ids(hand, " one two three")
    hand.frame(rank, TokenOutput(0, 1, 0, tokens[0], None, -0.5, [(tokens[0], -0.5), (7, -1.5)], 16))
    hand.play(0, tokens[1:], "length", start=1)
    assert hand.text() == " one two three"
    assert [i for event in hand.events for i in event.token_ids] == tokens
    first = hand.events[0].logprobs
    assert first is not None
    assert first[0].top == [(tokens[0], -0.5), (7, -1.5)]
    finish = hand.events[-1].finish
    assert finish is not None
    assert (finish.reason, finish.num_output_tokens, finish.num_cached_tokens) == ("length", len(tokens), 16)
    assert finish.num_prompt_tokens == len(submit.prompt_token_ids)


def test_only_the_next_token_of_the_current_owner_counts() -> None:
    hand = deal(2)
    start(hand, "a")
    rank, _ = hand.submitted[0]
    token = TokenOutput(0, 1, 0, 5)
    hand.frame(1 - rank, token)  # another rank
    hand.frame(rank, TokenOutput(0, 2, 0, 5))  # another incarnation
    hand.frame(rank, TokenOutput(0, 1, 1, 5))  # a gap
    assert hand.events == []
    hand.frame(rank, token)
    hand.frame(rank, token)  # a duplicate
    assert len(hand.events) == 1
    hand.frame(rank, TokenOutput(0, 1, 1, 5, "length"))
    hand.frame(rank, TokenOutput(0, 1, 2, 5, "length"))  # after the end
    assert len(hand.events) == 2
    assert hand.core.num_discarded_tokens == 5


def test_a_stop_string_ends_the_sequence_on_its_rank_too() -> None:
    hand = deal()
    start(hand, "a", stop=["two th"])
    hand.play(0, ids(hand, " one two three four"))
    assert hand.text() == " one "
    assert hand.aborted == [0]
    finish = hand.events[-1].finish
    assert finish is not None
    assert (finish.reason, finish.stop_reason) == ("stop", "two th")


def test_a_stop_string_may_be_included() -> None:
    hand = deal()
    start(hand, "a", stop="two th", include_stop_str_in_output=True)
    hand.play(0, ids(hand, " one two three four"))
    assert hand.text() == " one two th"


def test_a_stop_string_waits_for_min_tokens() -> None:
    hand = deal()
    start(hand, "a", stop=[" a"], min_tokens=3)
    hand.play(0, ids(hand, " a") * 5)
    assert hand.text() == " a a a"


def test_text_held_back_for_a_stop_string_comes_at_the_end() -> None:
    hand = deal()
    start(hand, "a", stop=["two thunder"])
    hand.play(0, ids(hand, " one two th"), "length")
    assert hand.text() == " one two th"
    assert hand.aborted == []


def test_a_stop_token_shows_only_on_demand() -> None:
    hand = deal()
    word = ids(hand, " two")
    assert len(word) == 1
    start(hand, "a", stop_token_ids=word)
    start(hand, "b", stop_token_ids=word, include_stop_str_in_output=True)
    hand.play(0, ids(hand, " one") + word, "stop")
    hand.play(1, ids(hand, " one") + word, "stop")
    assert hand.text() == " one one two"
    assert [event.finish.stop_reason for event in hand.finishes() if event.finish] == [word[0], word[0]]
    start(hand, "c")
    hand.play(2, [*word, 0], "stop")
    assert hand.finishes()[-1].finish.stop_reason is None  # type: ignore[union-attr]


# --- faults -------------------------------------------------------------------------------------------------------


def test_a_rejected_sequence_is_the_users_to_fix() -> None:
    hand = deal()
    start(hand, "a")
    rank, _ = hand.submitted[0]
    hand.core.on_message(rank, Rejected(0, 9, "another life"))
    assert hand.core.num_live == 1
    hand.core.on_message(rank, Rejected(0, 1, "it would never fit"))
    finish = hand.events[-1].finish
    assert finish is not None
    assert isinstance(finish.error, RequestError)
    assert str(finish.error) == "it would never fit"


def test_without_any_rank_every_sequence_ends() -> None:
    hand = deal(2)
    start(hand, ["a", "b", "c", "d"])
    hand.core.fail_all("the generation broke")
    assert hand.core.num_live == 0
    assert len(hand.finishes()) == 4
    assert all(isinstance(event.finish.error, RankFailed) for event in hand.finishes() if event.finish)


def test_expert_load_is_summed() -> None:
    hand = deal(2)
    for rank in (0, 1, 1):
        hand.core.on_message(
            rank,
            StepFrame(
                rank=rank,
                generation=1,
                step=1,
                tokens=[],
                stats=STATS,
                expert_load=[1, 2, 3, 4, 5, 6],
                expert_rows=[rank] * 6,
            ),
        )
    assert hand.core.load.routed() == [[3, 6, 9], [12, 15, 18]]
    assert hand.core.load.rows() == [[[0] * 3] * 2, [[2] * 3] * 2]


def test_a_checkpoint_without_tokenizer_serves_token_ids() -> None:
    hand = deal()
    core = type(hand.core)(
        system=hand.clock, tokenizer=None, facts=dataclasses.replace(FACTS), send=lambda *sent: hand.sent.append(sent)
    )
    core.set_ready([0])
    hand.core = core
    with pytest.raises(RequestError, match="no tokenizer"):
        start(hand, "text")
    start(hand, [5, 6])
    hand.play(0, [7, 8], "length")
    assert hand.text() == ""
    assert [i for event in hand.events for i in event.token_ids] == [7, 8]
