"""The scheduler: budget, order, preemption, rejection, rollback; then a state machine against an independent model."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduling import VOCAB_SIZE, KVOracle, make_scheduler, make_sequence, next_token

from switchgear_runtime.batch import Batch, SampledToken
from switchgear_runtime.errors import RequestError
from switchgear_runtime.messages import TokenOutput
from switchgear_runtime.scheduler import Scheduler


def run_step(scheduler: Scheduler) -> tuple[Batch, list[TokenOutput]]:
    batch = scheduler.schedule()
    sampled = [SampledToken(next_token(sequence.token_ids)) for sequence in batch.sampling]
    return batch, scheduler.postprocess(batch, sampled)


def shape(batch: Batch) -> list[tuple[int, int, int, bool]]:
    return [(entry.sequence.sequence_id, entry.start, entry.num_tokens, entry.samples) for entry in batch]


def test_budget_is_exact_and_running_sequences_come_first() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=10)
    scheduler.add(make_sequence(1, [1] * 6))
    scheduler.add(make_sequence(2, [2] * 9))
    assert scheduler.num_pending_tokens == 10
    assert shape(run_step(scheduler)[0]) == [(1, 0, 6, True), (2, 0, 4, False)]
    scheduler.add(make_sequence(3, [3] * 7))
    assert shape(run_step(scheduler)[0]) == [(1, 6, 1, True), (2, 4, 5, True), (3, 0, 4, False)]
    assert shape(run_step(scheduler)[0]) == [(1, 7, 1, True), (2, 9, 1, True), (3, 4, 3, True)]


def test_without_chunked_prefill_a_prompt_waits_until_it_fits_one_step() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=10, enable_chunked_prefill=False)
    scheduler.add(make_sequence(1, [1] * 6, max_tokens=2))
    scheduler.add(make_sequence(2, [2] * 10))
    scheduler.add(make_sequence(3, [3] * 2))
    assert shape(run_step(scheduler)[0]) == [(1, 0, 6, True)]  # 3 would fit, but not before 2
    assert shape(run_step(scheduler)[0]) == [(1, 6, 1, True)]  # 1 ends here
    assert shape(run_step(scheduler)[0]) == [(2, 0, 10, True)]
    assert shape(run_step(scheduler)[0]) == [(2, 10, 1, True), (3, 0, 2, True)]


def test_without_chunked_prefill_only_a_recompute_longer_than_any_step_is_split() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8, enable_chunked_prefill=False)
    scheduler.add(make_sequence(1, [1] * 8, outputs=[2, 3, 4], max_tokens=5))
    assert shape(run_step(scheduler)[0]) == [(1, 0, 8, False)]
    batch, outputs = run_step(scheduler)
    assert shape(batch) == [(1, 8, 3, True)]
    assert [output.index for output in outputs] == [3]


@pytest.mark.parametrize(
    ("prompt", "arguments", "names"),
    [
        ([], {}, "prompt"),
        ([1] * 64, {}, "max_model_len=64"),
        ([1] * 5, {"outputs": [1] * 3, "max_tokens": 3}, "max_tokens=3"),
        ([1] * 16, {"max_tokens": 34}, "num_kv_blocks"),
        ([1] * 17, {}, "chunked prefill"),
    ],
)
def test_what_can_never_run_is_refused_and_leaves_nothing(
    prompt: list[int], arguments: dict[str, int], names: str
) -> None:
    scheduler = make_scheduler(num_blocks=12, enable_chunked_prefill=False)
    with pytest.raises(RequestError, match=names):
        scheduler.add(make_sequence(1, prompt, **arguments))
    assert not scheduler.has_work


def test_the_last_token_needs_no_block() -> None:
    scheduler = make_scheduler(num_blocks=2, max_model_len=9)
    scheduler.add(make_sequence(1, [1] * 4, max_tokens=5))  # 9 tokens, 8 of them computed
    outputs = [output for _ in range(5) for output in run_step(scheduler)[1]]
    assert [output.index for output in outputs] == [0, 1, 2, 3, 4]
    assert outputs[-1].finish_reason == "length"


def test_a_duplicate_id_is_refused_until_the_first_is_gone() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1, [1]))
    with pytest.raises(RequestError, match="sequence_id=1"):
        scheduler.add(make_sequence(1, [2]))
    assert scheduler.abort(1)
    assert not scheduler.abort(1)
    scheduler.add(make_sequence(1, [2]))


@pytest.mark.parametrize(
    ("sampling", "num_outputs", "reason"),
    [
        ({"max_tokens": 3}, 3, "length"),
        ({"max_tokens": 999}, 64 - 4, "length"),  # max_model_len
        ({"stop_token_ids": tuple(range(VOCAB_SIZE))}, 1, "stop"),
        ({"stop_token_ids": tuple(range(VOCAB_SIZE)), "min_tokens": 5}, 5, "stop"),
        ({"stop_token_ids": tuple(range(VOCAB_SIZE)), "min_tokens": 4, "max_tokens": 4}, 4, "stop"),
    ],
)
def test_finish_reasons(sampling: dict[str, object], num_outputs: int, reason: str) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1, [1, 2, 3, 4], **sampling))
    outputs = []
    while scheduler.has_work:
        outputs += run_step(scheduler)[1]
    assert [output.index for output in outputs] == list(range(num_outputs))
    assert [output.finish_reason for output in outputs] == [None] * (num_outputs - 1) + [reason]
    assert scheduler.blocks.num_free_blocks == scheduler.blocks.num_blocks


def test_preemption_takes_the_last_arrived_and_changes_no_token() -> None:
    def outputs_of(num_blocks: int) -> tuple[dict[int, list[int]], int]:
        scheduler = make_scheduler(num_blocks=num_blocks, enable_prefix_caching=False)
        for sequence_id in range(3):
            scheduler.add(make_sequence(sequence_id, [sequence_id + 1] * 4, max_tokens=12))
        tokens: dict[int, list[int]] = {sequence_id: [] for sequence_id in range(3)}
        while scheduler.has_work:
            _, outputs = run_step(scheduler)
            for output in outputs:
                assert output.index == len(tokens[output.sequence_id])
                tokens[output.sequence_id].append(output.token_id)
        return tokens, scheduler.num_preemptions

    plenty, no_preemptions = outputs_of(16)
    scarce, num_preemptions = outputs_of(6)
    assert scarce == plenty
    assert no_preemptions == 0
    assert num_preemptions > 0

    scheduler = make_scheduler(num_blocks=6, max_num_batched_tokens=24, enable_prefix_caching=False)
    for sequence_id in range(3):
        scheduler.add(make_sequence(sequence_id, [sequence_id + 1] * 8, max_tokens=8))
    run_step(scheduler)
    run_step(scheduler)
    assert [sequence.sequence_id for sequence in scheduler.running] == [0, 1]
    assert [sequence.sequence_id for sequence in scheduler.waiting] == [2]
    assert scheduler.waiting[0].num_preemptions == 1


def test_the_prefix_cache_serves_outputs_too_and_leaves_the_last_token() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1, [1] * 8, max_tokens=8))
    sequence = scheduler.get(1)
    assert sequence is not None
    while scheduler.has_work:
        run_step(scheduler)
    assert sequence.num_tokens == 16
    scheduler.add(make_sequence(2, sequence.token_ids[:12]))
    batch, outputs = run_step(scheduler)
    assert shape(batch) == [(2, 8, 4, True)]  # the third block is there too, but its last token is to be computed
    assert outputs[0].num_cached_tokens == 8
    scheduler.add(make_sequence(3, sequence.token_ids[:13]))
    scheduler.add(make_sequence(4, sequence.token_ids[:13], tenant="other"))
    scheduler.add(make_sequence(5, sequence.token_ids[:13], cache_salt="salt"))
    _, outputs = run_step(scheduler)
    assert {output.sequence_id: output.num_cached_tokens for output in outputs} == {2: None, 3: 12, 4: 0}
    stats = scheduler.stats()
    assert (stats.prefix_cache_hit_tokens, stats.prefix_cache_query_tokens) == (20, 8 + 12 + 13 + 13 + 13)


def test_a_sequence_from_another_life_goes_on_at_its_index() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1, [1] * 5, outputs=[7, 7, 7], max_tokens=5))
    outputs = run_step(scheduler)[1] + run_step(scheduler)[1]
    assert [(output.index, output.finish_reason, output.num_cached_tokens) for output in outputs] == [
        (3, None, None),
        (4, "length", None),
    ]


def test_a_step_has_no_more_than_was_announced() -> None:
    """A seat that becomes free after the header is for the next step's newcomers."""
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(make_sequence(0, [1, 2, 3]))
    scheduler.postprocess(scheduler.schedule(), [SampledToken(4)])
    scheduler.add(make_sequence(1, [5] * 12))
    announced = scheduler.num_pending_tokens
    assert announced == 1
    assert scheduler.abort(0)
    assert scheduler.schedule(announced).num_tokens <= announced
    scheduler.rollback()
    assert scheduler.schedule(scheduler.num_pending_tokens).num_tokens == 12


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, aborts, steps and broken steps; every written and read KV cell is checked, and every token."""

    @initialize(
        block_size=st.integers(1, 4),
        num_blocks=st.integers(3, 14),
        enable_prefix_caching=st.booleans(),
        enable_chunked_prefill=st.booleans(),
        max_num_seqs=st.integers(1, 5),
        spare_budget=st.integers(0, 20),
    )
    def begin(self, *, max_num_seqs: int, spare_budget: int, **changes: int) -> None:
        self.scheduler = make_scheduler(
            **changes, max_model_len=40, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_seqs + spare_budget
        )
        self.oracle = KVOracle(self.scheduler.blocks.block_size)
        self.tokens: dict[int, list[int]] = {}  # of the living, as the outputs told
        self.order: list[int] = []  # of arrival, of the living

    @rule(
        prefix=st.lists(st.just(1), max_size=14),
        prompt=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=8),
        outputs=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=4),
        max_tokens=st.integers(1, 12),
        stop=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=1),
        tenant=st.sampled_from(["", "a"]),
    )
    def arrive(
        self, prefix: list[int], prompt: list[int], outputs: list[int], max_tokens: int, stop: list[int], tenant: str
    ) -> None:
        sequence_id = self.scheduler._num_arrivals
        sequence = make_sequence(
            sequence_id,
            prefix + prompt,
            outputs=outputs,
            max_tokens=max_tokens,
            stop_token_ids=tuple(stop),
            tenant=tenant,
        )
        try:
            self.scheduler.add(sequence)
        except RequestError:
            blocks, budget = self.scheduler.blocks, self.scheduler.max_num_batched_tokens
            longest = min(len(prefix + prompt) + max_tokens, 40)
            assert (
                len(outputs) >= max_tokens
                or sequence.num_tokens >= 40
                or longest - 1 > blocks.num_blocks * blocks.block_size
                or (not self.scheduler.enable_chunked_prefill and len(prefix + prompt) > budget)
            )
            return
        self.tokens[sequence_id] = list(sequence.token_ids)
        self.order.append(sequence_id)

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence_id = data.draw(st.sampled_from(self.order))
        assert self.scheduler.abort(sequence_id)
        self.order.remove(sequence_id)

    @rule(num_steps=st.integers(1, 8))
    def steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.step()
            self.holds()

    def step(self) -> None:
        num_preemptions = self.scheduler.num_preemptions
        batch = self.scheduler.schedule()
        self.check_batch(batch, preempted=self.scheduler.num_preemptions > num_preemptions)
        self.oracle.write(batch)
        for output in self.scheduler.postprocess(batch, self.oracle.sample(batch)):
            sequence_id, tokens = output.sequence_id, self.tokens[output.sequence_id]
            assert output.token_id == next_token(tokens)
            tokens.append(output.token_id)
            if output.finish_reason is not None:
                self.order.remove(sequence_id)

    @precondition(lambda self: self.order)
    @rule()
    def broken_step(self) -> None:
        scheduler = self.scheduler
        before = {sequence.sequence_id: state(sequence) for sequence in (*scheduler.running, *scheduler.waiting)}
        free_before, num_preemptions = scheduler.blocks.num_free_blocks, scheduler.num_preemptions
        counters_before = scheduler.prefix_cache_hit_tokens, scheduler.prefix_cache_query_tokens
        batch = scheduler.schedule()
        self.oracle.spoil(batch.flatten(scheduler.blocks.block_size).slots_T)
        scheduler.rollback()
        for sequence in (*scheduler.running, *scheduler.waiting):
            if before[sequence.sequence_id] != state(sequence):  # only a preemption stands
                assert sequence.status == "waiting"
                assert not sequence.block_table
                assert scheduler.num_preemptions > num_preemptions
        assert counters_before == (scheduler.prefix_cache_hit_tokens, scheduler.prefix_cache_query_tokens)
        if scheduler.num_preemptions == num_preemptions:
            assert scheduler.blocks.num_free_blocks == free_before

    def check_batch(self, batch: Batch, *, preempted: bool) -> None:
        scheduler = self.scheduler
        assert batch.num_tokens <= scheduler.max_num_batched_tokens
        assert len(batch) <= scheduler.max_num_seqs
        ids = [entry.sequence.sequence_id for entry in batch]
        assert ids == self.order[: len(ids)]  # the oldest, and only they
        assert ids or not self.order
        for entry in batch:
            assert entry.num_tokens >= 1
            assert entry.samples == (entry.end == len(self.tokens[entry.sequence.sequence_id]))
            if not scheduler.enable_chunked_prefill and not entry.samples:
                assert entry.sequence.num_tokens > scheduler.max_num_batched_tokens
        if (
            scheduler.enable_chunked_prefill
            and not preempted
            and len(ids) < min(len(self.order), scheduler.max_num_seqs)
        ):
            waiting = scheduler.waiting[0]  # passed over: only for want of tokens or blocks
            assert batch.num_tokens == scheduler.max_num_batched_tokens or not scheduler.blocks.fits(
                waiting, scheduler.blocks.match(waiting)
            )

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        scheduler = self.scheduler
        scheduler.blocks.check()
        assert [sequence.sequence_id for sequence in (*scheduler.running, *scheduler.waiting)] == self.order
        counts = [0] * scheduler.blocks.num_blocks
        for sequence in scheduler.running:
            for block in sequence.block_table:
                counts[block] += 1
        assert counts == scheduler.blocks._ref_counts
        assert all(not sequence.block_table for sequence in scheduler.waiting)

    def teardown(self) -> None:
        if hasattr(self, "scheduler"):
            for _ in range(40 * 16 * (len(self.order) + 1)):
                if not self.order:
                    break
                self.step()
            assert not self.scheduler.has_work
            assert self.scheduler.blocks.num_free_blocks == self.scheduler.blocks.num_blocks


def state(sequence: object) -> tuple[object, ...]:
    names = ("status", "num_computed_tokens", "num_cached_tokens", "num_preemptions", "block_table", "token_ids")
    return tuple(list(value) if isinstance(value := getattr(sequence, name), list | array) else value for name in names)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
