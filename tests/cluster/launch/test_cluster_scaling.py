"""Cluster.scale with the bundled model on local processes: requests go on while ranks come and go, with the same tokens."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence

import psutil
import pytest
from cluster_rig import PROMPTS, SCRIPTED_RANK, play, rank_pids, real, scripted, submit, until

from switchgear.cluster import Cluster
from switchgear.compatibility import check_scale
from switchgear.config import split_settings
from switchgear.launcher.base import OnExit
from switchgear.launcher.local import LocalLauncher
from switchgear_runtime.errors import RankFailed, RequestError

pytestmark = pytest.mark.ranks
NUM_TOKENS = 200
EIGHT = [*PROMPTS, *(f"{prompt} again" for prompt in PROMPTS)]


async def whole_tokens(cluster: Cluster) -> dict[int, list[int]]:
    collector = submit(cluster, EIGHT, max_tokens=NUM_TOKENS, ignore_eos=True)
    assert {finish.reason for finish in await collector.all_finished(len(EIGHT), 60)} == {"length"}
    return collector.token_ids


def test_growing_and_shrinking_change_no_token() -> None:
    async def scenario(cluster: Cluster) -> None:
        whole = await whole_tokens(cluster)
        num_carried = 0
        for num_ranks in (3, 1, 2):
            old_pids = rank_pids(cluster)
            collector = submit(cluster, EIGHT, max_tokens=NUM_TOKENS, ignore_eos=True)
            await collector.until(lambda c=collector: len(c.token_ids) == len(EIGHT))
            await asyncio.wait_for(cluster.scale(num_ranks), 60)
            assert cluster.ready
            pids = rank_pids(cluster)
            assert len(pids) == num_ranks == cluster.core.ranks.num_serving
            assert pids[: len(old_pids)] == old_pids[:num_ranks], "who stays, stays as it is"
            assert not any(psutil.pid_exists(pid) for pid in old_pids[num_ranks:])
            assert [state.rank for state in cluster.core.ranks.states()] == list(range(num_ranks))
            if num_ranks < len(old_pids):
                assert cluster.core.num_carried > num_carried, "they had nothing to do"
            num_carried = cluster.core.num_carried
            await collector.all_finished(len(EIGHT), 60)
            assert collector.token_ids == whole, num_ranks
        assert await whole_tokens(cluster) == whole
        assert cluster.controller.descriptor.generation == 4
        assert not cluster.controller._budget.setbacks

    play(real("local", ranks=2), scenario)


def test_a_rank_that_dies_while_others_come_changes_no_token() -> None:
    async def scenario(cluster: Cluster) -> None:
        whole = await whole_tokens(cluster)
        collector = submit(cluster, EIGHT, max_tokens=NUM_TOKENS, ignore_eos=True)
        await collector.until(lambda: len(collector.token_ids) == len(EIGHT))
        scaling = asyncio.create_task(cluster.scale(3))
        await asyncio.sleep(0.05)
        os.kill(rank_pids(cluster)[0], signal.SIGKILL)
        await asyncio.wait_for(scaling, 60)
        assert len(rank_pids(cluster)) == 3
        await collector.all_finished(len(EIGHT), 60)
        assert collector.token_ids == whole

    play(real("local", ranks=2), scenario)


def test_orders_that_cannot_be_carried_out_name_the_reason() -> None:
    async def scenario(cluster: Cluster) -> None:
        for num_ranks in (0, 65):
            with pytest.raises(RequestError, match=f"ranks={num_ranks} must be from 1 to 64"):
                await cluster.scale(num_ranks)
        first = asyncio.create_task(cluster.scale(3))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="is being scaled to 3 ranks"):
            await cluster.scale(2)
        await asyncio.wait_for(first, 10)
        await asyncio.wait_for(cluster.scale(1), 10)
        (finish,) = await submit(cluster, [[5, 6]], max_tokens=4).all_finished(1)
        assert finish.reason == "length"

    play(scripted("ok"), scenario)


def test_a_member_that_dies_when_it_was_about_to_leave_gives_up_what_it_holds() -> None:
    """It is a member still: the generation broke before it could be told to leave."""

    async def scenario(cluster: Cluster) -> None:
        submit(cluster, [[5, 6]] * 6, max_tokens=4)
        assert cluster.core.ranks[2].num_sequences == 2
        pid = rank_pids(cluster)[2]
        cluster._perform(cluster.controller.on_lost_link(2, "it closed"))
        scaling = asyncio.create_task(cluster.scale(2))
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)
        await asyncio.wait_for(scaling, 10)
        assert cluster.ready
        assert [(state.rank, state.num_sequences) for state in cluster.core.ranks.states()] == [(0, 3), (1, 3)]

    play(scripted("silent", ranks=3), scenario)


class BookedLauncher(LocalLauncher):
    """Keeps books of the places that it was told to give up."""

    def __init__(self, on_exit: OnExit, command: Sequence[str]) -> None:
        super().__init__(on_exit, command)
        self.released: list[int] = []

    def release(self, rank: int) -> None:
        self.released.append(rank)


def test_the_place_of_a_newcomer_that_failed_is_given_up() -> None:
    config, engine = split_settings({"ranks": 1, "launcher": "local", "start_timeout_s": 20.0})
    command = (sys.executable, str(SCRIPTED_RANK), "other-bits")
    cluster = Cluster(config, engine, launcher=lambda on_exit: BookedLauncher(on_exit, command))

    async def scenario(cluster: Cluster) -> None:
        assert isinstance(cluster.launcher, BookedLauncher)
        with pytest.raises(RankFailed, match="may not join"):
            await asyncio.wait_for(cluster.scale(2), 10)
        await until(lambda: cluster.controller.ranks == [0], 5)
        assert cluster.launcher.released == [1]

    play(cluster, scenario)


def test_a_planner_that_does_not_end_leaves_no_rank_behind() -> None:
    cluster = scripted("stubborn")

    async def never() -> None:
        raise TimeoutError

    async def run() -> None:
        await cluster.start()
        pids = rank_pids(cluster)
        cluster.placement.close = never
        with pytest.raises(TimeoutError):
            await cluster.stop(0)
        assert not any(psutil.pid_exists(pid) for pid in pids)

    asyncio.run(asyncio.wait_for(run(), 30))


def test_what_can_never_be_is_refused_before_anything_starts() -> None:
    config, engine = split_settings({"launcher": "mpi", "ranks": 2})
    with pytest.raises(RequestError, match="launcher='mpi' are one MPI job"):
        check_scale(config, engine, 3)
    config, engine = split_settings({"launcher": "local", "ranks": 1, "transport": "loopback"})
    with pytest.raises(RequestError, match="transport='loopback' joins ranks inside one process"):
        check_scale(config, engine, 2)


def test_a_newcomer_of_other_bits_is_refused_and_the_others_go_on() -> None:
    async def scenario(cluster: Cluster) -> None:
        before = cluster.core.max_model_len, cluster.core.system_fingerprint
        with pytest.raises(RankFailed, match="rank 1 may not join: it computes with 'bits=b'"):
            await asyncio.wait_for(cluster.scale(3), 10)
        await until(lambda: cluster.controller.ranks == [0], 5)
        assert cluster.ready
        assert cluster.controller.descriptor.generation == 1
        assert (cluster.core.max_model_len, cluster.core.system_fingerprint) == before
        assert [state.rank for state in cluster.core.ranks.states()] == [0]

    play(scripted("other-bits", ranks=1), scenario)


def test_a_stop_in_the_middle_leaves_nothing_behind() -> None:
    async def scenario(cluster: Cluster) -> None:
        scaling = asyncio.create_task(cluster.scale(3))
        await asyncio.sleep(0.3)
        await cluster.stop(0)
        with pytest.raises(RankFailed, match="the cluster is ending"):
            await scaling

    play(real("local", ranks=1), scenario)
