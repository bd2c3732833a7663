"""Cluster with ranks that have no model: starts, deaths, malformed frames and shutdowns in tenths of a second."""

from __future__ import annotations

import asyncio
import logging
import os
import signal

import pytest
from cluster_rig import Leavings, play, rank_pids, scripted, submit, until

from switchgear import cluster as cluster_module
from switchgear.cluster import Cluster
from switchgear.config import split_settings
from switchgear.server.live_sequence import DEATHS_MAX
from switchgear_runtime.errors import CheckpointError, ConfigError, RankFailed, RequestError

pytestmark = pytest.mark.ranks


def test_serves_and_stops() -> None:
    async def scenario(cluster: Cluster) -> None:
        collector = submit(cluster, [[5, 6, 7], [8, 9], [1]], max_tokens=4)
        finishes = await collector.all_finished(3)
        assert [finish.reason for finish in finishes] == ["length"] * 3
        assert collector.token_ids == {0: [5, 6, 7, 5], 1: [8, 9, 8, 9], 2: [1, 1, 1, 1]}
        assert cluster.not_ready_reason is None

    play(scripted("ok", ranks=3), scenario)


def test_killed_rank_is_named_and_comes_back_to_what_it_held() -> None:
    async def scenario(cluster: Cluster) -> None:
        collector = submit(cluster, [[5], [6]], max_tokens=4)  # one a rank
        os.kill(rank_pids(cluster)[1], signal.SIGKILL)
        await until(lambda: not cluster.ready, 1)
        await until(lambda: cluster.core.num_carried, 1)
        with pytest.raises(RequestError, match="not ready"):
            submit(cluster, [[5]], max_tokens=1)
        assert await until(lambda: cluster.ready, 10) < 10
        assert cluster.controller.descriptor.generation == 2
        assert not collector.finishes
        assert cluster.core.num_live == 2

    play(scripted("silent"), scenario)


@pytest.mark.parametrize("script", ["bad-frame", "huge-frame"])
def test_a_sequence_that_breaks_every_rank_ends_with_a_clear_error(
    script: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(cluster: Cluster) -> None:
        collector = submit(cluster, [[5]], max_tokens=4)
        (finish,) = await collector.all_finished(1)
        assert "broke the protocol and was ended" in str(finish.error)
        assert f"no rank has survived this sequence, of {DEATHS_MAX} that held it" in str(finish.error)
        await until(lambda: cluster.ready, 10)

    play(scripted(script), scenario)
    assert "broke the protocol" in caplog.text


def test_blamed_rank_that_stays_silent_is_ended(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(cluster: Cluster) -> None:
        submit(cluster, [[5], [6]], max_tokens=4)
        await until(lambda: cluster.core.num_carried == 1, 4)
        await until(lambda: cluster.ready, 10)

    play(scripted("fault", ranks=3), scenario)
    assert "rank 1 was killed by SIGKILL" in caplog.text


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("no-hello", CheckpointError, "tensor x is missing"),
        ("crash", RankFailed, r"ended with status 7\nThe end of rank \d's log:\na last word of the rank"),
        ("other-bits", RankFailed, "rank . may not join: it computes with 'bits=.'"),
    ],
)
def test_start_fails_at_once_with_the_reason(script: str, error: type[Exception], message: str) -> None:
    before = Leavings.now()

    async def run() -> None:
        with pytest.raises(error, match=message):
            await scripted(script).start()

    asyncio.run(asyncio.wait_for(run(), 10))
    before.check()


def test_bad_settings_and_checkpoints_are_refused_before_any_process(tmp_path: object) -> None:
    config, engine = split_settings({"ranks": 2, "launcher": "local", "transport": "loopback"})
    with pytest.raises(ConfigError, match="transport='loopback'"):
        Cluster(config, engine)
    config, engine = split_settings({"model": str(tmp_path), "launcher": "local"})
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Cluster(config, engine)


def test_stubborn_ranks_are_killed_at_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "STOP_TIMEOUT_S", 0.3)

    async def scenario(cluster: Cluster) -> None:
        pass

    play(scripted("stubborn"), scenario)


def test_shutdown_lets_requests_finish_and_then_aborts_them() -> None:
    async def scenario(cluster: Cluster) -> None:
        collector = submit(cluster, [[5]], max_tokens=4)
        stop = asyncio.create_task(cluster.stop(0.3))
        await asyncio.sleep(0.1)
        with pytest.raises(RequestError, match="shutting down"):
            submit(cluster, [[5]], max_tokens=1)
        (finish,) = await collector.all_finished(1)
        assert finish.reason == "abort"
        await stop

    play(scripted("silent"), scenario)


def test_gives_up_when_ranks_keep_dying(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(cluster: Cluster) -> None:
        for _ in range(3):
            os.kill(rank_pids(cluster)[0], signal.SIGKILL)
            await until(lambda: not cluster.ready, 5)
            await until(lambda: cluster.ready or cluster.failure, 10)
        assert "gave up after 2 restarts" in cluster.failure
        assert cluster.not_ready_reason == cluster.failure
        await until(lambda: cluster.controller.all_gone, 5)

    play(scripted("ok", max_restarts=2), scenario)
    assert [record for record in caplog.records if record.levelno == logging.ERROR]
