"""Cluster of one MPI job, under MPICH and Open MPI from PyPI: the same bits, fail-stop, nothing left behind."""

from __future__ import annotations

import asyncio

import psutil
import pytest
from cluster_rig import PROMPTS, Leavings, answers, play, rank_pids, real, submit, tokens_and_logprobs, until
from mpi_sites import MpiSite, mpi_site

from switchgear.cluster import Cluster
from switchgear_runtime.errors import ConfigError, RankFailed

pytestmark = pytest.mark.ranks


@pytest.fixture(params=["mpich", "openmpi"])
def site(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> MpiSite:
    found = mpi_site(request.param)
    for name, value in found.environment({}).items():
        monkeypatch.setenv(name, value)
    return found


def mpi_cluster(site: MpiSite, **settings: object) -> Cluster:
    return real("mpi", mpi_command=f"{site.mpiexec} -n {{ranks}}", **settings)


def test_same_bits_through_the_death_of_the_job(site: MpiSite) -> None:
    """A dead rank ends the job; the next one goes on with every request."""
    alone = asyncio.run(tokens_and_logprobs(real("local", ranks=1)))

    async def scenario(cluster: Cluster) -> None:
        assert await answers(cluster) == alone
        pids = rank_pids(cluster)
        whole = submit(cluster, PROMPTS, max_tokens=300, ignore_eos=True)
        await whole.all_finished(len(PROMPTS), 60)
        collector = submit(cluster, PROMPTS, max_tokens=300, ignore_eos=True)
        await collector.until(lambda: len(collector.token_ids) == len(PROMPTS))
        psutil.Process(pids[1]).kill()
        await until(lambda: not cluster.ready, 20)
        finishes = await collector.all_finished(len(PROMPTS), 60)
        assert {finish.reason for finish in finishes} == {"length"}
        assert collector.token_ids == whole.token_ids
        assert not [pid for pid in pids if psutil.pid_exists(pid)]
        assert await answers(cluster) == alone

    play(mpi_cluster(site, ranks=3, transport="mpi"), scenario)


def test_a_job_of_another_size_fails_the_start(site: MpiSite) -> None:
    before = Leavings.now()
    cluster = real("mpi", ranks=2, mpi_command=f"{site.mpiexec} -n 1")
    with pytest.raises(RankFailed, match=r"the MPI job has 1 processes for ranks=2; mpi_command must start"):
        asyncio.run(asyncio.wait_for(cluster.start(), 60))
    before.check()


def test_what_cannot_work_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="transport='mpi' needs launcher='mpi', not 'local'"):
        real("local", transport="mpi")
    with pytest.raises(ConfigError, match="mpi_command='' starts nothing"):
        real("mpi", mpi_command="")
    with pytest.raises(ConfigError, match=r"mpi_address='0\.0\.0\.0' must be one address"):
        real("mpi", mpi_address="0.0.0.0")


def test_a_missing_mpiexec_is_named() -> None:
    before = Leavings.now()
    cluster = real("mpi", ranks=2, mpi_command="no-such-mpiexec -n {ranks}")
    with pytest.raises(RankFailed, match=r"mpi_command does not start: .*no-such-mpiexec"):
        asyncio.run(asyncio.wait_for(cluster.start(), 30))
    before.check()
