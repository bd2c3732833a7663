"""Where Ray puts ranks: raylets with labels and made-up GPUs, which Ray counts and nobody uses."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_rig import answers, real, tokens_and_logprobs

from switchgear.cluster import Cluster
from switchgear.launcher.ray_actor import at_its_place
from switchgear.launcher.ray_driver import RayDriver
from switchgear.launcher.ray_places import RayPlaces
from switchgear.launcher.ray_protocol import DriverSettings
from switchgear_runtime.rank_worker import RankWorkerConfig

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::pytest.PytestUnraisableExceptionWarning"
    ),  # sockets that ray.cluster_utils drops
]
LABEL = "ray.io/gpu-domain"
DOMAINS = ("left", "right", "left")  # of the nodes, in the order of their start; two GPUs each


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    """A head without GPUs and three nodes with two each, under which Ray leaves CUDA_VISIBLE_DEVICES alone."""
    import ray
    from ray.cluster_utils import Cluster as RayCluster

    with (
        tempfile.TemporaryDirectory(prefix="sgr-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "1")
        Path(folder, "ray").mkdir()
        memory = {"object_store_memory": 80 << 20}
        with socket.create_server(("127.0.0.1", 0)) as free:
            head = {**memory, "num_cpus": 1, "num_gpus": 0, "include_dashboard": False}
            head["dashboard_port"] = free.getsockname()[1]
        cluster = RayCluster(initialize_head=True, head_node_args=head)
        try:
            for domain in DOMAINS:
                cluster.add_node(**memory, num_cpus=2, num_gpus=2, labels={LABEL: domain})
            yield cluster.address
        finally:
            cluster.shutdown()
            assert not ray.is_initialized()


@pytest.fixture
def joined(ray_address: str) -> Iterator[None]:
    import ray

    ray.init(address=ray_address, namespace="test", log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def settings(num_ranks: int, **changes: Any) -> DriverSettings:
    given = {"cpus_per_rank": 0.1, "gpus_per_rank": 1.0, "one_host": False, "domain_label": LABEL, "timeout_s": 30.0}
    given |= {"address": None, "folder": None}
    return DriverSettings(name="x", num_ranks=num_ranks, **{**given, **changes})


def where(places: RayPlaces) -> list[str]:
    """The domain of each of the first ranks; a node stands for itself."""
    return [place.domain for place in places._first]


@pytest.mark.usefixtures("joined")
def test_ranks_of_a_domain_are_neighbours_and_stay_inside_it() -> None:
    for num_ranks, size in ((4, 4), (6, 2), (6, 0), (3, 2)):
        places = RayPlaces(settings(num_ranks, ranks_per_domain=size))
        try:
            nodes = places.reserve()
            domains = where(places)
            assert domains == sorted(domains)
            on_nodes = [place.node_id for place in places._first]
            assert (
                len(set(on_nodes))
                == len(nodes)
                == sum(a != b for a, b in zip([None, *on_nodes], on_nodes, strict=False))
            )
            if (num_ranks, size) == (4, 4):
                assert domains == ["left"] * 4  # no node has four GPUs, one domain has
            if (num_ranks, size) == (6, 2):
                assert domains == ["left"] * 4 + ["right"] * 2
                assert all(on_nodes[rank] == on_nodes[rank + 1] for rank in (0, 2, 4))
        finally:
            places.close()


@pytest.mark.usefixtures("joined")
def test_without_the_label_a_domain_is_a_node() -> None:
    places = RayPlaces(settings(6, ranks_per_domain=2, domain_label=""))
    try:
        places.reserve()
        domains = where(places)
        assert domains == sorted(place.node_id for place in places._first)
        assert all(domains.count(domain) == 2 for domain in domains)
    finally:
        places.close()


@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ranks_per_domain": 5}, "no a domain of 'ray.io/gpu-domain' for each 5 ranks with room for 5 bundles"),
        ({"ranks_per_domain": 3, "domain_label": ""}, "a node for each 3 ranks with room for 3 bundles"),
        ({"gpus_per_rank": 2.0}, "room for 6 bundles of {'CPU': 0.1, 'GPU': 2.0}"),
        ({"one_host": True}, "one node with room for 6 bundles"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], words: str) -> None:
    places = RayPlaces(settings(6, **{"timeout_s": 3.0, **changes}))
    try:
        with pytest.raises(RuntimeError) as caught:
            places.reserve()
        assert words in str(caught.value)
        assert "lower ranks, ray_cpus_per_rank, ray_gpus_per_rank or ray_ranks_per_domain" in str(caught.value)
    finally:
        places.close()


@pytest.mark.usefixtures("joined")
def test_who_comes_later_fills_a_domain_first() -> None:
    """Three ranks in twos: the fourth joins the one that is alone, the fifth opens a domain, which the sixth fills."""
    import ray

    async def domain_of(places: RayPlaces, rank: int) -> str:
        group, bundle = await places.of(rank)
        assert bundle == 0
        assert (group, 0) == await places.of(rank)
        (place,) = places._places_of(group)
        return place.domain

    places = RayPlaces(settings(3, ranks_per_domain=2, domain_label="", timeout_s=20.0))
    try:
        places.reserve()
        domains = where(places)
        lonely = next(domain for domain in domains if domains.count(domain) == 1)
        assert asyncio.run(domain_of(places, 3)) == lonely
        fifth = asyncio.run(domain_of(places, 4))
        assert fifth not in domains
        assert asyncio.run(domain_of(places, 5)) == fifth
        places.give_back(5)
        assert asyncio.run(domain_of(places, 5)) == fifth
        with pytest.raises(RuntimeError, match="no room for rank 6, one more bundle"):
            places._settings = settings(3, ranks_per_domain=2, domain_label="", timeout_s=2.0)
            asyncio.run(places.of(6))
    finally:
        places.close()
    assert ray.is_initialized()


@pytest.mark.usefixtures("joined")
def test_an_actor_sees_its_own_gpus_and_its_domain() -> None:
    """Also where Ray was told not to set CUDA_VISIBLE_DEVICES; one without GPUs is left as it is."""
    import ray

    def look(config_host: str) -> tuple[str, str, str | None]:
        config = RankWorkerConfig(rank=0, world_size=1, engine={}, host=config_host, port=0, token="")
        placed = at_its_place(config, LABEL)
        return placed.host_name, placed.domain_name, os.environ.get("CUDA_VISIBLE_DEVICES")

    remote: Any = ray.remote(max_calls=1)(look)  # a process of its own for each
    nodes = {node["NodeID"]: node["Labels"].get(LABEL, "") for node in ray.nodes()}
    seen = ray.get([remote.options(num_gpus=1).remote("h") for _ in range(6)], timeout=60)
    assert all(domain == nodes[host] for host, domain, _ in seen)
    assert {gpus for _, _, gpus in seen} <= {"0", "1"}
    (host, domain, gpus) = ray.get(remote.options(num_cpus=0).remote("h"), timeout=60)
    assert domain == nodes[host]
    assert gpus == os.environ.get("CUDA_VISIBLE_DEVICES")


def test_a_ray_of_ones_own_finds_its_gpus_where_ranks_want_any() -> None:
    assert RayDriver(settings(1, folder="/x"), None)._init_arguments()["num_gpus"] is None  # type: ignore[arg-type]
    assert RayDriver(settings(1, folder="/x", gpus_per_rank=0.0), None)._init_arguments()["num_gpus"] == 0  # type: ignore[arg-type]


@pytest.mark.timeout(600)
def test_two_domains_have_the_tokens_of_one_rank(ray_address: str) -> None:
    """Kernels' twin, a rank on each of three nodes: rows go by domain, one of which spans two hosts."""

    async def scenario(cluster: Cluster) -> None:
        descriptor = cluster.controller.descriptor
        assert descriptor is not None
        assert len(set(descriptor.hosts)) == 3
        assert descriptor.domains == ("left", "left", "right")
        assert await answers(cluster) == alone

    common = {"device": "twin", "step_timeout_s": 60.0}
    alone = asyncio.run(tokens_and_logprobs(real("local", ranks=1, **common)))
    spread = real("ray", ranks=3, ray_address=ray_address, ray_cpus_per_rank=2.0, trusted_network=True, **common)
    assert asyncio.run(tokens_and_logprobs(spread, scenario)) == alone
