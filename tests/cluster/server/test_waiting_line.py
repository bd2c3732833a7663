"""ServerCore's waiting line: ranks are fed a bounded window, in order; a death or a leave sends back what they held."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from typing import Any

import pytest
from ranks_by_hand import FACTS, Hand, deal
from toy_server import ToyRank, toy_tokens

from switchgear.server.core import ServerCore
from switchgear.server.events import SequenceEvent
from switchgear.server.metrics import Metrics
from switchgear.server.rank_table import UNANSWERED_BYTES_MAX, WINDOW
from switchgear.server.waiting_line import FEED_BYTES_MAX, FEED_SEQUENCES_MAX
from switchgear_runtime.messages import Rejected, Submit
from switchgear_runtime.sampling_params import SamplingParams
from switchgear_runtime.system import RealSystem

SMALL = dataclasses.replace(FACTS, max_num_seqs=4)
WIDTH = WINDOW * 4  # places on a rank of SMALL
LONG = list(range(100, 140))


def start(hand: Hand, prompts: list[list[int]], **params: Any) -> str:
    params.setdefault("max_tokens", 20)
    return hand.core.submit(prompts, SamplingParams(**params), sink=hand.events.append).request_id


def test_a_rank_holds_a_window_and_the_rest_waits_in_order() -> None:
    hand = deal(1, facts=SMALL)
    start(hand, [[5]] * 20)
    start(hand, [[6]] * 20)
    assert list(hand.submitted) == list(range(WIDTH))
    assert (hand.core.num_live, len(hand.core.waiting)) == (40, 40 - WIDTH)
    for sequence_id in range(40):
        hand.play(sequence_id, [7], "length")
        assert list(hand.submitted) == list(range(min(40, WIDTH + sequence_id + 1)))
    assert hand.core.num_live == len(hand.core.waiting) == 0
    assert hand.core.ranks[0].num_unanswered_bytes == 0


def test_the_rank_is_chosen_when_a_place_is_free() -> None:
    hand = deal(2, facts=SMALL)
    start(hand, [[5]] * 3 * WIDTH)
    mine = [sequence_id for sequence_id, (rank, _) in hand.submitted.items() if rank == 1]
    for sequence_id in mine:
        hand.play(sequence_id, [7], "length")
    fed = [rank for sequence_id, (rank, _) in hand.submitted.items() if sequence_id >= 2 * WIDTH]
    assert fed == [1] * WIDTH


def test_what_is_unanswered_is_bounded_in_bytes() -> None:
    facts = dataclasses.replace(FACTS, max_model_len=1 << 20, max_num_seqs=1024, prefix_caching=False)
    hand = deal(1, facts=facts)
    num_ids = 1 << 18
    start(hand, [[5] * num_ids for _ in range(40)])
    assert len(hand.submitted) == 1, "what one event may send"
    for sequence_id in range(40):  # the rank reads, and answers, one after the other
        hand.play(sequence_id, [7])
        assert len(hand.submitted) * 5 * num_ids <= UNANSWERED_BYTES_MAX + (sequence_id + 2) * 6 * num_ids
    assert len(hand.submitted) == 40
    assert hand.core.ranks[0].num_unanswered_bytes == 0
    assert 5 * num_ids > FEED_BYTES_MAX


def test_one_event_feeds_a_bounded_number() -> None:
    facts = dataclasses.replace(FACTS, max_num_seqs=1024)
    hand = deal(2, facts=facts)
    start(hand, [[5]] * 1000)
    assert len(hand.submitted) == FEED_SEQUENCES_MAX
    hand.frame(0)
    assert len(hand.submitted) == 2 * FEED_SEQUENCES_MAX
    for _ in range(4):
        hand.frame(1)
    assert len(hand.submitted) == 1000


def test_all_survive_the_death_of_every_rank_in_order_of_arrival() -> None:
    hand = deal(2, facts=SMALL)
    start(hand, [[5]] * 3 * WIDTH)
    hand.core.set_ready(None)
    hand.core.lose_rank(0, "killed")
    hand.core.lose_rank(1, "killed too")
    assert len(hand.core.waiting) == hand.core.num_live == 3 * WIDTH
    assert (len(hand.submitted), hand.finishes()) == (2 * WIDTH, []), "no rank serves"
    num_sent = len(hand.sent)
    hand.core.set_ready([1], generation=2)
    for sequence_id in range(3 * WIDTH):
        assert hand.submitted[sequence_id][0] == 1
        hand.play(sequence_id, [7], "length")
    fed = [message.sequence_id for _, message in hand.sent[num_sent:] if isinstance(message, Submit)]
    assert fed == list(range(3 * WIDTH))
    assert len(hand.finishes()) == 3 * WIDTH
    assert hand.core.num_live == 0


def test_an_aborted_request_leaves_the_line_and_its_ranks() -> None:
    hand = deal(1, facts=SMALL)
    first = start(hand, [[5]] * 20)
    start(hand, [[6]] * 3)
    hand.core.abort(first)
    assert hand.aborted == list(range(WIDTH)), "a rank hears only of what it was sent"
    assert list(hand.submitted)[WIDTH:] == [20, 21, 22]
    assert len(hand.finishes()) == 20
    hand.core.abort(first)
    hand.core.abort_all()
    assert len(hand.finishes()) == 23
    assert (hand.core.num_live, len(hand.core.waiting), hand.core.ranks[0].num_sequences) == (0, 0, 0)


def test_a_rejected_sequence_and_a_drain_make_room() -> None:
    hand = deal(1, facts=SMALL)
    start(hand, [[5]] * (WIDTH + 2))
    hand.core.draining = True
    hand.core.on_message(0, Rejected(0, 1, "it would never fit"))
    assert len(hand.submitted) == WIDTH + 1
    hand.play(1, [7], "length")
    assert len(hand.submitted) == WIDTH + 2
    hand.core.fail_all("over")
    assert len(hand.finishes()) == WIDTH + 2


def test_followers_hold_places_on_their_leaders_rank() -> None:
    hand = deal(2, facts=SMALL)
    request_id = start(hand, [LONG] * 10, n=4)
    assert len(hand.submitted) == 4, "two leaders with three followers each fill a rank"
    assert len(hand.core.waiting) == 6 * 4
    hand.play(0, [7])
    assert {rank for sequence_id, (rank, _) in hand.submitted.items() if sequence_id < 4} == {hand.submitted[0][0]}
    hand.core.abort(request_id)
    assert (len(hand.finishes()), hand.core.num_live, len(hand.core.waiting)) == (40, 0, 0)
    assert [(state.num_sequences, state.num_tokens) for state in hand.core.ranks.states()] == [(0, 0), (0, 0)]


def test_metrics_count_who_waits() -> None:
    hand = deal(1, facts=SMALL)
    start(hand, [[5]] * 20)
    text = Metrics(hand.core, "toy").render().decode()
    assert f'switchgear:num_requests_waiting{{model_name="toy",rank="none"}} {20 - WIDTH}.0' in text


@pytest.mark.parametrize("seed", range(20))
def test_each_sequence_ends_once_whatever_happens(seed: int) -> None:
    """Random requests, aborts, steps, deaths and leaves over toy ranks: one end each, the same tokens, nothing left."""
    draw = random.Random(seed)
    num_ranks = draw.randint(1, 3)
    ranks = [ToyRank(rank) for rank in range(num_ranks)]
    fed: Counter[int] = Counter()

    def send(rank: int, message: Any) -> None:
        if isinstance(message, Submit):
            fed[message.sequence_id] += 1
            assert message.incarnation == fed[message.sequence_id], f"seed {seed}"
        ranks[rank].receive(message)

    facts = dataclasses.replace(FACTS, max_num_seqs=draw.randint(1, 4))
    core = ServerCore(system=RealSystem(seed=seed), tokenizer=None, facts=facts, send=send)
    core.set_ready(range(num_ranks))
    events: dict[str, list[SequenceEvent]] = {}
    expected: dict[str, int] = {}
    wanted: dict[str, list[list[int]]] = {}  # by request: the tokens of each prompt's first choice
    num_carried = 0

    def step() -> None:
        for rank in ranks:
            core.on_message(rank.rank, rank.step())
            assert core.ranks[rank.rank].num_sequences <= WINDOW * facts.max_num_seqs + 3, f"seed {seed}"

    for _ in range(150):
        what = draw.choice(["submit", "submit", "step", "step", "step", "step", "abort", "die", "leave"])
        if what == "submit":
            mine: list[SequenceEvent] = []
            prompts = [[5] * draw.choice([1, 40]) for _ in range(draw.randint(1, 12))]
            params = SamplingParams(n=draw.randint(1, 4), max_tokens=draw.randint(1, 5), seed=draw.getrandbits(16))
            request = core.submit(prompts, params, sink=mine.append)
            events[request.request_id], expected[request.request_id] = mine, len(prompts) * params.n
            assert params.seed is not None
            assert params.max_tokens is not None
            wanted[request.request_id] = [toy_tokens(prompt, params.seed, params.max_tokens) for prompt in prompts]
        elif what == "step":
            step()
        elif what == "abort" and events:
            core.abort(draw.choice(list(events)))
        elif what == "die" and draw.random() < 0.3:
            core.set_ready(None)
            dead = draw.randrange(num_ranks)
            num_carried += len(ranks[dead].held)
            ranks[dead].held.clear()
            core.lose_rank(dead, "killed")
            core.set_ready(range(num_ranks))
            step()  # each gets a token: none is taken for what kills ranks
            step()
        elif what == "leave" and num_ranks > 1 and draw.random() < 0.3:
            leaver = draw.randrange(num_ranks)
            num_carried += len(ranks[leaver].held)
            core.vacate([leaver])
            assert not ranks[leaver].held, f"seed {seed}"
            step()
            core.set_ready(range(num_ranks))
    for _ in range(2000):
        if core.num_live:
            step()
    assert core.num_live == len(core.waiting) == 0, f"seed {seed}"
    for request_id, mine in events.items():
        ends = Counter((event.prompt_index, event.index) for event in mine if event.finish)
        assert len(ends) == ends.total() == expected[request_id], f"seed {seed}"
        for prompt_index, tokens in enumerate(wanted[request_id]):
            first = [event for event in mine if (event.prompt_index, event.index) == (prompt_index, 0)]
            got = [token_id for event in first for token_id in event.token_ids]
            finish = first[-1].finish
            assert finish is not None
            assert finish.reason in ("length", "abort"), f"seed {seed}: {finish}"
            assert got == (tokens if finish.reason == "length" else tokens[: len(got)]), f"seed {seed}"
    assert core.num_carried == num_carried == fed.total() - len(fed), f"seed {seed}"
    for state in core.ranks.states():
        assert (state.num_sequences, state.num_tokens, state.num_unanswered_bytes) == (0, 0, 0), f"seed {seed}"
    assert all(not rank.held for rank in ranks), f"seed {seed}"
