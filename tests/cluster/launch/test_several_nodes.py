"""Two raylets on this machine, two ranks on each: two hosts to the cluster, shm inside and gloo between."""

from __future__ import annotations

import asyncio
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from cluster_rig import Leavings, answers, rank_pids, real, tokens_and_logprobs, until

from switchgear.cluster import Cluster
from switchgear_runtime.errors import ConfigError

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings(
        "ignore::pytest.PytestUnraisableExceptionWarning"
    ),  # sockets that ray.cluster_utils drops
]
CPUS_PER_NODE = 2


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    """A Ray cluster of two nodes. Its files go to a folder of their own, which goes with it."""
    import ray
    from ray.cluster_utils import Cluster as RayCluster

    with (
        tempfile.TemporaryDirectory(prefix="sgr-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_TMPDIR", folder)  # also for the file with the address of the latest Ray
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        Path(folder, "ray").mkdir()
        node = {"num_cpus": CPUS_PER_NODE, "object_store_memory": 80 << 20}
        with socket.create_server(("127.0.0.1", 0)) as free:
            head = {**node, "include_dashboard": False, "dashboard_port": free.getsockname()[1]}
        cluster = RayCluster(initialize_head=True, head_node_args=head)
        try:
            cluster.add_node(**node)
            yield cluster.address
        finally:
            cluster.shutdown()
            assert not ray.is_initialized()


def two_nodes(ray_address: str, **settings: object) -> Cluster:
    """Each rank asks for one whole CPU, so that no node has room for all four."""
    return real("ray", ranks=4, ray_address=ray_address, ray_cpus_per_rank=1.0, **settings)


def test_two_raylets_are_two_hosts_with_the_same_tokens(ray_address: str) -> None:
    """Before and after a rank was killed: its host's and the other one's ranks both lose it."""

    async def scenario(cluster: Cluster) -> None:
        descriptor = cluster.controller.descriptor
        assert descriptor is not None
        assert sorted(descriptor.hosts.count(host) for host in set(descriptor.hosts)) == [2, 2]
        assert await answers(cluster) == alone
        psutil.Process(rank_pids(cluster)[3]).kill()
        await until(lambda: not cluster.ready, 5)
        await until(lambda: cluster.ready, 60)

    alone = asyncio.run(tokens_and_logprobs(real("local", ranks=1)))
    assert asyncio.run(tokens_and_logprobs(two_nodes(ray_address, trusted_network=True), scenario)) == alone


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_device_engine_dispatches_by_host_with_the_same_tokens(ray_address: str) -> None:
    """Kernels' twin: rows once to each of two hosts, through shared memory inside; also after a rank was killed."""

    async def scenario(cluster: Cluster) -> None:
        assert await answers(cluster) == alone
        psutil.Process(rank_pids(cluster)[1]).kill()
        await until(lambda: not cluster.ready, 10)
        await until(lambda: cluster.ready, 120)

    twin = {"device": "twin", "step_timeout_s": 60.0}
    alone = asyncio.run(tokens_and_logprobs(real("local", ranks=1, **twin)))
    spread = two_nodes(ray_address, trusted_network=True, dispatch="hierarchical", **twin)
    assert asyncio.run(tokens_and_logprobs(spread, scenario)) == alone


@pytest.mark.slow
def test_a_network_must_be_declared_trusted(ray_address: str) -> None:
    before = Leavings.now()
    with pytest.raises(ConfigError, match="trusted_network=False, but the ranks would exchange activations over"):
        asyncio.run(asyncio.wait_for(two_nodes(ray_address).start(), 60))
    before.check()
