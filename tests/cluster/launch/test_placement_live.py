"""Placement in a cluster of real processes: maps change under running requests, and no token does."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from cluster_rig import PROMPTS, Leavings, answers, rank_pids, real, submit, until

from switchgear.cluster import Cluster
from switchgear.placement.epochs import same_place
from switchgear.placement.planner_process import PlannerProcess
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.moe.expert_map import ExpertMap

NUM_RANKS = 3


def random_map(cluster: Cluster, seed: int) -> ExpertMap:
    rng = np.random.default_rng(seed)
    spec = cluster.spec
    return ExpertMap.random(rng, spec.num_moe_layers, spec.num_experts, cluster.config.ranks, num_redundant=4)


def play(cluster: Cluster, scenario: Callable[[Cluster], Awaitable[None]]) -> None:
    """Start, play, check that nothing is left."""

    async def main() -> None:
        before = Leavings.now()
        try:
            await asyncio.wait_for(cluster.start(), 60)
            await asyncio.wait_for(scenario(cluster), 100)
        finally:
            await cluster.stop(1)
        before.check()

    asyncio.run(main())


def test_maps_change_under_running_requests_and_outlive_a_death() -> None:
    async def scenario(cluster: Cluster) -> None:
        undisturbed = await answers(cluster)
        placement, controller = cluster.placement, cluster.placement.controller
        running = asyncio.create_task(answers(cluster))
        for seed in range(6):
            wanted = random_map(cluster, seed)
            outcome = await placement.apply(wanted)
            assert (outcome.error, outcome.epoch) == ("", controller.epoch)
            in_force = controller.expert_map
            assert in_force is not None
            assert same_place(in_force, wanted)
        assert await running == undisturbed
        assert cluster.core.epoch == controller.epoch >= 6  # several hops each; an idle cluster flips too
        running = asyncio.create_task(answers(cluster))
        await asyncio.sleep(0.05)
        os.kill(rank_pids(cluster)[1], signal.SIGKILL)
        order = asyncio.create_task(placement.apply(random_map(cluster, 99)))
        outcome = await order
        await until(lambda: not cluster.ready, 10)
        await until(lambda: cluster.ready, 60)
        assert await running == undisturbed
        now = controller.expert_map
        assert now is not None
        assert now.epoch >= in_force.epoch
        assert same_place(now, random_map(cluster, 99)) == (outcome.error == "")
        assert cluster.core.epoch == now.epoch
        assert (await placement.apply(random_map(cluster, 7))).error == ""

    play(real("local", ranks=NUM_RANKS, placement="static"), scenario)


def test_a_map_of_a_file_is_in_force_from_the_start(tmp_path: Path) -> None:
    path = tmp_path / "map.json"

    async def scenario(cluster: Cluster) -> None:
        assert cluster.core.epoch == 17
        await submit(cluster, PROMPTS, max_tokens=8).all_finished(len(PROMPTS))

    whole = real("local", ranks=2, placement="off")
    random_map(whole, 3).with_epoch(17).save(path)
    play(real("local", ranks=2, placement="off", expert_map=str(path)), scenario)
    with pytest.raises(ConfigError, match="this cluster has"):
        real("local", ranks=3, expert_map=str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        real("local", ranks=2, expert_map=str(tmp_path / "none.json"))


def test_the_load_moves_experts_and_a_dead_planner_is_replaced() -> None:
    async def scenario(cluster: Cluster) -> None:
        controller = cluster.placement.controller
        planner = cluster.placement._planner
        assert isinstance(planner, PlannerProcess)
        assert planner.pid is None
        undisturbed = await answers(cluster)
        while controller.counters.plans < 1:
            assert await answers(cluster) == undisturbed
        first = planner.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        num_plans = controller.counters.plans
        while planner.pid == first or controller.counters.plans <= num_plans:
            assert await answers(cluster) == undisturbed
        assert controller.alarm() is None

    play(real("local", ranks=2, placement_window_s=0.3), scenario)
