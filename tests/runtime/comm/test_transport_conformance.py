"""What every transport must do: loopback (threads), shm, gloo, both at once, and MPI (processes), on 1 to 8
ranks. See comm_scenarios.py."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

import pytest
from comm_ranks import MAILBOX_BYTES, ForkedRanks, MpiRanks, ProcessRanks, Ranks, ThreadRanks, results
from mpi_sites import mpi_site

pytestmark = pytest.mark.ranks
WORLD_SIZES = (1, 2, 3, 4, 8)
SHAPES = ["random", "empty", "one_talks", "one_hears", "borders", "long"]


@pytest.fixture(scope="module", params=["loopback", "shm", "gloo", "hierarchical", "mpich", "openmpi", "openmpi-ulfm"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    kind = request.param
    if kind == "loopback":
        yield ThreadRanks()
        return
    ranks: ProcessRanks
    if kind == "shm":
        ranks = ProcessRanks()
    elif kind in ("gloo", "hierarchical"):
        ranks = ForkedRanks(kind, tmp_path_factory.mktemp(kind))
    else:
        name, _, survives = kind.partition("-")
        ranks = MpiRanks(mpi_site(name), tmp_path_factory.mktemp(kind), survives=bool(survives))
    yield ranks
    ranks.close()


@pytest.fixture
def seed(record_property: Any) -> int:
    value = secrets.randbits(32)
    record_property("seed", value)
    return value


def _run(ranks: Ranks, scenario: str, world_size: int, **arguments: Any) -> list[Any]:
    outcomes = ranks.run(scenario, world_size, **arguments)
    assert all("result" in outcome for outcome in outcomes), json.dumps({"arguments": arguments, "outcomes": outcomes})
    return [result[-1] for result in results(outcomes)]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("jitter_s", [0.0, 0.003])
def test_random_exchanges_arrive_whole_and_are_counted(
    ranks: Ranks, world_size: int, jitter_s: float, seed: int
) -> None:
    counts = _run(
        ranks,
        "exchange",
        world_size,
        seed=seed,
        num_calls=60,
        mailbox_bytes=MAILBOX_BYTES,
        shapes=SHAPES,
        jitter_s=jitter_s,
    )
    assert sum(count["sent_bytes"] for count in counts) == sum(count["received_bytes"] for count in counts)
    assert all(count["sent_bytes"] > 0 for count in counts) == (world_size > 1), f"seed={seed}: nothing crossed"


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_of_traffic(ranks: Ranks, shape: str, seed: int) -> None:
    _run(ranks, "exchange", 3, seed=seed, num_calls=20, mailbox_bytes=MAILBOX_BYTES, shapes=[shape], jitter_s=0.0)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_headers_of_differing_lengths(ranks: Ranks, world_size: int, seed: int) -> None:
    _run(ranks, "headers", world_size, seed=seed, num_calls=100)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_nobody_leaves_a_barrier_before_all_have_entered(ranks: Ranks, world_size: int, seed: int) -> None:
    times = _run(ranks, "barriers", world_size, seed=seed, num_calls=20)
    for visits in zip(*times, strict=True):
        assert max(entered for entered, _ in visits) <= min(left for _, left in visits), f"seed={seed}"


def test_views_are_aligned_and_own_messages_are_not_copied(ranks: Ranks) -> None:
    _run(ranks, "addresses", 3)


def test_messages_may_be_shaped_memory(ranks: Ranks) -> None:
    _run(ranks, "shaped", 2)


def test_mistaken_arguments_are_refused(ranks: Ranks) -> None:
    _run(ranks, "arguments", 2)


@pytest.mark.parametrize(("world_size", "victim"), [(2, 0), (3, 1), (4, 3), (8, 5)])
@pytest.mark.parametrize("call", ["all_gather", "all_to_all_v", "long", "barrier"])
def test_a_killed_peer_is_named_at_once(ranks: Ranks, world_size: int, victim: int, call: str) -> None:
    outcomes = ranks.run("suffer", world_size, fault="kill", victim=victim, call=call, timeout_s=30.0, num_calls=3)
    for rank, outcome in enumerate(outcomes):
        if rank == victim:
            continue
        seen = outcome["result"][-1]
        assert (seen["error"], list(seen["peers"])) == ("PeerLost", [victim]), seen
        assert seen["elapsed_s"] < 5.0, seen  # the deadline is 30 s


@pytest.mark.parametrize(("world_size", "victim"), [(2, 1), (8, 3)])
@pytest.mark.parametrize("call", ["all_gather", "all_to_all_v", "long"])
def test_a_stopped_peer_is_named_at_the_deadline(ranks: Ranks, world_size: int, victim: int, call: str) -> None:
    timeout_s = 0.5
    outcomes = ranks.run("suffer", world_size, fault="stop", victim=victim, call=call, timeout_s=timeout_s, num_calls=3)
    for rank, outcome in enumerate(outcomes):
        if rank == victim:
            continue
        seen = outcome["result"][-1]
        assert (seen["error"], list(seen["peers"])) == ("TransportTimeout", [victim]), seen
        assert timeout_s - 0.01 <= seen["elapsed_s"] < timeout_s + 0.5, seen


@pytest.mark.parametrize(("world_size", "victim"), [(2, 1), (4, 2), (8, 0)])
def test_a_peer_killed_in_a_storm_is_named_by_all(ranks: Ranks, world_size: int, victim: int) -> None:
    """Also by those who first see another survivor leave because of it."""
    outcomes = ranks.run("storm", world_size, fault="kill", victim=victim, mailbox_bytes=MAILBOX_BYTES)
    for rank, outcome in enumerate(outcomes):
        if rank != victim:
            seen = outcome["result"][-1]
            assert (seen["error"], list(seen["peers"])) == ("PeerLost", [victim]), seen


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("by_thread", [True, False])
def test_an_abort_wakes_all_ranks(ranks: Ranks, world_size: int, by_thread: bool) -> None:
    for rank, outcome in enumerate(ranks.run("aborted", world_size, by_thread=by_thread)):
        seen = outcome["result"][-1] if "result" in outcome else outcome  # it may still have been joining
        assert seen["error"] == "TransportAborted", seen
        assert "enough" in seen["text"], seen
        assert list(seen["peers"]) == ([] if rank == 0 else [0]), seen
        assert seen.get("elapsed_s", 0.0) < 10.0, seen  # the deadline is 30 s


@pytest.mark.parametrize("world_size", [1, 3])
def test_close_ends_a_pending_call_and_all_later_ones(ranks: Ranks, world_size: int) -> None:
    for seen in _run(ranks, "closing", world_size):
        assert seen["error"] in ("TransportAborted", "PeerLost"), seen
