"""Steps that run without the host: captured, replayed, launched before the last one is finished; the same tokens as without.

Through the twin everywhere; what ranks of one process cannot do on a GPU (kernels that wait for each other need processes
of their own) is in test_small_steps_processes.py.
"""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scheduling import make_submit
from test_engine_equality import assert_as_alone, draw_submits
from tiny_checkpoints import make_runner, make_sequence, run_ranks
from tiny_cluster import Alone, Cluster, ClusterRun, content, make_config, make_tiny_checkpoint, num_finished

from switchgear_runtime.batch import Batch, ScheduledSequence
from switchgear_runtime.comm.host_memory import HostPeerMemory
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.cuda import small_steps
from switchgear_runtime.cuda.small_steps import SmallSteps
from switchgear_runtime.errors import TransportAborted, TransportTimeout
from switchgear_runtime.generation import GenerationDescriptor
from switchgear_runtime.header import Decision
from switchgear_runtime.launched_step import DeviceLaunch
from switchgear_runtime.messages import EndGeneration, Stop, Submit
from switchgear_runtime.model_runner import ModelRunner
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.sampler import Sampler

Lab = tuple[Path, Alone]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    seed = random.randrange(1 << 20)  # in the directory's name, which every failure shows
    model_dir = make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed)
    return model_dir, Alone(model_dir, device="twin", small_step_tokens=0)


def small_of(runner: ModelRunner) -> SmallSteps:
    assert runner._device is not None
    return runner._device._small


def run(lab: Lab, world_size: int, submits: list[Submit], **changes: Any) -> tuple[ClusterRun, Cluster]:
    cluster = Cluster(make_config(lab[0], device="twin", **changes), world_size)
    for index, submit in enumerate(submits):
        cluster.inboxes[index % world_size].put(submit)
    cluster.pump(lambda run: num_finished(run) == len(submits) or bool(run.faults))
    assert not cluster.run_result.faults, cluster.run_result.faults
    return cluster.stop(), cluster


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    "changes", [{}, {"enforce_eager": True}, {"async_scheduling": False}, {"small_step_tokens": 5}], ids=str
)
def test_tokens_are_those_of_large_steps_alone(lab: Lab, world_size: int, changes: dict[str, Any]) -> None:
    submits = draw_submits(random.Random(f"{lab[0].name} {world_size} {changes}"), 12, longest=40)
    result, cluster = run(lab, world_size, submits, max_num_seqs=8, max_num_batched_tokens=24, **changes)
    assert_as_alone(lab, submits, result)
    assert result.expert_load == result.expert_rows > 0
    for engine in cluster.engines:
        small = small_of(engine.runner)
        eager = bool(changes.get("enforce_eager"))
        assert (small.num_replays == 0) == eager
        assert (small.num_captures == 0) == eager
        assert len(small.memory._chunks) == 1  # what was reserved is enough


def test_few_graphs_are_kept(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was used least recently goes, and is captured again when its size comes back."""
    monkeypatch.setattr(small_steps, "GRAPHS_MAX", 2)
    submits = draw_submits(random.Random(lab[0].name), 12, longest=40)
    result, cluster = run(lab, 2, submits, max_num_seqs=8, max_num_batched_tokens=24)
    assert_as_alone(lab, submits, result)
    for engine in cluster.engines:
        small = small_of(engine.runner)
        assert len(small._known) == 2
        assert small.num_captures > 2


def test_a_migration_keeps_the_graphs(lab: Lab) -> None:
    """Maps with as many slots, flipped while requests run: what was captured goes on to be used."""
    rng = random.Random(lab[0].name)
    submits = [make_submit(i, [rng.randrange(96) for _ in range(5)], max_tokens=40, seed=i) for i in range(6)]
    cluster = Cluster(make_config(lab[0], device="twin", max_num_seqs=8), 2)
    draw = np.random.default_rng(rng.randrange(1 << 30))
    for index, submit in enumerate(submits):
        cluster.inboxes[index % 2].put(submit)
    captures = []
    for epoch in (1, 2, 3):
        shuffled_LP = np.stack([draw.permutation(8) for _ in range(2)]).astype(np.int32)
        cluster.stage(ExpertMap.of(shuffled_LP, num_ranks=2, num_experts=8, epoch=epoch))
        cluster.pump(lambda run, epoch=epoch: all(run.epochs[rank][-1:] == [epoch] for rank in (0, 1)))
        captures.append(sum(small_of(engine.runner).num_captures for engine in cluster.engines))
    cluster.pump(lambda run: num_finished(run) == len(submits) or bool(run.faults))
    assert not cluster.run_result.faults
    result = cluster.stop()
    assert_as_alone(lab, submits, result)
    sizes = [len(small_of(engine.runner)._known) for engine in cluster.engines]
    assert [small_of(engine.runner).num_captures for engine in cluster.engines] == sizes  # each once
    assert captures[0] > 0


def test_what_the_host_draws_is_among_what_the_device_draws(lab: Lab) -> None:
    """Requests with logprobs, penalties, bias and minimal lengths beside plain ones."""
    rng = random.Random(f"{lab[0].name} host")
    kinds: list[dict[str, Any]] = [
        {},
        {"logprobs": 2},
        {"presence_penalty": 0.5, "repetition_penalty": 1.3},
        {"logit_bias": {5: 3.0}},
        {"min_tokens": 6, "stop_token_ids": tuple(range(40))},
    ]
    submits = [
        make_submit(
            i,
            [rng.randrange(96) for _ in range(rng.randrange(1, 9))],
            max_tokens=rng.randrange(1, 14),
            temperature=rng.choice([0.0, 1.0]),
            top_p=rng.choice([1.0, 0.8]),
            seed=rng.randrange(1 << 64),
            **kinds[i % len(kinds)],
        )
        for i in range(15)
    ]
    result, _ = run(lab, 2, submits, max_num_seqs=5)
    for submit in submits:
        assert content(result.outputs[submit.sequence_id]) == content(lab[1].outputs(submit)), submit


def test_steps_overlap(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step is launched before the last one's tokens are asked for."""
    events: list[str] = []
    launch, finish = ModelRunner.launch, DeviceLaunch.finish

    def launched(self: ModelRunner, batch: Batch, sampler: Sampler) -> DeviceLaunch:
        events.append("launch")
        return launch(self, batch, sampler)

    def finished(self: DeviceLaunch) -> Any:
        events.append("finish")
        return finish(self)

    monkeypatch.setattr(ModelRunner, "launch", launched)
    monkeypatch.setattr(DeviceLaunch, "finish", finished)
    submit = make_submit(0, [1, 2, 3], max_tokens=10, temperature=0.0)
    result, _ = run(lab, 1, [submit])
    assert content(result.outputs[0]) == content(lab[1].outputs(submit))
    text = "".join("L" if event == "launch" else "F" for event in events)
    assert text.startswith("LLFLFLF"), text  # two at first, then one for one
    assert events.count("launch") == events.count("finish")


def test_a_rank_that_does_not_come_is_named(lab: Lab) -> None:
    """Rank 1 agrees to a step and never launches it: the other's kernels wait for their deadline, and say for whom."""

    def body(rank: int, transport: Transport) -> None:
        runner = make_runner(lab[0], rank=rank, world_size=2, device="twin", dtype="bfloat16", step_timeout_s=1.0)
        runner.begin(transport, ExpertMap.contiguous(2, 8, 2))
        runner.begin_step(Decision(kind="run", epoch=0, num_tokens=(2, 2)))
        if rank == 1:
            return
        batch = Batch((ScheduledSequence(make_sequence([3, 4], [0]), 0, 2, True),))
        with pytest.raises(TransportTimeout, match="tokens of rank 1") as caught:
            runner.launch(batch, Sampler()).finish()
        assert list(caught.value.peers) == [1]
        assert not any(runner.load.take_routed())  # nothing of it counts

    run_ranks(2, body)


def test_who_gives_up_does_not_wait_for_the_deadline(lab: Lab) -> None:
    def body(rank: int, transport: Transport) -> None:
        runner = make_runner(lab[0], rank=rank, world_size=2, device="twin", dtype="bfloat16", step_timeout_s=60.0)
        runner.begin(transport, ExpertMap.contiguous(2, 8, 2))
        runner.begin_step(Decision(kind="run", epoch=0, num_tokens=(2, 2)))
        if rank == 1:
            return
        timer = threading.Timer(0.2, runner.abandon)
        timer.start()
        start_s = time.monotonic()
        batch = Batch((ScheduledSequence(make_sequence([3, 4], [0]), 0, 2, True),))
        with pytest.raises(TransportAborted, match="given up"):
            runner.launch(batch, Sampler()).finish()
        assert time.monotonic() - start_s < 30.0

    run_ranks(2, body)


def test_where_one_rank_cannot_map_all_take_the_large_way(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    original, refused = HostPeerMemory.map, threading.Event()

    def fail_once(self: HostPeerMemory, handle: bytes, **given: Any) -> int:
        if given.get("writable") and not refused.is_set():
            refused.set()
            raise OSError("peer access is not supported between these two devices")
        return original(self, handle, **given)

    monkeypatch.setattr(HostPeerMemory, "map", fail_once)
    submits = draw_submits(random.Random(f"{lab[0].name} unmapped"), 6, longest=20)
    result, cluster = run(lab, 3, submits)
    assert_as_alone(lab, submits, result)
    assert [small_of(engine.runner).num_replays for engine in cluster.engines] == [0] * 3


def test_every_rank_speaks_in_the_first_step_of_a_generation(lab: Lab) -> None:
    """Also one without work, and though a step's frame comes a step later: the server waits for it."""
    cluster = Cluster(make_config(lab[0], device="twin"), 2)
    cluster.inboxes[0].put(make_submit(0, [1, 2, 3], max_tokens=200, temperature=0.0))
    start_s = time.monotonic()
    cluster.pump(lambda run: bool(run.epochs[1]))
    assert len(cluster.run_result.outputs[0]) < 20, f"after {time.monotonic() - start_s:.2f} s"
    cluster.pump(lambda run: num_finished(run) == 1)
    cluster.stop()


def test_the_end_of_a_generation_ends_what_a_device_waits_for(lab: Lab) -> None:
    """Rank 1 agrees to steps and launches none; long before the deadline the controller ends the generation."""
    cluster = Cluster(make_config(lab[0], device="twin", step_timeout_s=60.0), 2)
    started, release = threading.Event(), threading.Event()

    def late(*_: object) -> None:
        started.set()
        assert release.wait(60)
        raise TransportAborted("this rank did not launch", rank=1)

    cluster.engines[1].runner.launch = late  # type: ignore[method-assign,assignment]
    cluster.inboxes[0].put(make_submit(0, [1, 2, 3], max_tokens=20, temperature=0.0))
    assert started.wait(30)
    start_s = time.monotonic()
    cluster.inboxes[0].put(EndGeneration(term=1, generation=1, reason="a test"))
    cluster.pump(lambda run: any(fault.rank == 0 for fault in run.faults))
    assert time.monotonic() - start_s < 20.0
    release.set()
    cluster.pump(lambda run: any(fault.rank == 1 for fault in run.faults))
    for inbox in cluster.inboxes:
        inbox.put(Stop())
    cluster.pump(lambda _: cluster._num_stopped == 2)


def test_what_peers_map_is_let_go_of_and_freed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped, freed = set[int](), list[int]()
    original_map, original_unmap, original_free = HostPeerMemory.map, HostPeerMemory.unmap, HostPeerMemory.free

    def map_it(self: HostPeerMemory, handle: bytes, **given: Any) -> int:
        address = original_map(self, handle, **given)
        if given.get("writable"):
            mapped.add(address)
        return address

    def unmap(self: HostPeerMemory, address: int) -> None:
        original_unmap(self, address)
        mapped.discard(address)

    def free(self: HostPeerMemory, address: int) -> None:
        assert not mapped, "freed while a peer maps it"
        original_free(self, address)
        freed.append(address)

    for name, spy in (("map", map_it), ("unmap", unmap), ("free", free)):
        monkeypatch.setattr(HostPeerMemory, name, spy)
    runners = [make_runner(lab[0], rank=rank, world_size=2, device="twin", dtype="bfloat16") for rank in range(2)]

    def generation(number: int) -> int:
        before = len(freed)

        def body(rank: int, transport: Transport) -> None:
            descriptor = GenerationDescriptor(term=1, generation=number, world_size=2, epoch=0, channel="")
            runners[rank].begin(transport, ExpertMap.contiguous(2, 8, 2), descriptor=descriptor)

        run_ranks(2, body)
        assert len(mapped) == 2
        for runner in runners:
            runner.leave()
        assert not mapped  # though the next generation has not begun
        return len(freed) - before

    assert [generation(number) for number in (1, 2, 3)] == [0, 2, 2]
