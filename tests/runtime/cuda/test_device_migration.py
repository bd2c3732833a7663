"""Experts on devices move while requests run: out of each other's memory, through slots that nobody reads any more.

Engines as threads on the twin. The pools have no slot to spare, so each map takes what the one before gave up.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scheduling import make_submit
from tiny_checkpoints import run_ranks
from tiny_cluster import Alone, Cluster, make_config, make_runner, make_tiny_checkpoint

from switchgear_runtime import model_runner
from switchgear_runtime.comm.host_memory import HostPeerMemory
from switchgear_runtime.cuda import backend, device_memory
from switchgear_runtime.cuda.device_memory import DeviceMemory
from switchgear_runtime.cuda.expert_pool import ExpertPool, Slot
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.messages import DropMap, Submit
from switchgear_runtime.model import footprint
from switchgear_runtime.model_runner import ModelRunner
from switchgear_runtime.moe.expert_map import EMPTY, ExpertMap

Lab = tuple[Path, Alone]
NUM_LAYERS, NUM_EXPERTS = 2, 8
DURATION_S = 6.0


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    seed = random.randrange(1 << 20)  # in the directory's name, which every failure shows
    model_dir = make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed)
    return model_dir, Alone(model_dir, device="twin")


class Watched:
    """A runner that knows how many rows it computed of experts that its map has elsewhere."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.foreign_rows = 0
        self._add_step = runner.load.add_step
        runner.load.add_step = self._count  # type: ignore[method-assign]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def _count(self, tenants: Any, routed_NLE: Any, rows_LE: Any) -> None:
        self._add_step(tenants, routed_NLE, rows_LE)
        for layer in range(NUM_LAYERS):
            held = self.runner.expert_map.local_experts(layer, self.runner.rank)
            self.foreign_rows += int(np.delete(rows_LE[layer], held[held != EMPTY]).sum())


def addresses_in_use(runner: ModelRunner, owner: int) -> set[int]:
    """Slots of rank `owner` that this rank may compute with in place."""
    assert runner._peers is not None
    assert runner._device is not None
    placements = runner._device.placements
    assert placements is not None
    starts = runner._peers._addresses_R[owner].tolist() if runner._peers._addresses_R else []
    index_of = {address + 256: index for index, address in enumerate(starts)}
    lent = placements.addresses_L2S[:, 0, placements.num_map_slots :].reshape(-1).tolist()
    return {index_of[address] for address in lent if address in index_of}


def swapped(expert_map: ExpertMap, draw: random.Random, epoch: int) -> ExpertMap:
    """In each layer two ranks change one expert with each other, so that each needs one slot more for a while."""
    rows_LRS = np.array(expert_map.physical_to_logical_LP).reshape(NUM_LAYERS, expert_map.num_ranks, -1)
    for row_RS in rows_LRS:
        a, b = draw.sample(range(expert_map.num_ranks), 2)
        i, j = (draw.choice(np.flatnonzero(row_RS[rank] != EMPTY).tolist()) for rank in (a, b))
        row_RS[a, i], row_RS[b, j] = row_RS[b, j], row_RS[a, i]
    physical_LP = rows_LRS.reshape(NUM_LAYERS, -1)
    return ExpertMap.of(physical_LP, num_ranks=expert_map.num_ranks, num_experts=NUM_EXPERTS, epoch=epoch)


def tight_cluster(
    lab: Lab, world_size: int, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[Cluster, list[Watched]]:
    monkeypatch.setattr(model_runner, "LIVE_SWAPS_MAX", 0)  # no room for versions either
    watched: list[Watched] = []
    owners: dict[ExpertPool, int] = {}
    take = ExpertPool.take

    def checked_take(pool: ExpertPool, *waits: Any) -> Slot:
        slot = take(pool, *waits)
        for one in watched if pool in owners else []:
            used = addresses_in_use(one.runner, owners[pool]) if one.rank != owners[pool] else set()
            assert slot.index not in used, f"rank {one.rank} may still read slot {slot.index} of rank {owners[pool]}"
        return slot

    def wrap(runner: ModelRunner, rank: int) -> Watched:
        watched.append(Watched(runner))
        owners[runner._store.pool] = rank
        return watched[-1]

    monkeypatch.setattr(ExpertPool, "take", checked_take)
    sizes = {"survive": 0, "lent_expert_rows": 11, "max_num_seqs": 8, "max_num_batched_tokens": 24}
    config = make_config(lab[0], device="twin", **sizes, **settings)
    return Cluster(config, world_size, wrap=wrap), watched


def wait_for_epoch(cluster: Cluster, epoch: int) -> None:
    ranks = range(cluster.world_size)
    cluster.pump(lambda run: all(run.epochs[rank][-1:] == [epoch] for rank in ranks) or bool(run.refused or run.faults))


LARGE = {"small_step_tokens": 0, "async_scheduling": False}  # steps that lend, each over before the next is agreed on


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        pytest.param(2, LARGE, marks=pytest.mark.slow),
        pytest.param(3, LARGE, marks=pytest.mark.slow),
        (4, LARGE),
        (3, {}),
    ],
    ids=str,
)
def test_maps_under_load_through_tight_pools(
    lab: Lab, world_size: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last without lending: graphs, each launched while the step before runs, and the map flipped between them."""
    seed = random.SystemRandom().randrange(1 << 30)
    draw = random.Random(seed)
    cluster, watched = tight_cluster(lab, world_size, monkeypatch, **settings)
    prompts = [[draw.randrange(1, 96) for _ in range(draw.randrange(1, 30))] for _ in range(12)]
    sent: dict[int, Submit] = {}
    expert_map = ExpertMap.contiguous(NUM_LAYERS, NUM_EXPERTS, world_size)

    def num_done() -> int:
        return sum(outputs[-1].finish_reason is not None for outputs in cluster.run_result.outputs.values() if outputs)

    deadline_s = time.monotonic() + DURATION_S
    while time.monotonic() < deadline_s or expert_map.epoch < 8:
        while len(sent) - num_done() < 2 * world_size:
            index = draw.randrange(len(prompts))
            submit = make_submit(
                len(sent), prompts[index], max_tokens=8 + index, temperature=0.8 * (index % 2), seed=index
            )
            sent[submit.sequence_id] = submit
            cluster.inboxes[draw.randrange(world_size)].put(submit)
        expert_map = swapped(expert_map, draw, expert_map.epoch + 1)
        cluster.stage(expert_map, source=draw.choice(["auto", "peer"]), bytes_per_s=draw.choice([None, 1 << 20]))
        wait_for_epoch(cluster, expert_map.epoch)
        assert not cluster.run_result.refused, f"seed {seed}"
        assert not cluster.run_result.faults, f"seed {seed}"
    cluster.pump(lambda _: num_done() == len(sent))
    run = cluster.stop()
    for sequence_id, submit in sent.items():
        expected = [(output.token_id, output.logprob) for output in lab[1].outputs(submit)]
        found = [(output.token_id, output.logprob) for output in run.outputs[sequence_id]]
        assert found == expected, f"seed {seed}: sequence {sequence_id} after {expert_map.epoch} flips"
    sources = sum((Counter(staged.sources) for staged in run.staged), Counter[str]())
    assert set(sources) == {"mapped"}, f"seed {seed}: {sources}"
    assert sources["mapped"] == sum(staged.num_experts for staged in run.staged) > world_size
    if settings:
        assert sum(one.foreign_rows for one in watched) > 0, f"seed {seed}: nothing was lent"
    for one in watched:
        pool, peers = one.runner._store.pool, one.runner._peers
        assert sum(pool._generations) > pool.num_slots  # slots were used again
        assert peers is not None
        assert peers.pulled_bytes == sum(staged.moved_bytes for staged in run.staged if staged.rank == one.rank)
        assert isinstance(pool.memory, HostPeerMemory)
        assert not pool.memory._mapped  # given back as the engine ended


def test_slots_are_taken_again_only_when_every_rank_has_let_go(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 is slow to flip, and rank 0 wants the slots that it has given up for the next map meanwhile."""
    cluster, watched = tight_cluster(lab, 2, monkeypatch)
    cluster.pump(lambda run: run.num_parked >= 2)
    draw = random.Random(lab[0].name)
    first = swapped(ExpertMap.contiguous(NUM_LAYERS, NUM_EXPERTS, 2), draw, 1)
    second = swapped(first, draw, 2)
    device = watched[1].runner._device
    assert device is not None
    place, num_slow = device.place, 0

    def slow_place(placements: Any) -> None:
        nonlocal num_slow
        if num_slow == 0:
            num_slow += 1
            cluster.stage(second)
            time.sleep(0.5)
        place(placements)

    monkeypatch.setattr(device, "place", slow_place)
    cluster.stage(first)
    wait_for_epoch(cluster, 2)
    run = cluster.stop()
    assert not run.refused
    assert not run.faults
    assert num_slow == 1


def test_an_idle_cluster_gives_slots_back_and_flips_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks for anything, and each map needs what only the one before it gave up."""
    cluster, _ = tight_cluster(lab, 2, monkeypatch)
    draw = random.Random(lab[0].name)
    expert_map = ExpertMap.contiguous(NUM_LAYERS, NUM_EXPERTS, 2)
    cluster.pump(lambda run: run.num_parked >= 2)
    for epoch in range(1, 6):
        expert_map = swapped(expert_map, draw, epoch)
        cluster.stage(expert_map)
        wait_for_epoch(cluster, epoch)
    run = cluster.stop()
    assert not run.refused
    assert not run.faults


def test_what_was_staged_and_dropped_gives_its_slots_back(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 2 never hears of the map, so the others wait with it until it is dropped."""
    cluster, _ = tight_cluster(lab, 3, monkeypatch)
    cluster.pump(lambda run: run.num_parked >= 3)
    first = ExpertMap.contiguous(NUM_LAYERS, NUM_EXPERTS, 3)
    draw = random.Random(lab[0].name)
    for epoch in (1, 3, 5):
        cluster.stage(swapped(first, draw, epoch), but=2)
        cluster.pump(lambda run, epoch=epoch: [staged.epoch for staged in run.staged].count(epoch) == 2)  # type: ignore[misc]
        for inbox in cluster.inboxes:
            inbox.put(DropMap(1, epoch))
        first = swapped(first, draw, epoch + 1)
        cluster.stage(first)
        wait_for_epoch(cluster, epoch + 1)
    run = cluster.stop()
    assert not run.refused
    assert not run.faults


def test_a_map_that_the_pool_cannot_hold_is_refused_by_name(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, _ = tight_cluster(lab, 2, monkeypatch)
    cluster.pump(lambda run: run.num_parked >= 2)
    rows = np.concatenate([np.arange(NUM_EXPERTS), np.arange(NUM_EXPERTS)[::-1]])
    whole = ExpertMap.of(np.tile(rows, (NUM_LAYERS, 1)), num_ranks=2, num_experts=NUM_EXPERTS, epoch=1)
    cluster.stage(whole)
    run = cluster.pump(lambda run: len(run.refused) == 2)
    assert all("the slot pool has 10" in refused.reason for refused in run.refused)
    assert all("raise survive" in refused.reason for refused in run.refused)
    cluster.stage(swapped(ExpertMap.contiguous(NUM_LAYERS, NUM_EXPERTS, 2), random.Random(1), 2))
    cluster.pump(lambda run: run.epochs[0][-1:] == run.epochs[1][-1:] == [2])
    assert not cluster.stop().faults


def test_a_second_generation_maps_anew(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, watched = tight_cluster(lab, 3, monkeypatch)
    submit = make_submit(0, [5, 6, 7, 8], max_tokens=24, seed=3)
    cluster.inboxes[1].put(submit)
    cluster.pump(lambda run: len(run.outputs[0]) > 3)
    mapped = [set(one.runner._store.pool.memory._mapped) for one in watched]
    cluster.begin(2, swapped(ExpertMap.contiguous(NUM_LAYERS, NUM_EXPERTS, 3), random.Random(2), 1))
    cluster.pump(lambda run: bool(run.outputs[0]) and run.outputs[0][-1].finish_reason is not None)
    for one, before in zip(watched, mapped, strict=True):
        now = set(one.runner._store.pool.memory._mapped)
        assert len(now) == len(before) == 2  # one slab of each of the others
        assert one.runner.lends
    run = cluster.stop()
    expected = [(output.token_id, output.logprob) for output in lab[1].outputs(submit)]
    assert [(output.token_id, output.logprob) for output in run.outputs[0]] == expected


# --- how large a pool is --------------------------------------------------------------------------------------------


def runner_of(lab: Lab, rank: int = 0, world_size: int = 4, **settings: Any) -> ModelRunner:
    return make_runner(make_config(lab[0], device="twin", **settings), rank, world_size)


@pytest.mark.parametrize("survive", [0, 1, 99])
def test_a_pool_has_what_the_footprint_says_and_room_for_versions(lab: Lab, survive: int) -> None:
    runner = runner_of(lab, survive=survive)
    assert runner.pool_slots == footprint.pool_slots(runner.spec, 4, survive)
    assert runner._store.pool.num_slots == runner.pool_slots + model_runner.LIVE_SWAPS_MAX
    assert runner._store.pool.num_free == runner._store.pool.num_slots - NUM_LAYERS * NUM_EXPERTS // 4


def memory(free_bytes: int, total_bytes: int = 1 << 40) -> DeviceMemory:
    return DeviceMemory(name="a device", free_bytes=free_bytes, total_bytes=total_bytes)


def test_what_does_not_fit_is_refused_before_anything_is_loaded(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 0

    def all_but(num_bytes: int) -> Any:
        return classmethod(lambda _cls, _device: memory(num_bytes))

    for free in range(1 << 16, 1 << 24, 1 << 12):  # the smallest memory that is enough
        monkeypatch.setattr(DeviceMemory, "of", all_but(free))
        monkeypatch.setattr(ExpertPool, "grow", lambda *_: pytest.fail("it was taken"))
        try:
            runner_of(lab)
        except ConfigError as error:
            assert "a rank needs" in str(error)
            assert "expert slots" in str(error)
            assert "dense weights" in str(error)
            assert "KV cache" in str(error)
            assert "lower survive" in str(error)
        except pytest.fail.Exception:
            needed = free
            break
    runner_bytes = needed - (1 << 12)
    monkeypatch.undo()
    runner = runner_of(lab)
    dense = sum(weight.nbytes for weight in runner._store._dense.values())
    slabs = sum(slab.num_bytes for slab in runner._store.pool.slabs)
    caches = sum(tensor.nbytes for tensor in (*runner.kv_cache.k, *runner.kv_cache.v))
    assert runner_bytes < dense + slabs + caches <= needed


def test_pools_grow_when_ranks_are_gone_as_far_as_memory_goes(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for spare, expected in ((1 << 39, footprint.pool_slots), (1 << 30, None)):
        runner = runner_of(lab, survive=1)
        before = runner._store.pool.num_slots
        monkeypatch.setattr(DeviceMemory, "of", classmethod(lambda _cls, _device, spare=spare: memory(spare)))

        def begin(rank: int, transport: Any, runner: ModelRunner = runner) -> None:
            mine = runner if rank == 0 else runner_of(lab, rank, 4, survive=1)
            mine.begin(transport, ExpertMap.contiguous(NUM_LAYERS, NUM_EXPERTS, 2))
            mine.meet(timeout_s=10.0)
            assert mine.lends
            transport.barrier(timeout_s=10.0)

        run_ranks(2, begin)
        wanted = NUM_LAYERS * NUM_EXPERTS if expected is not None else before - model_runner.LIVE_SWAPS_MAX
        assert runner.pool_slots == wanted
        assert len(runner._store.pool.slabs) == (2 if expected is not None else 1)
        monkeypatch.undo()


def test_a_gpu_without_cupy_has_pools_that_nobody_maps(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would be; here on host memory that torch gives."""
    monkeypatch.setattr(backend, "peer_memory_of", lambda _: None)
    submit = make_submit(0, [5, 6, 7, 8], max_tokens=12, seed=3)
    cluster = Cluster(make_config(lab[0], device="twin", lent_expert_rows=11), 2)
    cluster.inboxes[0].put(submit)
    cluster.stage(swapped(ExpertMap.contiguous(NUM_LAYERS, NUM_EXPERTS, 2), random.Random(1), 1))
    wait_for_epoch(cluster, 1)
    cluster.pump(lambda run: bool(run.outputs[0]) and run.outputs[0][-1].finish_reason is not None)
    assert not any(engine.runner.lends for engine in cluster.engines)
    run = cluster.stop()
    assert all(staged.sources == {"disk": staged.num_experts} for staged in run.staged)
    expected = [(output.token_id, output.logprob) for output in lab[1].outputs(submit)]
    assert [(output.token_id, output.logprob) for output in run.outputs[0]] == expected


def test_prices_of_a_gpu_charge_the_link() -> None:
    assert backend.GPU_PRICES.lent_expert_rows > 5 * backend.GPU_PRICES.expert_rows


def test_memory_that_others_give_back_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    device, free = torch.device("cpu"), iter((5, 5, 20))
    monkeypatch.setattr(
        DeviceMemory, "of", classmethod(lambda _cls, _device: replace(memory(next(free)), device=device))
    )
    monkeypatch.setattr(device_memory, "POLL_S", 0.001)
    assert replace(memory(5), device=device).after_others(10, timeout_s=60.0).free_bytes == 20
    assert replace(memory(5), device=device).after_others(10, timeout_s=0.0).free_bytes == 5
    assert memory(5).after_others(5, timeout_s=60.0).free_bytes == 5
    assert replace(memory(5, 9), device=device).after_others(10, timeout_s=60.0).free_bytes == 5  # never
