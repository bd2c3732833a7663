"""Steps that are scheduled while the one before runs: the same tokens, whatever is aborted, preempted or broken meanwhile."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from scheduling import VOCAB_SIZE, KVOracle, make_scheduler, make_sequence, next_token

from switchgear_runtime.batch import Batch, SampledToken
from switchgear_runtime.scheduler import Scheduler, pending_token

SEED = random.SystemRandom().randrange(1 << 32)


def alone(prompt: list[int], max_tokens: int, stop: tuple[int, ...], max_model_len: int) -> list[int]:
    tokens = list(prompt)
    while True:
        tokens.append(next_token(tokens))
        if tokens[-1] in stop or len(tokens) - len(prompt) >= max_tokens or len(tokens) >= max_model_len:
            return tokens[len(prompt) :]


@dataclass(slots=True)
class Running:
    batch: Batch
    slots: list[int]
    drawn: list[SampledToken]


class Device:
    """A scheduler, and an engine that has up to two steps open: a step's tokens are drawn when it is launched, and told
    when the next one has been."""

    def __init__(self, rng: random.Random, scheduler: Scheduler) -> None:
        self.rng = rng
        self.scheduler = scheduler
        self.oracle = KVOracle(scheduler.blocks.block_size)
        self.running: Running | None = None
        self.outputs: dict[int, list[int]] = {}
        self.ended: set[int] = set()
        self.num_overlapped = self.num_wasted = 0

    def turn(self, *, breaks: bool, overlaps: bool) -> None:
        scheduler, before = self.scheduler, self.running
        batch = scheduler.schedule()
        slots = batch.flatten(scheduler.blocks.block_size).slots_T
        drawn = [token.token_id for token in before.drawn] if before is not None else []
        if breaks:  # and the one before with it, or not
            self.oracle.spoil(slots)
            if self.rng.random() < 0.5 and before is not None:
                scheduler.advance(batch)
                self.finish(before)
                before = None
            scheduler.rollback()
            if before is not None:
                self.oracle.spoil(before.slots)
            self.running = None
            return
        self.oracle.write(batch, drawn)
        now = Running(batch, slots, self.oracle.sample(batch, drawn))
        if before is not None:
            self.num_overlapped += len(batch) > 0
            self.finish(before)
            self.num_wasted += sum(entry.sequence.status == "finished" for entry in batch)
        scheduler.advance(batch)
        self.running = now
        if not overlaps:
            self.finish(now)
            self.running = None

    def finish(self, step: Running) -> None:
        for output in self.scheduler.complete(step.batch, step.drawn):
            tokens = self.outputs.setdefault(output.sequence_id, [])
            assert output.index == len(tokens)
            assert output.sequence_id not in self.ended
            tokens.append(output.token_id)
            if output.finish_reason is not None:
                self.ended.add(output.sequence_id)


@pytest.mark.parametrize("case", range(150))
def test_tokens_are_those_of_each_request_alone(case: int) -> None:
    rng = random.Random(f"{SEED} {case}")
    scheduler = make_scheduler(
        num_blocks=rng.choice([8, 16, 40]),
        block_size=rng.choice([2, 4]),
        max_model_len=rng.choice([14, 16]),
        max_num_seqs=rng.choice([2, 8]),
        max_num_batched_tokens=rng.choice([8, 16]),
        enable_prefix_caching=rng.random() < 0.7,
        enable_chunked_prefill=True,
    )
    device = Device(rng, scheduler)
    expected: dict[int, list[int]] = {}
    aborted: set[int] = set()
    break_odds = rng.choice([0.0, 0.1])
    for _ in range(60):
        if rng.random() < 0.3:
            number, prompt = len(expected), [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 10))]
            max_tokens = rng.randint(1, 12)
            stop = (rng.randrange(VOCAB_SIZE),) if rng.random() < 0.6 else ()
            scheduler.add(make_sequence(number, prompt, max_tokens=max_tokens, stop_token_ids=stop))
            expected[number] = alone(prompt, max_tokens, stop, scheduler.max_model_len)
        if expected and rng.random() < 0.05 and scheduler.abort(number := rng.choice(list(expected))):
            aborted.add(number)
        device.turn(breaks=rng.random() < break_odds, overlaps=rng.random() < 0.9)
        scheduler.blocks.check()
    while scheduler.has_work or device.running is not None:
        device.turn(breaks=False, overlaps=scheduler.has_work)
    assert scheduler.blocks.num_free_blocks == scheduler.blocks.num_blocks
    for number, tokens in expected.items():
        given = device.outputs.get(number, [])
        assert given == (tokens if number not in aborted else tokens[: len(given)]), f"seed {SEED}, request {number}"
    assert device.ended == expected.keys() - aborted


def test_what_overlaps_is_real_and_what_it_wastes_is_a_row() -> None:
    scheduler = make_scheduler()
    device = Device(random.Random(0), scheduler)
    scheduler.add(make_sequence(0, [1, 2, 3], max_tokens=6))
    while scheduler.has_work or device.running is not None:
        device.turn(breaks=False, overlaps=scheduler.has_work)
    assert len(device.outputs[0]) == 6
    assert device.num_overlapped == 5
    assert device.num_wasted == 0  # an end by length is foreseen
    stop = next_token([1, 2, 3])
    scheduler.add(make_sequence(1, [1, 2, 3], max_tokens=6, stop_token_ids=(stop,)))
    while scheduler.has_work or device.running is not None:
        device.turn(breaks=False, overlaps=scheduler.has_work)
    assert device.outputs[1] == [stop]
    assert device.num_wasted == 1


def test_a_step_computes_a_token_that_is_being_drawn() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(0, [1, 2, 3], max_tokens=6))
    first = scheduler.schedule()
    scheduler.advance(first)
    second = scheduler.schedule()
    assert second.flatten(4).token_ids_T == [pending_token(0)]
    assert second.flatten(4).positions_T == [3]
    scheduler.advance(second)
    scheduler.complete(first, [SampledToken(5)])
    scheduler.complete(second, [SampledToken(6)])
    assert scheduler.running[0].token_ids == [1, 2, 3, 5, 6]
