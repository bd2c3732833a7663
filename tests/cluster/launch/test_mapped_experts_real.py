"""Rank processes on devices read each other's memory: they lend and pull experts through it, and a death changes no token.

The twin's devices are host memory, which processes map as GPUs' is mapped (comm/host_memory.py).
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from cluster_rig import LogprobCollector, play, rank_pids, until
from test_migration_real import STEP_TIMEOUT_S, MovingCluster
from tiny_cluster import make_tiny_checkpoint

from switchgear.cluster import Cluster
from switchgear_runtime.messages import FromRank, StepFrame
from switchgear_runtime.moe.expert_map import EMPTY
from switchgear_runtime.sampling_params import SamplingParams

pytestmark = pytest.mark.ranks
SEED = random.SystemRandom().randrange(1 << 20)
NUM_TOKENS = 60
EXPERT_BYTES = 3 * 16 * 32 * 2
LARGE = {"small_step_tokens": 20, "async_scheduling": False}  # prompts make large steps, which lend
HOT_TOKENS = (7, 7, 11, 19, 41, 83)  # of one alone, the few experts may by chance be spread evenly
NUM_PROMPTS = 6 + len(HOT_TOKENS)
Answers = dict[int, tuple[list[int], list[str]]]


class DeviceCluster(MovingCluster):
    """Small, on the twin; counts the rows that ranks computed of experts which the first map has elsewhere."""

    shape = (2, 8)

    def __init__(self, num_ranks: int, model_dir: Path, **settings: Any) -> None:
        given = {"model": str(model_dir), "device": "twin", "lent_expert_rows": 11, "max_num_batched_tokens": 64}
        super().__init__(num_ranks, step_timeout_s=STEP_TIMEOUT_S, **given, **LARGE, **settings)
        self.foreign_rows: Counter[int] = Counter()  # by rank, while the first map was in force

    def _on_message(self, rank: int, message: FromRank) -> None:
        if isinstance(message, StepFrame) and message.expert_rows and self.epoch == 0:
            rows_LE = np.array(message.expert_rows).reshape(self.shape)
            for layer in range(self.shape[0]):
                held = self.in_force.local_experts(layer, rank)
                self.foreign_rows[rank] += int(np.delete(rows_LE[layer], held[held != EMPTY]).sum())
        super()._on_message(rank, message)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), SEED)


def begin_requests(cluster: Cluster) -> LogprobCollector:
    draw = random.Random(SEED)
    prompts = [[draw.randrange(1, 96) for _ in range(draw.randrange(5, 40))] for _ in range(6)]
    prompts += [[token] * 60 for token in HOT_TOKENS]  # a set of experts each, hotter than the rest
    collector = LogprobCollector()
    params = SamplingParams(temperature=0.8, seed=SEED, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=1)
    cluster.core.submit(prompts, params, sink=collector)
    return collector


async def answers_of(collector: LogprobCollector) -> Answers:
    await collector.all_finished(NUM_PROMPTS, 90)
    return {index: (collector.token_ids[index], collector.logprobs[index]) for index in range(NUM_PROMPTS)}


@pytest.fixture(scope="module")
def alone(model_dir: Path) -> Answers:
    """Of one rank."""
    found: Answers = {}

    async def scenario(cluster: Cluster) -> None:
        found.update(await answers_of(begin_requests(cluster)))

    play(DeviceCluster(1, model_dir), scenario)
    return found


@pytest.mark.parametrize(
    "num_ranks", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
)
def test_processes_lend_and_pull_through_mapped_memory(num_ranks: int, model_dir: Path, alone: Answers) -> None:
    async def scenario(cluster: Cluster) -> None:
        assert isinstance(cluster, DeviceCluster)
        assert await answers_of(begin_requests(cluster)) == alone, f"seed {SEED}"
        await until(lambda: sum(cluster.foreign_rows.values()) > 0, 20)  # experts were lent
        collector = begin_requests(cluster)
        for source in ("auto", "peer", "auto"):
            epoch = cluster.stage(source=source)
            await until(lambda epoch=epoch: cluster.in_force.epoch == epoch, 30)  # type: ignore[misc]
        assert await answers_of(collector) == alone, f"seed {SEED}"
        assert not cluster.refused
        sources = sum((Counter(message.sources) for message in cluster.staged), Counter[str]())
        assert set(sources) == {"mapped"}, f"seed {SEED}: {sources}"
        assert sum(message.moved_bytes for message in cluster.staged) == EXPERT_BYTES * sources["mapped"] > 0
        cluster.check()

    play(DeviceCluster(num_ranks, model_dir), scenario)


def test_killed_in_the_middle_of_a_pull(model_dir: Path, alone: Answers) -> None:
    """Each map takes seconds to pull, and a rank is gone before that, a source of some and destination of others."""
    draw = random.Random(SEED)

    async def scenario(cluster: Cluster) -> None:
        assert isinstance(cluster, DeviceCluster)
        for _ in range(2):
            collector = begin_requests(cluster)
            await collector.until(lambda: len(collector.token_ids) == NUM_PROMPTS)  # noqa: B023 -- awaited here
            before, num_staged = cluster.in_force, len(cluster.staged)
            cluster.stage(source="peer", bytes_per_s=EXPERT_BYTES)  # one expert a second
            await asyncio.sleep(0.1 + draw.random())
            victim = rank_pids(cluster)[draw.randrange(3)]
            os.kill(victim, signal.SIGKILL)
            await until(lambda: not cluster.ready, STEP_TIMEOUT_S + 3)
            await until(lambda: cluster.ready, 60)
            assert await answers_of(collector) == alone, f"seed {SEED}"
            assert not psutil.pid_exists(victim)
            assert np.array_equal(cluster.in_force.physical_to_logical_LP, before.physical_to_logical_LP)
            assert len(cluster.staged) - num_staged < 3
        epoch = cluster.stage(source="peer")  # the generation that followed maps anew
        await until(lambda: cluster.in_force.epoch == epoch, 30)
        assert all(set(message.sources) <= {"mapped"} for message in cluster.staged)
        assert await answers_of(begin_requests(cluster)) == alone, f"seed {SEED}"
        cluster.check()

    play(DeviceCluster(3, model_dir), scenario, timeout_s=300)
