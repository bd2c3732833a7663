"""Experts over TCP between ranks: the bytes that the source computes with, and who is blamed when they do not come."""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from expert_swaps import write_expert
from tiny_cluster import make_config, make_runner, make_tiny_checkpoint

from switchgear_runtime.comm.loopback import LoopbackHub
from switchgear_runtime.errors import PeerLost, TransportAborted, TransportError, TransportTimeout
from switchgear_runtime.link import GREETING, NONCE_BYTES, PROOF_BYTES
from switchgear_runtime.migration import peer_channel
from switchgear_runtime.migration.pace import Pace, StagingCancelled
from switchgear_runtime.migration.peer_channel import MAGIC, PeerChannel, open_peer_channel
from switchgear_runtime.model_runner import ModelRunner
from switchgear_runtime.moe.model_versions import ModelVersions
from switchgear_runtime.system import RealSystem

SYSTEM = RealSystem(seed=5)


class DictStore:
    """The values of a generation, in one process."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def put(self, key: str, value: bytes) -> None:
        self.values[key] = value

    def get(self, keys: Sequence[str], *, timeout_s: float) -> dict[str, bytes]:
        if not any(key in self.values for key in keys):
            time.sleep(min(timeout_s, 0.05))
        return {key: self.values[key] for key in keys if key in self.values}


Pair = tuple[DictStore, list[ModelRunner], list[PeerChannel]]


@pytest.fixture(scope="module")
def runners(tmp_path_factory: pytest.TempPathFactory) -> list[ModelRunner]:
    config = make_config(make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=6))
    return [make_runner(config, rank, 2) for rank in range(2)]


@pytest.fixture
def pair(runners: list[ModelRunner]) -> Iterator[Pair]:
    store = DictStore()
    channels = [open_channel(runner, store, rank) for rank, runner in enumerate(runners)]
    yield store, runners, channels
    for channel in channels:
        channel.close()


def open_channel(
    runner: ModelRunner, store: DictStore, rank: int, timeout_s: float = 5.0, address: str = "127.0.0.1"
) -> PeerChannel:
    return PeerChannel(runner, store, rank=rank, world_size=2, address=address, timeout_s=timeout_s, system=SYSTEM)


def fetch(pair: Pair, expert: int, pace: Pace | None = None, sha256: str = "") -> list[bytes]:
    _, runners, channels = pair
    weights = runners[1].experts.empty(1, expert)
    gate_up, down = (weight.data.numpy().data for weight in weights)
    channels[1].fetch(0, 1, expert, (gate_up, down), pace or Pace(SYSTEM, None), sha256)
    return [bytes(gate_up), bytes(down)]


def test_the_bytes_are_those_of_the_source(pair: Pair) -> None:
    for expert in (0, 3, 1):
        packed = pair[1][1].experts.read(1, expert)
        assert fetch(pair, expert) == [weight.data.numpy().tobytes() for weight in packed]
    with pytest.raises(TransportError, match="rank 0 does not compute with expert 7 of MoE layer 1") as caught:
        fetch(pair, 7)
    assert caught.value.peers == (0,)
    fetch(pair, 2)  # the connection is still good


def test_another_version_is_never_given(pair: Pair, tmp_path: Path) -> None:
    """While a swap is live the source has both; once it is settled only the file's."""
    source, system = pair[1][0], RealSystem()
    file = write_expert(tmp_path / "x", Path(source.config.model), layer=1, expert=3, seed=1)
    versions, expert_map = file.next_of(ModelVersions()), source.expert_map
    (swap,) = versions.swaps
    given = {
        sha: [part.data.numpy().tobytes() for part in source.experts.read(1, 3, of)]
        for sha, of in (("", None), (file.sha256, swap))
    }
    transport = LoopbackHub(2, system).transport(0)
    try:
        source.begin(transport, expert_map, versions)
        assert {sha: fetch(pair, 3, sha256=sha) for sha in given} == given
        source.begin(transport, expert_map, versions.with_oldest(1))
        assert fetch(pair, 3, sha256=file.sha256) == given[file.sha256]
        for sha256 in ("", "0" * 63 + "1"):
            with pytest.raises(TransportError, match=f"expert 3 of MoE layer 1.*{sha256}"):
                fetch(pair, 3, sha256=sha256)
        assert fetch(pair, 2) == [part.data.numpy().tobytes() for part in pair[1][1].experts.read(1, 2)]
    finally:
        source.begin(transport, expert_map)


def test_pace_bounds_the_bytes_per_second(pair: Pair) -> None:
    fetch(pair, 0)
    pace = Pace(SYSTEM, 20_000)
    start_s = time.monotonic()
    num_bytes = sum(map(len, fetch(pair, 0, pace)))
    assert pace.total_bytes == num_bytes
    assert time.monotonic() - start_s >= num_bytes / 20_000 - 0.06  # a lower bound holds on any machine


def test_a_cancelled_job_ends_at_once_and_the_next_one_gets_its_own_bytes(pair: Pair) -> None:
    pace = Pace(SYSTEM, 1)
    threading.Timer(0.05, pace.cancel).start()
    with pytest.raises(StagingCancelled):
        fetch(pair, 0, pace)
    assert fetch(pair, 1) == [weight.data.numpy().tobytes() for weight in pair[1][1].experts.read(1, 1)]


def test_a_source_that_is_gone_is_named(pair: Pair) -> None:
    fetch(pair, 0)
    pair[2][0].close()
    with pytest.raises(PeerLost) as caught:
        fetch(pair, 1)
    assert caught.value.peers == (0,)


def test_closing_ends_a_fetch_that_waits(runners: list[ModelRunner]) -> None:
    store = DictStore()
    channel = open_channel(runners[1], store, 1, timeout_s=30.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = {"host": "127.0.0.1", "port": silent.getsockname()[1], "token": bytes(32)}
        store.put("experts/0", msgspec.msgpack.encode(address))
        threading.Timer(0.2, channel.close).start()
        with pytest.raises(TransportAborted):
            fetch((store, runners, [channel, channel]), 0)


def test_a_source_without_an_address_is_waited_for_and_named(runners: list[ModelRunner]) -> None:
    channel = open_channel(runners[1], DictStore(), 1, timeout_s=0.2)
    with pytest.raises(TransportTimeout, match="address of rank 0"):
        fetch((DictStore(), runners, [channel, channel]), 0)
    channel.close()


def test_strangers_get_nothing_and_impostors_are_found_out(pair: Pair) -> None:
    store = pair[0]
    address = msgspec.msgpack.decode(store.values["experts/0"])
    with socket.create_connection((address["host"], address["port"]), timeout=5.0) as stranger:
        stranger.sendall(GREETING.pack(MAGIC, 1, bytes(NONCE_BYTES)))
        assert len(stranger.recv(64, socket.MSG_WAITALL)) == 64
        stranger.sendall(bytes(PROOF_BYTES) + np.array([1, 0], "<u4").tobytes())
        assert stranger.recv(1) == b""  # turned away, unheard
    store.put("experts/0", msgspec.msgpack.encode({**address, "token": bytes(32)}))
    with pytest.raises(TransportError, match="does not know its token"):
        fetch(pair, 0)


def test_experts_leave_the_host_only_over_a_trusted_network_and_without_a_listener_come_from_disk(
    runners: list[ModelRunner],
) -> None:
    def opened(address: str, *, trusted: bool) -> tuple[PeerChannel | None, DictStore]:
        store = DictStore()
        channel = open_peer_channel(
            runners[0],
            store,
            rank=0,
            world_size=2,
            address=address,
            trusted=trusted,
            timeout_s=5.0,
            system=SYSTEM,
        )
        return channel, store

    for address, trusted in (("192.0.2.1", False), ("2001:db8::1", False), ("192.0.2.1", True), ("2001:db8::1", True)):
        channel, store = opened(address, trusted=trusted)  # addresses for documentation: no host has them
        assert channel is None
        assert not store.values
    channel, _ = opened("127.0.0.1", trusted=False)
    assert channel is not None
    channel.close()


def test_it_listens_on_ipv6(runners: list[ModelRunner]) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    store = DictStore()
    channels = [open_channel(runner, store, rank, address="::1") for rank, runner in enumerate(runners)]
    packed = runners[1].experts.read(1, 0)
    assert fetch((store, runners, channels), 0) == [weight.data.numpy().tobytes() for weight in packed]
    for channel in channels:
        channel.close()


def connect(pair: Pair, timeout_s: float) -> socket.socket:
    address = msgspec.msgpack.decode(pair[0].values["experts/0"])
    return socket.create_connection((address["host"], address["port"]), timeout=timeout_s)


def test_a_crowd_of_strangers_is_bounded(pair: Pair) -> None:
    crowd = [connect(pair, 5.0) for _ in range(4)]  # twice the ranks
    with connect(pair, 3.0) as one_too_many:
        assert one_too_many.recv(1) == b""  # at once; the others have five seconds
    for stranger in crowd:
        stranger.close()
    deadline_s = time.monotonic() + 20.0
    while True:
        try:
            fetch(pair, 0)  # a peer is heard again
            return
        except PeerLost:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)


def test_a_stranger_wins_no_time_by_a_byte_now_and_then(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_channel, "_HANDSHAKE_S", 0.5)
    with connect(pair, 0.1) as slow:
        for _ in range(30):  # of a greeting of 40
            try:
                slow.sendall(b"S")
                if slow.recv(1) == b"":
                    return
            except TimeoutError:
                continue
            except ConnectionError:
                return
    pytest.fail("it is still heard after three seconds")


def test_a_failure_to_accept_does_not_end_accepting(
    runners: list[ModelRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_channel, "_ACCEPT_PAUSE_S", 0.01)
    accept, num_left = socket.socket.accept, 3

    def failing(listener: socket.socket) -> tuple[socket.socket, object]:
        nonlocal num_left
        if num_left > 0:
            num_left -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", failing)
    store = DictStore()
    channels = [open_channel(runner, store, rank) for rank, runner in enumerate(runners)]
    fetch((store, runners, channels), 0)
    assert num_left == 0
    for channel in channels:
        channel.close()
