"""Lending between devices: a rank computes with another's experts where they lie, and no bit changes.

Through the twin; on a GPU (marker gpu) with its own library and CuPy, all ranks on that GPU.
"""

from __future__ import annotations

import random
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_model_version_steps import EPOCHS, STEPS_AN_EPOCH, Lab, entries_of, flip, lab, maps_of, run_alone, sequence_of
from test_replica_choice import LENDS, steps_of
from tiny_checkpoints import make_checkpoint, make_runner, make_sequence, run_ranks
from usable_gpu import skip_without_gpu

from switchgear_runtime.batch import Batch, ScheduledSequence
from switchgear_runtime.comm import mapped_slabs
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.errors import ConfigError, TransportError
from switchgear_runtime.header import Decision
from switchgear_runtime.model_runner import ModelRunner
from switchgear_runtime.moe.expert_map import ExpertMap

__all__ = ["lab"]  # a fixture
TIMEOUT_S = 60.0
NUM_EXPERTS = 9


@pytest.fixture(scope="module", params=["twin", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        skip_without_gpu()
        if find_spec("cupy") is None:
            pytest.skip("no CuPy, and so no handles")
    kind: str = request.param
    return kind


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    return make_checkpoint(root, "qwen3_moe", 5, dtype="bfloat16", num_experts=NUM_EXPERTS)


def runner_of(model_dir: Path, device: str, rank: int, world_size: int, **settings: Any) -> ModelRunner:
    """A lent expert costs what an own one does, or small steps would lend nothing."""
    given = {"num_kv_blocks": 24, "survive": 99, "lent_expert_rows": 11, **settings}
    return make_runner(model_dir, rank=rank, world_size=world_size, device=device, **given)


def foreign_rows(runner: ModelRunner, expert_map: ExpertMap) -> int:
    """Computed here since the last call, of experts that the map has elsewhere only."""
    shape = expert_map.num_layers, expert_map.num_experts
    rows_LE = np.array(runner.load.take_rows()).reshape(shape)
    held = [set(expert_map.local_experts(layer, runner.rank).tolist()) for layer in range(shape[0])]
    return sum(int(rows_LE[layer, e]) for layer in range(shape[0]) for e in range(shape[1]) if e not in held[layer])


def alone(model_dir: Path, device: str, seed: int, world_size: int) -> list[list[torch.Tensor]]:
    def run(_rank: int, transport: Transport) -> list[list[torch.Tensor]]:
        runner = runner_of(model_dir, device, 0, 1)
        runner.begin(transport, ExpertMap.contiguous(2, NUM_EXPERTS, 1))
        runner.meet(timeout_s=TIMEOUT_S)
        assert not runner.lends
        return [[runner.forward(batch) for batch in steps_of(seed, rank)] for rank in range(world_size)]

    (logits,) = run_ranks(1, run)
    return logits


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("choice", ["waterfill", "lp"])
def test_no_lending_map_or_flip_changes_a_bit(model_dir: Path, device: str, world_size: int, choice: str) -> None:
    """A new map before every second step; what the maps of the past held is pulled out of each other's memory."""
    seed = random.SystemRandom().randrange(1 << 30)
    expected = alone(model_dir, device, seed, world_size)
    for lending in (0, 2):

        def run(rank: int, transport: Transport, lending: int = lending) -> tuple[list[torch.Tensor], int]:
            runner = runner_of(model_dir, device, rank, world_size, replica_choice=choice, lending=lending)
            rng = np.random.default_rng(seed)

            def draw(epoch: int) -> ExpertMap:
                num_redundant = int(rng.integers(0, 8))
                return ExpertMap.random(rng, 2, NUM_EXPERTS, world_size, num_redundant=num_redundant, epoch=epoch)

            runner.begin(transport, draw(0))
            runner.meet(timeout_s=TIMEOUT_S)
            assert runner.lends == (lending > 0)
            logits, num_foreign = [], 0
            for step, batch in enumerate(steps_of(seed, rank)):
                if step % 2:
                    runner.flip(runner.stage(draw(step)))
                runner.begin_step(LENDS)
                logits.append(runner.forward(batch))
                num_foreign += foreign_rows(runner, runner.expert_map)
            transport.barrier(timeout_s=TIMEOUT_S)
            runner.leave()
            assert not runner.lends
            return logits, num_foreign

        results = run_ranks(world_size, run)
        for rank, (logits, _) in enumerate(results):
            for step, (ours, reference) in enumerate(zip(logits, expected[rank], strict=True)):
                assert torch.equal(ours, reference), f"seed {seed}, rank {rank}, step {step}, lending {lending}"
        if not lending:
            assert [foreign for _, foreign in results] == [0] * world_size


def hot_on_rank_0(num_ranks: int) -> ExpertMap:
    rows = np.full((2, num_ranks, NUM_EXPERTS), -1, np.int32)
    rows[:, 0] = np.arange(NUM_EXPERTS)
    return ExpertMap.of(rows.reshape(2, -1), num_ranks=num_ranks, num_experts=NUM_EXPERTS, epoch=0)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_rank_without_experts_computes_with_those_of_another(model_dir: Path, device: str, world_size: int) -> None:
    def run(rank: int, transport: Transport) -> tuple[int, list[torch.Tensor]]:
        runner = runner_of(model_dir, device, rank, world_size)
        runner.begin(transport, hot_on_rank_0(world_size))
        runner.meet(timeout_s=TIMEOUT_S)
        logits = []
        for decision in (Decision(kind="run", epoch=0, num_tokens=(1000,)), LENDS):
            runner.begin_step(decision)
            sequence = make_sequence([7] * 80, list(range(5)))
            logits.append(runner.forward(Batch((ScheduledSequence(sequence, 0, 80, True),))))
            rows = sum(runner.load.take_rows())
        transport.barrier(timeout_s=TIMEOUT_S)
        return rows, logits

    results = run_ranks(world_size, run)
    for _, (without, lent) in results:
        assert torch.equal(without, lent)
    rows = [rows for rows, _ in results]
    if device == "twin":  # on a GPU a read costs more rows than this step has
        assert max(rows) < 0.7 * sum(rows), rows
    assert sum(count > 0 for count in rows) > 1


def test_experts_of_every_version_are_lent(lab: Lab, device: str) -> None:
    """Swaps come, live beside the checkpoint's weights, and settle; each sequence keeps the bits of its version."""
    seed, world_size = random.SystemRandom().randrange(1 << 30), 3
    expected = run_alone(lab, seed, world_size, device=device)
    maps = maps_of(seed, world_size)

    def run(rank: int, transport: Transport) -> tuple[list[list[torch.Tensor]], int]:
        runner = runner_of(lab.models[0], device, rank, world_size)
        runner.begin(transport, maps[0])
        runner.meet(timeout_s=TIMEOUT_S)
        entries = entries_of(seed, rank)
        sequences, logits = [sequence_of(entry) for entry in entries], [[] for _ in entries]
        num_foreign = 0
        for step in range(len(EPOCHS) * STEPS_AN_EPOCH):
            epoch = step // STEPS_AN_EPOCH
            if epoch and step % STEPS_AN_EPOCH == 0:
                flip(runner, maps[epoch], lab.versions(*EPOCHS[epoch]))
            runner.begin_step(LENDS)
            due = [
                (index, ScheduledSequence(sequences[index], start, size, True))
                for index, entry in enumerate(entries)
                for when, start, size in entry.steps()
                if when == step
            ]
            rows = runner.forward(Batch(tuple(scheduled for _, scheduled in due)))
            num_foreign += foreign_rows(runner, runner.expert_map)
            for (index, _), row in zip(due, rows, strict=True):
                logits[index].append(row)
        transport.barrier(timeout_s=TIMEOUT_S)
        return logits, num_foreign

    for rank, (ours, _) in enumerate(run_ranks(world_size, run)):
        for index, (steps, reference) in enumerate(zip(ours, expected[rank], strict=True)):
            for step, (row, wanted) in enumerate(zip(steps, reference, strict=True)):
                assert torch.equal(row, wanted), f"seed {seed}, rank {rank}, sequence {index}, step {step}"


def test_a_generation_without_a_rank_maps_anew(model_dir: Path, device: str) -> None:
    """Rank 2 is lost: the others give its memory back, load what it had, and lend among themselves."""
    seed = random.SystemRandom().randrange(1 << 30)
    batch = Batch((ScheduledSequence(make_sequence([7] * 80, list(range(5))), 0, 80, True),))
    first = ExpertMap.random(np.random.default_rng(seed), 2, NUM_EXPERTS, 3)

    def begin(rank: int, transport: Transport) -> tuple[ModelRunner, torch.Tensor]:
        runner = runner_of(model_dir, device, rank, 3)
        runner.begin(transport, first)
        runner.meet(timeout_s=TIMEOUT_S)
        runner.begin_step(LENDS)
        return runner, runner.forward(batch)

    before = run_ranks(3, begin)

    def go_on(rank: int, transport: Transport) -> tuple[torch.Tensor, int]:
        runner, _ = before[rank]
        runner.begin(transport, hot_on_rank_0(2).with_epoch(1))
        assert not runner.lends
        runner.meet(timeout_s=TIMEOUT_S)
        assert runner.lends
        runner.load.take_rows()
        runner.begin_step(LENDS)
        logits = runner.forward(batch)
        transport.barrier(timeout_s=TIMEOUT_S)
        return logits, foreign_rows(runner, runner.expert_map)

    for rank, (logits, foreign) in enumerate(run_ranks(2, go_on)):
        assert torch.equal(logits, before[rank][1]), f"seed {seed}"
        assert (foreign > 0) == (rank == 1)


def test_ranks_on_two_machines_lend_nothing(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = threading.local()
    monkeypatch.setattr(mapped_slabs, "_this_host", lambda: hosts.name)

    def run(rank: int, transport: Transport) -> None:
        hosts.name = f"host {rank}"
        runner = runner_of(model_dir, "twin", rank, 2)
        runner.begin(transport, hot_on_rank_0(2))
        runner.meet(timeout_s=TIMEOUT_S)
        assert not runner.lends
        assert runner.experts.pull(1 - rank, 0, 3, None, lambda _: None) is None
        runner.flip(runner.stage(ExpertMap.contiguous(2, NUM_EXPERTS, 2, epoch=1)))
        runner.begin_step(Decision(kind="run", epoch=1, num_tokens=(1000,)))
        runner.forward(Batch((ScheduledSequence(make_sequence([7] * 80, list(range(5))), 0, 80, True),)))
        assert foreign_rows(runner, runner.expert_map) == 0

    run_ranks(2, run)


def test_a_directory_that_is_not_the_maps_is_refused(model_dir: Path) -> None:
    """A kernel would read what it points to."""

    def run(rank: int, transport: Transport) -> None:
        runner = runner_of(model_dir, "twin", rank, 2)
        runner.begin(transport, ExpertMap.contiguous(2, NUM_EXPERTS, 2))
        runner.meet(timeout_s=TIMEOUT_S)
        staged = runner.stage(ExpertMap.contiguous(2, NUM_EXPERTS, 2, epoch=1))
        if rank == 1:
            slots = np.full((2, 5), 0, np.int32)
            slots[1, 2] = 10_000
            transport.all_to_all_v([slots.tobytes()] * 2, timeout_s=TIMEOUT_S)
            return
        with pytest.raises(TransportError, match="the slots that rank 1 told are not those of the map of epoch 1"):
            runner.flip(staged)
        assert runner.epoch == 0

    run_ranks(2, run)


def test_settings_that_cannot_work(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="lent_expert_rows=-1 must not be negative"):
        runner_of(model_dir, "twin", 0, 1, lent_expert_rows=-1)
    assert runner_of(model_dir, "twin", 0, 1, lent_expert_rows=7).replica_choice.balance.lent_price == 7
    assert runner_of(model_dir, "twin", 0, 1, lent_expert_rows=None).replica_choice.balance.lent_price == 11
