"""Experts move between real rank processes while they serve: kill -9 of whoever takes part leaves no mix and no changed token."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
from cluster_rig import SMALL, play, rank_pids, submit, until

from switchgear.actions import Action, SendTo
from switchgear.cluster import Cluster
from switchgear.config import split_settings
from switchgear_runtime.messages import BeginGeneration, FromRank, MapRefused, MapStaged, StageMap, StepFrame
from switchgear_runtime.moe.expert_map import ExpertMap

pytestmark = pytest.mark.ranks
PROMPTS = ["The sun rises in the", "def fibonacci(n):", "Once upon a time", "1 + 1 ="]
NUM_TOKENS = 200
NUM_LAYERS, NUM_EXPERTS = 4, 32  # of the bundled model
STEP_TIMEOUT_S = 3.0


class MovingCluster(Cluster):
    """Its server orders maps by hand and remembers what the ranks say."""

    shape = (NUM_LAYERS, NUM_EXPERTS)

    def __init__(self, num_ranks: int, **settings: Any) -> None:
        by_hand = {"placement": "off", "survive": num_ranks - 1}  # nobody else moves experts, and any map fits
        given = {"ranks": num_ranks, "launcher": "local", **SMALL, **by_hand, **settings}
        super().__init__(*split_settings(given))
        self.num_ranks = num_ranks
        self.rng = np.random.default_rng(11)
        self.epoch = 0
        self.in_force = ExpertMap.contiguous(*self.shape, num_ranks)
        self.proposed: dict[int, ExpertMap] = {}
        self.staged: list[MapStaged] = []
        self.refused: list[MapRefused] = []
        self.told: dict[tuple[int, int], set[int]] = {}  # (generation, step) -> epochs that ranks computed with
        self.told_by_rank: list[tuple[int, int, int]] = []  # (rank, generation, epoch), in order

    def _on_message(self, rank: int, message: FromRank) -> None:
        if isinstance(message, StepFrame):
            self.told.setdefault((message.generation, message.step), set()).add(message.epoch)
            self.told_by_rank.append((rank, message.generation, message.epoch))
            if message.epoch > self.in_force.epoch:
                self.in_force = self.proposed[message.epoch]
        elif isinstance(message, MapStaged):
            self.staged.append(message)
        elif isinstance(message, MapRefused):
            self.refused.append(message)
        super()._on_message(rank, message)

    def _perform(self, actions: list[Action]) -> None:
        """A generation begins on the map in force, under a number later than any that was proposed."""
        for index, action in enumerate(actions):
            if isinstance(action, SendTo) and isinstance(action.message, BeginGeneration):
                if self.in_force.epoch < self.epoch:
                    self.epoch += 1
                    self.in_force = self.in_force.with_epoch(self.epoch)
                descriptor = msgspec.structs.replace(action.message.descriptor, epoch=self.in_force.epoch)
                begin = BeginGeneration(descriptor, self.in_force.to_json())
                actions[index] = SendTo(action.rank, begin)
        super()._perform(actions)

    def stage(self, *, source: str = "auto", bytes_per_s: int | None = None) -> int:
        self.epoch += 1
        num_redundant = self.shape[1] // 4
        proposed = ExpertMap.random(
            self.rng, *self.shape, self.num_ranks, num_redundant=num_redundant, epoch=self.epoch
        )
        self.proposed[self.epoch] = proposed
        assert self.controller.descriptor is not None
        for rank in range(self.num_ranks):
            message = StageMap(
                generation=self.controller.descriptor.generation,
                expert_map=proposed.to_json(),
                bytes_per_s=bytes_per_s,
                source=source,  # type: ignore[arg-type]
            )
            self._links.send(rank, message)
        return self.epoch

    def check(self) -> None:
        assert all(len(epochs) == 1 for epochs in self.told.values()), "two epochs in one step"
        for rank in range(self.num_ranks):
            mine = [(generation, epoch) for teller, generation, epoch in self.told_by_rank if teller == rank]
            assert mine == sorted(mine), "an epoch went back"


async def tokens_of(cluster: Cluster) -> dict[int, list[int]]:
    collector = submit(cluster, PROMPTS, max_tokens=NUM_TOKENS, ignore_eos=True)
    await collector.all_finished(len(PROMPTS), 60)
    return collector.token_ids


@pytest.mark.parametrize("source", ["peer", "checkpoint"])
def test_maps_flip_under_traffic_and_no_token_changes(source: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        assert isinstance(cluster, MovingCluster)
        whole = await tokens_of(cluster)
        collector = submit(cluster, PROMPTS, max_tokens=NUM_TOKENS, ignore_eos=True)
        for _ in range(4):
            epoch = cluster.stage(source=source)
            await until(lambda epoch=epoch: cluster.in_force.epoch == epoch, 20)  # type: ignore[misc]
        await collector.all_finished(len(PROMPTS), 60)
        assert collector.token_ids == whole
        epoch = cluster.stage(source=source)  # an idle cluster flips too
        await until(lambda: cluster.in_force.epoch == epoch, 20)
        assert await tokens_of(cluster) == whole
        assert not cluster.refused
        assert len(cluster.staged) == 2 * 5
        assert sum(message.moved_bytes for message in cluster.staged) > 1 << 20
        cluster.check()

    play(MovingCluster(2, step_timeout_s=STEP_TIMEOUT_S), scenario)


def test_killed_in_the_middle_of_a_migration() -> None:
    """Slow migrations from rank to rank, and after each a SIGKILL at a random moment: of a source and destination."""
    draw = random.Random(4)

    async def scenario(cluster: Cluster) -> None:
        assert isinstance(cluster, MovingCluster)
        whole = await tokens_of(cluster)
        for _ in range(4):
            collector = submit(cluster, PROMPTS, max_tokens=NUM_TOKENS, ignore_eos=True)
            await collector.until(lambda: len(collector.token_ids) == len(PROMPTS))  # noqa: B023 -- awaited here
            before, num_staged = cluster.in_force, len(cluster.staged)
            epoch = cluster.stage(source="peer", bytes_per_s=draw.choice([2 << 20, 64 << 20]))
            await asyncio.sleep(draw.random() * 0.3)
            victim = rank_pids(cluster)[draw.randrange(3)]
            os.kill(victim, signal.SIGKILL)
            await until(lambda: not cluster.ready, STEP_TIMEOUT_S + 3)
            await until(lambda: cluster.ready, 60)
            await collector.all_finished(len(PROMPTS), 60)
            assert collector.token_ids == whole
            assert not psutil.pid_exists(victim)
            old = np.array_equal(cluster.in_force.physical_to_logical_LP, before.physical_to_logical_LP)
            assert old or cluster.in_force.epoch >= epoch
            assert old or len(cluster.staged) - num_staged == 3
        cluster.check()

    play(MovingCluster(3, step_timeout_s=STEP_TIMEOUT_S), scenario, timeout_s=200)
