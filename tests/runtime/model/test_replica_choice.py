"""No replica choice and no lending changes a bit: any ranks and map against one rank, native and op by op."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoints import make_checkpoint, make_sequence, run_ranks

from switchgear_runtime.batch import Batch, ScheduledSequence
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.header import Decision
from switchgear_runtime.model.checkpoint import Checkpoint
from switchgear_runtime.model_runner import ModelRunner
from switchgear_runtime.moe.expert_map import ExpertMap

NUM_STEPS = 5
LENDS = Decision(kind="run", epoch=0, num_tokens=(1000,), lends=True)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints"), "qwen3_moe", 5, num_experts=9)


def make_runner(model_dir: Path, rank: int, world_size: int, *, native: bool = True, **settings: Any) -> ModelRunner:
    checkpoint = Checkpoint(model_dir)
    config = EngineConfig(model=str(model_dir), num_kv_blocks=24, **settings)
    return ModelRunner(config, checkpoint.spec, checkpoint, rank=rank, world_size=world_size, native=native)


def steps_of(seed: int, rank: int) -> list[Batch]:
    """A rank's own: a long prompt of few different tokens, so that some experts are hot, then decode; maybe nothing."""
    rng = random.Random(f"{seed} {rank}")
    if rng.random() < 0.2:
        return [Batch()] * NUM_STEPS
    prompt = rng.choices(rng.sample(range(60), 3), k=rng.randint(20, 90))
    sequence = make_sequence([*prompt, *rng.choices(range(60), k=NUM_STEPS)], rng.sample(range(24), 8))
    first = Batch((ScheduledSequence(sequence, 0, len(prompt), True),))
    return [first, *(Batch((ScheduledSequence(sequence, len(prompt) + i, 1, True),)) for i in range(NUM_STEPS - 1))]


def run_alone(model_dir: Path, seed: int, world_size: int) -> list[list[torch.Tensor]]:
    def run(_rank: int, transport: Transport) -> list[list[torch.Tensor]]:
        runner = make_runner(model_dir, 0, 1)
        runner.begin(transport, ExpertMap.contiguous(runner.spec.num_moe_layers, runner.spec.num_experts, 1))
        return [[runner.forward(batch) for batch in steps_of(seed, rank)] for rank in range(world_size)]

    (logits,) = run_ranks(1, run)
    return logits


@pytest.mark.parametrize("choice", ["static", "hash", "waterfill", "lp"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_any_choice_gives_the_bits_of_one_rank(model_dir: Path, world_size: int, choice: str) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    expected = run_alone(model_dir, seed, world_size)
    moved = {}
    for native in (True, False):
        for lending in (0, 2):

            def run(
                rank: int, transport: Transport, native: bool = native, lending: int = lending
            ) -> tuple[list[torch.Tensor], int]:
                runner = make_runner(model_dir, rank, world_size, native=native, replica_choice=choice, lending=lending)
                rng = np.random.default_rng(seed)
                shape = (runner.spec.num_moe_layers, runner.spec.num_experts, world_size)
                expert_map = ExpertMap.random(rng, *shape, num_redundant=int(rng.integers(0, 8)))
                runner.begin(transport, expert_map)
                assert runner.lends == (lending > 0 and choice in ("waterfill", "lp"))
                logits = []
                for batch in steps_of(seed, rank):
                    runner.begin_step(LENDS)
                    logits.append(runner.forward(batch))
                rows_LE = np.array(runner.load.take_rows()).reshape(shape[:2])
                held = [set(expert_map.local_experts(layer, rank).tolist()) for layer in range(shape[0])]
                foreign = sum(
                    rows_LE[layer, e] for layer in range(shape[0]) for e in range(shape[1]) if e not in held[layer]
                )
                return logits, int(foreign)

            results = run_ranks(world_size, run)
            for rank, (logits, _) in enumerate(results):
                for step, (ours, alone) in enumerate(zip(logits, expected[rank], strict=True)):
                    where = f"seed {seed}, rank {rank}, step {step}, native {native}, lending {lending}"
                    assert torch.equal(ours, alone), where
            moved[native, lending] = [foreign for _, foreign in results]
    assert moved[True, 0] == moved[False, 0] == [0] * world_size
    assert moved[True, 2] == moved[False, 2]  # the same rows are lent
    if choice in ("static", "hash"):
        assert sum(moved[True, 2]) == 0


def test_a_hot_set_on_one_rank_is_computed_by_both(model_dir: Path) -> None:
    """All tokens equal: their experts' rows split over two ranks, though all lie on the first one."""

    def run(rank: int, transport: Transport) -> tuple[int, list[torch.Tensor]]:
        runner = make_runner(model_dir, rank, 2)
        layers, experts = runner.spec.num_moe_layers, runner.spec.num_experts
        row = np.full((2, experts), -1, np.int32)
        row[0] = np.arange(experts)
        expert_map = ExpertMap.from_json(
            {
                "epoch": 0,
                "num_ranks": 2,
                "num_experts": experts,
                "physical_to_logical": [row.reshape(-1).tolist()] * layers,
            }
        )
        runner.begin(transport, expert_map)
        logits = []
        for mode in (Decision(kind="run", epoch=0, num_tokens=(1000,)), LENDS):
            runner.begin_step(mode)
            logits.append(
                runner.forward(Batch((ScheduledSequence(make_sequence([7] * 80, list(range(5))), 0, 80, True),)))
            )
            rows = sum(runner.load.take_rows())
        return rows, logits

    results = run_ranks(2, run)
    assert torch.equal(*results[0][1])
    assert torch.equal(*results[1][1])
    first, second = (rows for rows, _ in results)
    assert second > 0.3 * (first + second), f"{first} and {second} rows"


def test_settings_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match="lending=-1"):
        EngineConfig(lending=-1)
    with pytest.raises(ConfigError, match="replica_choice='best'"):
        EngineConfig(replica_choice="best")
