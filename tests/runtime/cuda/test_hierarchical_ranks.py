"""HierarchicalDispatch between processes: two pretended hosts (or more), shared memory inside and gloo between."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from comm_ranks import ForkedRanks

pytestmark = pytest.mark.ranks
SYSTEM = random.SystemRandom()


@pytest.fixture(scope="module", params=["hierarchical", "gloo"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedRanks]:
    ranks = ForkedRanks(request.param, tmp_path_factory.mktemp("hosts"))
    yield ranks
    ranks.close()


@pytest.mark.parametrize("hosts", ["aabb", "aaab", pytest.param("abcabca", marks=pytest.mark.slow)])
def test_layers_of_two_hosts_have_the_bits_of_one_rank(ranks: ForkedRanks, hosts: str) -> None:
    seed = SYSTEM.randrange(1 << 30)
    ranks.hosts, ranks.dispatch = list(hosts), "auto"
    outcomes = ranks.run("moe_layers", len(hosts), seed=seed, num_layers=4)
    expected = {"group": "FlatDispatch", "inner": "NoneType"}
    if ranks.kind == "hierarchical":
        expected = {"group": "HierarchicalDispatch", "inner": "InsideHost"}
    for rank, outcome in enumerate(outcomes):
        found = expected if hosts.count(hosts[rank]) > 1 else {**expected, "inner": "NoneType"}  # alone: nowhere to go
        assert outcome.get("result") == [found], (seed, outcome)


@pytest.mark.parametrize("ranks", ["hierarchical"], indirect=True)
@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_who_is_missing_inside_a_host_is_named_to_all(ranks: ForkedRanks, fault: str) -> None:
    """By the ranks' numbers among all, also to those on the other host, which were not in that call."""
    ranks.hosts, ranks.dispatch = list("aabb"), "auto"
    outcomes = ranks.run("inside_storm", 4, fault=fault, victim=3, timeout_s=3.0)
    for rank, outcome in enumerate(outcomes[:3]):
        assert "result" in outcome, outcome
        (seen,) = outcome["result"]
        assert seen["rank"] == rank
        assert 3 in seen["peers"], seen
        if fault == "kill":
            assert (seen["error"], seen["peers"]) == ("PeerLost", [3]), seen
        else:
            assert seen["error"] == "TransportTimeout", seen
