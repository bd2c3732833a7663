"""Two hosts on one machine: network namespaces joined by a virtual cable, with two ranks in each. Needs root and ip."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comm_ranks import MAILBOX_BYTES, RankProcess, fresh_channel, job

pytestmark = [pytest.mark.ranks, pytest.mark.slow]
ADDRESSES = ("198.51.100.1", "198.51.100.2")  # reserved for documentation
HOSTS = (0, 0, 1, 1)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@pytest.fixture
def spaces() -> Iterator[list[str]]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need iproute2 and root")
    tag = secrets.token_hex(3)
    names, cables = [f"sg{tag}{side}" for side in "ab"], [f"sg{tag}v{side}" for side in "ab"]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine forbids network namespaces: {error.stderr.decode().strip()}")
        for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "link", "set", cable, "name", "cable")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=20)


@pytest.fixture
def ranks(spaces: list[str]) -> Iterator[list[RankProcess]]:
    processes = [RankProcess(["ip", "netns", "exec", spaces[host]]) for host in HOSTS]
    for process in processes:
        up = process.answer()
        assert up is not None
        assert up["told"] == "up"
    yield processes
    for process in processes:
        process.close()


def start(
    ranks: list[RankProcess],
    folder: Path,
    scenario: str,
    *,
    transport: str = "hierarchical",
    dispatch: str = "flat",
    **arguments: Any,
) -> None:
    channel = fresh_channel()
    for rank, process in enumerate(ranks):
        host = HOSTS[rank]
        process.start(
            {
                **job(scenario, [channel], rank, len(ranks), stay=rank == arguments.get("victim"), arguments=arguments),
                "transport": transport,
                "folder": str(folder),
                "address": ADDRESSES[host],
                "hosts": [str(host) for host in HOSTS],
                "dispatch": dispatch,
            }
        )


@pytest.mark.parametrize("transport", ["gloo", "hierarchical"])
def test_bytes_cross_between_hosts(ranks: list[RankProcess], tmp_path: Path, transport: str) -> None:
    shapes = ["random", "borders", "long"]
    start(ranks, tmp_path, "exchange", transport=transport, seed=secrets.randbits(32), num_calls=60,
          mailbox_bytes=MAILBOX_BYTES, shapes=shapes, jitter_s=0.001)  # fmt: skip
    for process in ranks:
        outcome = process.answer()
        assert outcome is not None
        assert "result" in outcome, outcome


def test_layers_go_by_domain_between_hosts(ranks: list[RankProcess], tmp_path: Path) -> None:
    """With the bits of a lone rank."""
    start(ranks, tmp_path, "moe_layers", dispatch="auto", seed=secrets.randbits(30), num_layers=6)
    for process in ranks:
        outcome = process.answer()
        assert outcome is not None
        assert outcome.get("result") == [{"group": "HierarchicalDispatch", "inner": "InsideHost"}], outcome


def test_a_cut_cable_is_a_timeout_that_names_the_other_host(
    ranks: list[RankProcess], spaces: list[str], tmp_path: Path
) -> None:
    """The last rank comes no more; before the others' deadline, nobody of its host can be heard either."""
    start(ranks, tmp_path, "suffer", victim=3, call="all_to_all_v", timeout_s=3.0, num_calls=3)
    assert ranks[3].answer() == {"told": "ready"}
    ip("-n", spaces[1], "link", "set", "cable", "down")
    for rank, outcome in enumerate([process.answer() for process in ranks[:3]]):
        assert outcome is not None
        seen = outcome["result"][-1]
        assert seen["error"] == "TransportTimeout", (rank, seen)
        assert 3 in seen["peers"], (rank, seen)
        assert seen["elapsed_s"] < 4.0, (rank, seen)
