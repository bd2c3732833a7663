"""Cluster with the bundled model on Ray actors. One local Ray, with token authentication, serves all tests in order."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from cluster_rig import Leavings, idle_percent, rank_pids, real, submit, until

from switchgear.cluster import Cluster
from switchgear.launcher.ray_driver import RayDriver
from switchgear.launcher.ray_places import Later
from switchgear.launcher.ray_planner import RayPlanner
from switchgear.launcher.ray_protocol import DriverSettings, ReleasePlace
from switchgear.loop_thread import LoopThread
from switchgear.placement.events import PlanRequest
from switchgear.placement.planner_process import PlannerLost
from switchgear.placement.problem import PlacementProblem
from switchgear.placement.topology import Topology
from switchgear.placement.wiring import cost_of
from switchgear.placement.worker import answer
from switchgear_runtime.moe.expert_map import ExpertMap

pytestmark = pytest.mark.ray
PROMPTS = ["The sun rises in the", "def fibonacci(n):", "Once upon a time", "1 + 1 ="]
NUM_TOKENS = 200


class Served:
    """A started cluster, the loop it lives on, and what its undisturbed tokens are."""

    def __init__(self) -> None:
        self.before = Leavings.now()
        others = set(psutil.Process().children(recursive=True))  # other tests' servers
        self.loop = LoopThread("test-cluster")
        self.cluster = self.loop.call(self._create(), 20)
        self.loop.call(self.cluster.start(), 150)
        self.children = set(psutil.Process().children(recursive=True)) - others
        self.whole = self.loop.call(self.tokens(self.cluster), 60)

    async def _create(self) -> Cluster:
        return real("ray")

    async def tokens(self, cluster: Cluster) -> dict[int, list[int]]:
        collector = submit(cluster, PROMPTS, max_tokens=NUM_TOKENS, ignore_eos=True)
        assert {finish.reason for finish in await collector.all_finished(len(PROMPTS), 60)} == {"length"}
        return collector.token_ids


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    served = Served()
    try:
        yield served
    finally:
        served.loop.call(served.cluster.stop(1), 60)
        served.loop.close()
    assert len(served.children) > 5  # Ray's daemons among them
    assert not [child for child in served.children if child.is_running()]
    served.before.check()


def test_ranks_are_actors_behind_a_token_on_the_loopback_interface(served: Served) -> None:
    names = {psutil.Process(pid).name() for pid in rank_pids(served.cluster)}
    assert all(name.startswith("ray::RankActor") for name in names), names
    environment = psutil.Process(rank_pids(served.cluster)[0]).environ()
    assert environment["RAY_AUTH_MODE"] == "token"
    token = Path(environment["RAY_AUTH_TOKEN_PATH"])
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.parent.stat().st_mode & 0o777 == 0o700
    assert served.cluster._address[0] == "127.0.0.1"


def test_idle_actors_are_idle(served: Served) -> None:
    assert served.loop.call(idle_percent(served.cluster, 3), 40) < 2.0


def test_the_planner_is_an_actor_that_is_replaced_when_it_dies(served: Served) -> None:
    """Before any death of ranks: it must not need one."""
    spec = served.cluster.spec
    request = PlanRequest(
        request_id=1,
        policy="incremental",
        windows_WLE=np.random.default_rng(0).integers(1, 9999, (2, spec.num_moe_layers, spec.num_experts)),
        current=ExpertMap.contiguous(spec.num_moe_layers, spec.num_experts, 2),
        problem=PlacementProblem(
            topology=Topology.even(2), slots_per_rank=spec.num_experts, cost=cost_of(spec, served.cluster.engine)
        ),
    )
    planner = served.cluster.placement._planner
    assert isinstance(planner, RayPlanner)
    expected = answer(request).plan
    assert served.loop.call(planner.ask(request), 60).plan == expected
    pids = [child.pid for child in psutil.Process().children(recursive=True) if "PlannerActor" in child.name()]
    assert len(pids) == 1
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(PlannerLost):
        served.loop.call(planner.ask(request), 60)
    assert served.loop.call(planner.ask(request), 60).plan == expected
    served.loop.call(planner.restart(), 60)
    assert served.loop.call(planner.ask(request), 60).plan == expected


def test_joins_a_running_ray_that_wants_its_token(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    token_path = psutil.Process(rank_pids(served.cluster)[0]).environ()["RAY_AUTH_TOKEN_PATH"]
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", token_path)

    async def join() -> None:
        cluster = real("ray", ranks=1, ray_address=served.cluster.launcher.ray_address)
        await cluster.start()
        pids = rank_pids(cluster)
        try:
            assert await served.tokens(cluster) == served.whole
        finally:
            await cluster.stop(1)
        assert not psutil.pid_exists(pids[0])

    asyncio.run(asyncio.wait_for(join(), 90))
    assert served.loop.call(served.tokens(served.cluster), 60) == served.whole


def test_what_a_killed_actor_held_goes_on(served: Served) -> None:
    async def scenario() -> None:
        cluster = served.cluster
        collector = submit(cluster, PROMPTS, max_tokens=NUM_TOKENS, ignore_eos=True)
        await collector.until(lambda: len(collector.token_ids) == len(PROMPTS))
        os.kill(rank_pids(cluster)[0], signal.SIGKILL)
        assert await until(lambda: not cluster.ready, 2) < 2
        finishes = await collector.all_finished(len(PROMPTS), 60)
        assert {finish.reason for finish in finishes} == {"length"}
        assert cluster.core.num_carried == 2
        assert collector.token_ids == served.whole
        assert await served.tokens(cluster) == served.whole

    served.loop.call(scenario(), 150)


def test_actors_come_and_go_while_requests_go_on(served: Served) -> None:
    async def scenario() -> None:
        cluster = served.cluster
        for num_ranks in (3, 2):
            collector = submit(cluster, PROMPTS, max_tokens=NUM_TOKENS, ignore_eos=True)
            await collector.until(lambda c=collector: len(c.token_ids) == len(PROMPTS))
            await asyncio.wait_for(cluster.scale(num_ranks), 60)
            names = {psutil.Process(pid).name() for pid in rank_pids(cluster)}
            assert len(rank_pids(cluster)) == num_ranks
            assert all(name.startswith("ray::RankActor") for name in names), names
            assert {finish.reason for finish in await collector.all_finished(len(PROMPTS), 60)} == {"length"}
            assert collector.token_ids == served.whole
            assert await served.tokens(cluster) == served.whole

    served.loop.call(scenario(), 200)


def test_the_place_of_a_newcomer_that_failed_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at its death, which a replacement may follow, but when the server says that none will."""
    removed: list[object] = []
    monkeypatch.setattr("ray.util.remove_placement_group", removed.append)
    settings = DriverSettings(
        name="x", num_ranks=2, cpus_per_rank=1, one_host=False, address=None, folder=None, timeout_s=1
    )
    driver = RayDriver(settings, io.BytesIO())
    later = driver._places._later = {rank: Later(object()) for rank in (2, 3)}
    two = later[2].group
    for rank in (2, 2, 0):
        asyncio.run(driver._run(ReleasePlace(1, rank)))
    assert removed == [two]
    assert list(later) == [3]


OWNER = """
import asyncio, sys
sys.path.insert(0, {here!r})
from cluster_rig import real

async def main():
    cluster = real("ray")
    await cluster.start()
    print("started", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.slow
def test_server_that_is_killed_takes_its_ray_along() -> None:
    before = Leavings.now()
    script = OWNER.format(here=str(Path(__file__).parent))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "started\n"
        children = psutil.Process(owner.pid).children(recursive=True)
        owner.kill()
    assert len(children) > 5
    _, left = psutil.wait_procs(children, timeout=20)
    assert left == []
    time.sleep(0.5)  # the driver, the last to go, removes the folder after its Ray is down
    before.check()
