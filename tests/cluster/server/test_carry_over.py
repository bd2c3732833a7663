"""ServerCore: what a dead or leaving rank held goes on with another one, from prompt and emitted tokens, at its index."""

from __future__ import annotations

import dataclasses
import random

import pytest
from ranks_by_hand import FACTS, STATS, Hand, deal
from toy_server import ToyRank, toy_tokens

from switchgear.server.core import ServerCore
from switchgear.server.events import SequenceEvent
from switchgear.server.live_sequence import DEATHS_MAX
from switchgear_runtime.errors import RankFailed
from switchgear_runtime.messages import Hello, Parked, PromptLogprobs, StepFrame, TokenOutput
from switchgear_runtime.sampling_params import SamplingParams
from switchgear_runtime.system import RealSystem

LONG = list(range(100, 140))


def start(hand: Hand, prompts: list[list[int]], **params: object) -> str:
    settings = SamplingParams(max_tokens=20, **params)  # type: ignore[arg-type]
    return hand.core.submit(prompts, settings, sink=hand.events.append).request_id


def token_ids(hand: Hand, prompt_index: int = 0, index: int = 0) -> list[int]:
    chosen = [event for event in hand.events if (event.prompt_index, event.index) == (prompt_index, index)]
    return [token_id for event in chosen for token_id in event.token_ids]


def die(hand: Hand, rank: int) -> None:
    hand.core.set_ready(None)
    hand.core.lose_rank(rank, f"rank {rank} was killed by SIGKILL")


def test_a_dead_ranks_sequence_goes_on_at_the_next_index() -> None:
    hand = deal(2)
    start(hand, [[5, 6]])
    rank, first = hand.submitted[0]
    hand.play(0, [10, 11])
    die(hand, rank)
    hand.frame(rank, TokenOutput(0, 1, 2, 99))  # was on its way
    assert hand.core.num_discarded_tokens == 1
    hand.core.set_ready([1 - rank], generation=2)
    other, second = hand.submitted[0]
    assert other == 1 - rank
    assert (second.prompt_token_ids, second.output_token_ids) == ([5, 6], [10, 11])
    assert (second.incarnation, second.sampling) == (2, first.sampling)
    hand.frame(rank, TokenOutput(0, 1, 2, 99))
    hand.play(0, [12, 13], "length", start=2)
    assert token_ids(hand) == [10, 11, 12, 13]
    (end,) = hand.finishes()
    assert end.finish is not None
    assert (end.finish.reason, end.finish.num_output_tokens) == ("length", 4)
    assert [(s.num_sequences, s.num_tokens, s.num_unanswered_bytes) for s in hand.core.ranks.states()] == [
        (0, 0, 0)
    ] * 2


def test_survivors_keep_theirs() -> None:
    hand = deal(2)
    start(hand, [[5], [6], [7], [8]])
    owners = {sequence_id: rank for sequence_id, (rank, _) in hand.submitted.items()}
    num_sent = len(hand.sent)
    die(hand, 1)
    hand.core.set_ready([0, 1], generation=2)
    moved = {message.sequence_id for _, message in hand.sent[num_sent:]}  # type: ignore[union-attr]
    assert moved == {sequence_id for sequence_id, rank in owners.items() if rank == 1}
    assert hand.core.num_carried == 2


def test_stop_strings_and_text_go_on_across_the_move() -> None:
    hand = deal(2)
    assert hand.core.tokenizer is not None
    start(hand, [[5]], stop=["two th"])
    ids = hand.core.tokenizer.encode(" one two three four")
    hand.play(0, ids[:2])
    die(hand, hand.submitted[0][0])
    hand.core.set_ready([0, 1], generation=2)
    hand.play(0, ids[2:], start=2)
    assert hand.text() == " one "
    assert hand.finishes()[0].finish.stop_reason == "two th"  # type: ignore[union-attr]


def test_choices_that_wait_for_the_first_come_along_and_started_ones_go_alone() -> None:
    hand = deal(3)
    start(hand, [LONG], n=3)
    rank = hand.submitted[0][0]
    hand.core.vacate([rank])
    assert hand.aborted == [0]
    assert list(hand.submitted) == [0], "the others still wait for the first"
    second = hand.submitted[0][0]
    assert second != rank
    hand.play(0, [7])
    assert {owner for owner, _ in hand.submitted.values()} == {second}
    assert [submit.incarnation for _, submit in hand.submitted.values()] == [2, 1, 1]
    hand.core.vacate([second])
    (third,) = {0, 1, 2} - {rank, second}
    assert {owner for owner, _ in hand.submitted.values()} == {third}
    assert [submit.incarnation for _, submit in hand.submitted.values()] == [3, 2, 2]
    assert [submit.output_token_ids for _, submit in hand.submitted.values()] == [[7], [], []]
    for sequence_id, first in ((0, 1), (1, 0), (2, 0)):
        hand.play(sequence_id, [8] * (4 - first), "length", start=first)
    assert len(hand.finishes()) == 3
    assert hand.core.num_live == 0


def test_what_has_no_rank_yet_can_be_aborted() -> None:
    hand = deal(2)
    request_id = start(hand, [LONG], n=3)
    die(hand, hand.submitted[0][0])
    assert len(hand.core.waiting) == 3
    hand.core.abort(request_id)
    assert (len(hand.finishes()), hand.aborted, len(hand.core.waiting), hand.core.num_live) == (3, [], 0, 0)


def test_prompt_logprobs_of_two_lives_make_one_list() -> None:
    hand = deal(2)
    start(hand, [[5, 6, 7, 8]], prompt_logprobs=0)

    def score(start: int, logprobs: list[float]) -> None:
        rank, submit = hand.submitted[0]
        part = PromptLogprobs(0, submit.incarnation, start, logprobs, [[] for _ in logprobs])
        frame = StepFrame(rank=rank, generation=1, step=1, tokens=[], stats=STATS, prompt_logprobs=[part])
        hand.core.on_message(rank, frame)

    score(1, [-1.0, -2.0])
    die(hand, hand.submitted[0][0])
    hand.core.set_ready([0, 1], generation=2)
    assert hand.submitted[0][1].sampling.prompt_logprobs == 0, "not all came"
    score(1, [-1.0, -2.0, -3.0])
    hand.play(0, [20])
    assert [one.logprob for one in hand.events[0].prompt_logprobs or ()] == [-1.0, -2.0, -3.0]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("seed", range(10))
def test_a_sequence_that_kills_every_rank_takes_none_of_the_others_along(seed: int, num_ranks: int) -> None:
    """Toy ranks that die in the step in which they hold it."""
    draw = random.Random(seed)
    ranks = [ToyRank(rank) for rank in range(num_ranks)]
    facts = dataclasses.replace(FACTS, max_num_seqs=draw.randint(2, 6))
    core = ServerCore(
        system=RealSystem(seed=seed),
        tokenizer=None,
        facts=facts,
        send=lambda rank, message: ranks[rank].receive(message),
    )
    core.set_ready(range(num_ranks))
    events: list[SequenceEvent] = []
    num_prompts, poison = 30, draw.randrange(30)
    prompts = [[1000 + i] * draw.choice([1, 40]) for i in range(num_prompts)]
    params = SamplingParams(n=draw.choice([1, 2]), max_tokens=6, seed=3)
    core.submit(prompts, params, sink=events.append)
    num_deaths = 0
    for _ in range(500):
        for rank in ranks:
            if any(submit.prompt_token_ids[0] == 1000 + poison for submit, _ in rank.held.values()):
                rank.held.clear()
                core.set_ready(None)
                core.lose_rank(rank.rank, "killed")
                core.set_ready(range(num_ranks))
                num_deaths += 1
            else:
                core.on_message(rank.rank, rank.step())
    assert core.num_live == 0, f"seed {seed}"
    failed = {event.prompt_index for event in events if event.finish is not None and event.finish.reason == "error"}
    assert failed == {poison}, f"seed {seed}"
    assert num_deaths <= DEATHS_MAX * params.n
    assert sum(event.finish is not None for event in events) == num_prompts * params.n
    for index, prompt in enumerate(prompts):
        got = [i for event in events if (event.prompt_index, event.index) == (index, 0) for i in event.token_ids]
        assert got == ([] if index == poison else toy_tokens(prompt, 3, 6)), f"seed {seed}"
    assert all(state.suspect is None for state in core.ranks.states())


@pytest.mark.parametrize("num_choices", [1, 3])
def test_what_ranks_die_under_without_a_token_ends_with_an_error(num_choices: int) -> None:
    hand = deal(2)
    start(hand, [LONG], n=num_choices)
    for i in range(DEATHS_MAX):
        assert not hand.finishes()
        if i == 1:
            hand.play(0, [7])  # a token: from here on they count anew
        die(hand, hand.submitted[0][0])
        hand.core.set_ready([0, 1], generation=i + 2)
    for _ in range(DEATHS_MAX):
        if hand.core.num_live:
            for rank in (0, 1):
                die(hand, rank)
            hand.core.set_ready([0, 1])
    assert hand.core.num_live == 0
    assert len(hand.finishes()) == num_choices
    for event in hand.finishes():
        assert event.finish is not None
        assert isinstance(event.finish.error, RankFailed)
        assert "no rank has survived this sequence" in str(event.finish.error)
    assert [(state.num_sequences, state.num_tokens) for state in hand.core.ranks.states()] == [(0, 0), (0, 0)]


def test_the_last_frames_of_a_rank_that_was_forgotten_bring_it_not_back() -> None:
    hand = deal(2)
    hand.core.vacate([1])
    hand.core.ranks.forget(1)
    hand.frame(1)
    hand.core.on_message(1, Parked(1, 1, 3))
    assert [state.rank for state in hand.core.ranks.states()] == [0]


def test_a_sequence_keeps_the_model_version_it_began_with() -> None:
    hand = deal(2)
    assert hand.core.oldest_version == 0
    start(hand, [[5, 6]])
    hand.core.model_version = 3
    start(hand, [[5, 6], [7]])
    assert [hand.submitted[index][1].version for index in range(3)] == [0, 3, 3]
    assert hand.core.oldest_version == 0
    rank, _ = hand.submitted[0]
    hand.play(0, [10])
    hand.core.model_version = 4
    die(hand, rank)
    hand.core.set_ready([1 - rank], generation=2)
    _, again = hand.submitted[0]
    assert (again.incarnation, again.version) == (2, 0)
    hand.play(0, [11], "length", start=1)
    assert hand.core.oldest_version == 3
    for index in (1, 2):
        hand.play(index, [12], "length")
    assert hand.core.oldest_version == 4


def test_the_system_fingerprint_tells_the_model_version() -> None:
    hand = deal(1)
    hello = Hello(
        rank=0,
        pid=1,
        fingerprint="numbers",
        num_kv_blocks=9,
        block_size=16,
        max_model_len=99,
        num_layers=2,
        num_experts=3,
    )
    hand.core.on_message(0, hello)
    before = hand.core.system_fingerprint
    assert before is not None
    hand.core.model_version = 2
    assert hand.core.system_fingerprint == f"{before}_v2"
