"""The engine's protocol, one behaviour a test: messages, parks and wakes, generations, epochs, faults."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scheduling import make_submit
from tiny_cluster import (
    VOCAB_SIZE,
    Alone,
    Cluster,
    ClusterRun,
    content,
    make_config,
    make_tiny_checkpoint,
    num_finished,
)

from switchgear_runtime.engine import EngineMessage
from switchgear_runtime.generation import GenerationDescriptor
from switchgear_runtime.messages import Abort, BeginGeneration, DropMap, EndGeneration, StageMap, Submit, Wake
from switchgear_runtime.moe.expert_map import ExpertMap


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Alone]:
    model_dir = make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=2)
    return model_dir, Alone(model_dir)


class BreakingRunner:
    """Raises in the forward whose number is `breaks_at`, before or after the real one."""

    def __init__(self, runner: Any, breaks_at: int, *, after: bool, error: Exception) -> None:
        self._runner = runner
        self._breaks_at = breaks_at
        self._after = after
        self._error = error
        self.num_calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def forward(self, batch: Any) -> Any:
        self.num_calls += 1
        if self.num_calls == self._breaks_at and not self._after:
            raise self._error
        logits = self._runner.forward(batch)
        if self.num_calls == self._breaks_at:
            raise self._error
        return logits


def all_parked(num_parked: int) -> Any:
    return lambda run: run.num_parked >= num_parked


def submits(count: int, **sampling: Any) -> list[Submit]:
    rng = np.random.default_rng(count)
    return [
        make_submit(i, rng.integers(VOCAB_SIZE, size=5 + i).tolist(), **{"max_tokens": 10, "seed": i, **sampling})
        for i in range(count)
    ]


def assert_served(lab: tuple[Path, Alone], run: ClusterRun, wanted: list[Submit]) -> None:
    for submit in wanted:
        assert content(run.outputs[submit.sequence_id]) == content(lab[1].outputs(submit))


def test_ranks_park_and_one_wakes_all(lab: tuple[Path, Alone]) -> None:
    cluster = Cluster(make_config(lab[0]), 3)
    cluster.pump(all_parked(3))
    (first, second) = submits(2)
    cluster.inboxes[1].put(first)
    cluster.pump(lambda run: num_finished(run) == 1 and run.num_parked >= 6)
    cluster.inboxes[2].put(second)
    cluster.pump(lambda run: num_finished(run) == 2 and run.num_parked >= 9)
    run = cluster.stop()
    assert_served(lab, run, [first, second])
    assert run.expert_load == run.expert_rows > 0


def test_a_wake_that_comes_before_the_park_is_not_lost(lab: tuple[Path, Alone]) -> None:
    cluster = Cluster(make_config(lab[0]), 2)
    cluster.pump(all_parked(2))
    engine = cluster.engines[0]
    group = engine.membership.group
    assert group is not None
    step = group.step
    for inbox in cluster.inboxes:
        inbox.put(Wake(1, step + 1))  # ends this park and the next
    run = cluster.pump(all_parked(6))
    time.sleep(0.1)
    assert group.step == step + 2
    assert run.num_parked == 6
    for inbox in cluster.inboxes:
        inbox.put(Wake(1, step))  # late
        inbox.put(Wake(7, step + 99))  # of another generation
    time.sleep(0.1)
    assert group.step == step + 2
    cluster.stop()


def test_an_aborted_sequence_leaves_within_a_step(lab: tuple[Path, Alone]) -> None:
    cluster = Cluster(make_config(lab[0]), 2)
    endless, other = submits(2, max_tokens=200)
    cluster.inboxes[0].put(endless)
    cluster.pump(lambda run: len(run.outputs[0]) >= 3)
    cluster.inboxes[0].put(Abort(0))
    cluster.inboxes[0].put(Abort(77))  # nobody: ignored
    cluster.inboxes[1].put(other)
    run = cluster.pump(lambda run: num_finished(run) == 1)
    assert run.outputs[0][-1].finish_reason is None
    assert_served(lab, cluster.stop(), [other])


def test_a_higher_incarnation_replaces_and_a_lower_one_is_ignored(lab: tuple[Path, Alone]) -> None:
    cluster = Cluster(make_config(lab[0]), 1)
    old = make_submit(5, [1, 2, 3], incarnation=2, max_tokens=200)
    cluster.inboxes[0].put(old)
    cluster.pump(lambda run: len(run.outputs[5]) >= 2)
    cluster.inboxes[0].put(make_submit(5, [9], incarnation=1))
    cluster.inboxes[0].put(make_submit(5, [9], incarnation=2))
    cluster.pump(lambda run: len(run.outputs[5]) >= 6)
    assert {output.incarnation for output in cluster.run_result.outputs[5]} == {2}
    new = make_submit(5, [1, 2, 3], outputs=[7, 8], incarnation=3, max_tokens=6)
    cluster.run_result.outputs.clear()
    cluster._collect = collect_incarnation(cluster, 3)  # type: ignore[method-assign]
    cluster.inboxes[0].put(new)
    cluster.pump(lambda run: num_finished(run) == 1)
    run = cluster.stop()
    assert not run.rejected
    assert [output.index for output in run.outputs[5]] == [2, 3, 4, 5]
    assert content(run.outputs[5]) == content(lab[1].outputs(new))


def collect_incarnation(cluster: Cluster, incarnation: int) -> Any:
    """As the server does: tokens of other incarnations are discarded."""
    collect = Cluster._collect

    def filtered(message: Any) -> None:
        if hasattr(message, "tokens"):
            message.tokens[:] = [token for token in message.tokens if token.incarnation == incarnation]
        collect(cluster, message)

    return filtered


@pytest.mark.parametrize(
    ("submit", "names"),
    [
        (make_submit(0, [1, VOCAB_SIZE]), "prompt_token_ids"),
        (make_submit(0, [-1]), "prompt_token_ids"),
        (make_submit(0, [1], logit_bias={VOCAB_SIZE: 1.0}), "logit_bias"),
        (make_submit(0, [1], stop_token_ids=(VOCAB_SIZE,)), "stop_token_ids"),
        (make_submit(0, [1] * 256), "max_model_len"),
        (make_submit(0, []), "prompt"),
    ],
)
def test_a_bad_sequence_is_rejected_and_disturbs_nobody(lab: tuple[Path, Alone], submit: Submit, names: str) -> None:
    cluster = Cluster(make_config(lab[0]), 2)
    (good,) = submits(1)
    cluster.inboxes[0].put(submit)
    cluster.inboxes[1].put(good)
    cluster.pump(lambda run: num_finished(run) == 2)
    run = cluster.stop()
    assert [(message.sequence_id, message.incarnation) for message in run.rejected] == [(0, 1)]
    assert names in run.rejected[0].message
    assert not run.faults
    assert_served(lab, run, [good])


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("breaks_at", [1, 4])
def test_an_unexpected_error_is_a_fault_and_the_next_generation_redoes_the_step(
    lab: tuple[Path, Alone], breaks_at: int, after: bool
) -> None:
    cluster = Cluster(
        make_config(lab[0], max_num_batched_tokens=16, max_num_seqs=8),
        3,
        wrap=lambda runner, rank: (
            BreakingRunner(runner, breaks_at, after=after, error=KeyError("what")) if rank == 1 else runner
        ),
    )
    wanted = submits(9, temperature=0.7)
    for index, submit in enumerate(wanted):
        cluster.inboxes[index % 3].put(submit)
    started = time.monotonic()
    num_faults = 1 if after else 3  # after the last combine the others have their tokens, and find out in the next step
    run = cluster.pump(lambda run: len(run.faults) >= num_faults)
    assert time.monotonic() - started < 10.0  # nobody waited for a deadline (30 s here)
    by_rank = {fault.rank: fault for fault in run.faults}
    assert (by_rank[1].kind, by_rank[1].generation) == ("KeyError", 1)
    assert "what" in by_rank[1].message
    cluster.pump(lambda run: len(run.faults) == 3)
    assert {fault.kind for fault in run.faults if fault.rank != 1} <= {"TransportAborted", "PeerLost"}
    cluster.begin(2)
    cluster.pump(lambda run: num_finished(run) == len(wanted))
    assert_served(lab, cluster.stop(), wanted)


def test_the_end_of_a_generation_reaches_a_rank_that_waits_for_a_dead_peer(lab: tuple[Path, Alone]) -> None:
    cluster = Cluster(make_config(lab[0]), 3)
    cluster.pump(all_parked(3))
    cluster.hub.stop(2)  # from now on rank 2 never comes back from a call
    wanted = submits(2)
    for rank, submit in enumerate(wanted):
        cluster.inboxes[rank].put(submit)
    for inbox in cluster.inboxes:
        inbox.put(Wake(1, 0))
    time.sleep(0.2)
    started = time.monotonic()
    for inbox in cluster.inboxes[:2]:
        inbox.put(EndGeneration(0, 1, "of a stale term, which nobody heeds"))
        inbox.put(EndGeneration(1, 1, "rank 2 is dead"))
    cluster.pump(lambda run: {fault.rank for fault in run.faults} >= {0, 1})
    assert time.monotonic() - started < 5.0
    cluster.hub.resume(2)
    cluster.pump(lambda run: {fault.rank for fault in run.faults} == {0, 1, 2})
    cluster.begin(2)
    cluster.pump(lambda run: num_finished(run) == 2)
    assert_served(lab, cluster.stop(), wanted)


def test_stale_descriptors_are_ignored(lab: tuple[Path, Alone]) -> None:
    cluster = Cluster(make_config(lab[0]), 2, generation=5)
    cluster.pump(all_parked(2))
    for generation, term in ((5, 1), (4, 1), (9, 0)):
        stale = GenerationDescriptor(term=term, generation=generation, world_size=2, epoch=0, channel="stale")
        for inbox in cluster.inboxes:
            inbox.put(BeginGeneration(stale))
    wanted = submits(2)
    for rank, submit in enumerate(wanted):
        cluster.inboxes[rank].put(submit)
    cluster.pump(lambda run: num_finished(run) == 2)
    run = cluster.stop()
    assert not run.faults
    assert_served(lab, run, wanted)


def test_a_generation_that_cannot_be_opened_is_a_fault(lab: tuple[Path, Alone]) -> None:
    cluster = Cluster(make_config(lab[0]), 2)
    cluster.pump(all_parked(2))
    lonely = GenerationDescriptor(term=1, generation=2, world_size=1, epoch=0, channel="lonely")
    cluster.inboxes[1].put(BeginGeneration(lonely))  # rank 1 of 1
    (wanted,) = submits(1)
    cluster.inboxes[1].put(wanted)  # behind the message that fails, and not lost
    cluster.inboxes[0].put(EndGeneration(1, 1, "over"))
    run = cluster.pump(lambda run: len(run.faults) == 2)
    assert {(fault.rank, fault.generation) for fault in run.faults} == {(0, 1), (1, 2)}  # rank 0's answers the end
    cluster.begin(3)
    cluster.pump(lambda run: num_finished(run) == 1)
    assert_served(lab, cluster.stop(), [wanted])


def test_epochs_flip_when_all_have_staged_and_no_token_changes(lab: tuple[Path, Alone]) -> None:
    rng = np.random.default_rng(0)
    cluster = Cluster(make_config(lab[0]), 3)
    wanted = submits(6, max_tokens=150)
    for index, submit in enumerate(wanted):
        cluster.inboxes[index % 3].put(submit)
    for epoch in (1, 2, 3):
        expert_map = ExpertMap.random(rng, 2, 8, 3, num_redundant=3, epoch=epoch)
        cluster.stage(expert_map, but=2 if epoch == 2 else None)  # rank 2 never hears of epoch 2
        if epoch != 2:
            cluster.pump(lambda run, epoch=epoch: all(run.epochs[rank][-1:] == [epoch] for rank in range(3)))  # type: ignore[misc]
            continue
        cluster.pump(lambda run: sum(message.epoch == 2 for message in run.staged) == 2)
        seen = len(cluster.run_result.outputs[0])
        cluster.pump(lambda run, seen=seen: len(run.outputs[0]) > seen + 20 or num_finished(run) == 6)  # type: ignore[misc]
    cluster.inboxes[0].put(StageMap(generation=1, expert_map=ExpertMap.contiguous(2, 8, 3, epoch=2).to_json()))
    cluster.stage(ExpertMap.contiguous(1, 4, 3, epoch=9), but=1)  # of another model
    cluster.pump(lambda run: num_finished(run) == 6 and len(run.refused) == 3)
    run = cluster.stop()
    assert not run.faults
    assert_served(lab, run, wanted)
    assert [[epoch for epoch in run.epochs[rank] if epoch] for rank in range(3)] == [[1, 3]] * 3
    staged = {(message.rank, message.epoch) for message in run.staged}
    assert staged == {(rank, epoch) for rank in range(3) for epoch in (1, 2, 3)} - {(2, 2)}
    assert all((message.moved_bytes > 0) == (message.num_experts > 0) for message in run.staged)
    assert sum(message.num_experts for message in run.staged) > 0


def test_a_map_that_is_dropped_as_its_outcome_arrives_is_not_staged(lab: tuple[Path, Alone]) -> None:
    cluster = Cluster(make_config(lab[0]), 1)
    cluster.pump(all_parked(1))
    engine = cluster.engines[0]
    held: list[EngineMessage] = []
    put = engine.membership._stager._deliver
    engine.membership._stager._deliver = held.append
    cluster.stage(ExpertMap.contiguous(2, 8, 1, epoch=1))
    while not held:
        time.sleep(0.01)
    cluster.inboxes[0].put(DropMap(1, 1))  # finds no job any more
    put(held[0])  # type: ignore[arg-type]
    engine.membership._stager._deliver = put
    cluster.stage(ExpertMap.contiguous(2, 8, 1, epoch=2))
    cluster.pump(lambda run: run.epochs[0][-1:] == [2])
    run = cluster.stop()
    assert run.epochs[0] == [0, 2]
    assert [message.epoch for message in run.staged] == [2]


def test_a_rank_without_a_generation_stops_when_told(lab: tuple[Path, Alone]) -> None:
    cluster = Cluster(make_config(lab[0]), 2)
    cluster.pump(all_parked(2))
    for inbox in cluster.inboxes:
        inbox.put(EndGeneration(1, 1, "over"))
    cluster.pump(lambda run: len(run.faults) == 2)  # also a parked rank answers, and so shows that it lives
    assert {fault.kind for fault in cluster.stop().faults} == {"TransportAborted"}
