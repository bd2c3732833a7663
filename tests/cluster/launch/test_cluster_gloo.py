"""Cluster over gloo on local processes: the same bits, deaths and hangs named by our own means, one address only."""

from __future__ import annotations

import asyncio
import os
import signal

import psutil
import pytest
from cluster_rig import PROMPTS, answers, play, rank_pids, real, submit, tokens_and_logprobs, until

from switchgear.cluster import Cluster

pytestmark = pytest.mark.ranks
STEP_TIMEOUT_S = 3.0


@pytest.mark.slow  # what gloo does when ranks die or hang is also tested without a cluster (test_transport_conformance.py)
def test_same_bits_through_a_death_and_a_hang() -> None:
    alone = asyncio.run(tokens_and_logprobs(real("local", ranks=1)))

    async def scenario(cluster: Cluster) -> None:
        assert await answers(cluster) == alone
        whole = submit(cluster, PROMPTS, max_tokens=100, ignore_eos=True)
        await whole.all_finished(len(PROMPTS), 60)
        for blow in (signal.SIGKILL, signal.SIGSTOP):
            collector = submit(cluster, PROMPTS, max_tokens=100, ignore_eos=True)
            await collector.until(lambda c=collector: len(c.token_ids) == len(PROMPTS))
            os.kill(rank_pids(cluster)[1], blow)
            seconds = await until(lambda: not cluster.ready, STEP_TIMEOUT_S + 3.0)
            assert blow == signal.SIGSTOP or seconds < 2.0
            assert {finish.reason for finish in await collector.all_finished(len(PROMPTS), 60)} == {"length"}
            assert collector.token_ids == whole.token_ids
            await until(lambda: cluster.ready, 30)
        for pid in rank_pids(cluster):
            listening = [c.laddr.ip for c in psutil.Process(pid).net_connections() if c.status == psutil.CONN_LISTEN]
            assert set(listening) == {"127.0.0.1"}

        assert await answers(cluster) == alone
        collector = submit(cluster, PROMPTS, max_tokens=100, ignore_eos=True)
        await collector.until(lambda: len(collector.token_ids) == len(PROMPTS))
        await asyncio.wait_for(cluster.scale(2), 60)
        await collector.all_finished(len(PROMPTS), 60)
        assert collector.token_ids == whole.token_ids

    play(real("local", ranks=3, transport="gloo", step_timeout_s=STEP_TIMEOUT_S), scenario)
