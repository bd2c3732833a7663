"""How shm ranks find each other, and what is left in /dev/shm when they do not: nothing, or what a sweep removes."""

from __future__ import annotations

import errno
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comm_ranks import MAILBOX_BYTES, ProcessRanks, RankProcess, fresh_channel, job, results

from switchgear_runtime.comm import segment
from switchgear_runtime.comm.rendezvous import open_transport
from switchgear_runtime.comm.segment import channel_path, sweep_abandoned, unlink_channel
from switchgear_runtime.comm.shm import MAILBOX_BYTES_MAX, ShmTransport
from switchgear_runtime.errors import ConfigError, TransportError, TransportTimeout
from switchgear_runtime.generation import GenerationDescriptor

pytestmark = pytest.mark.ranks
TIMEOUT_S = 30.0
EXCHANGE = {"num_calls": 20, "mailbox_bytes": MAILBOX_BYTES, "shapes": ["random", "long"], "jitter_s": 0.0}


@pytest.fixture(scope="module")
def ranks() -> Iterator[ProcessRanks]:
    started = ProcessRanks()
    yield started
    started.close()


def _wait_until(ready: Any, what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not ready():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


def _kill(processes: list[RankProcess]) -> None:
    for process in processes:
        process.close()


def test_missing_ranks_are_named(ranks: ProcessRanks) -> None:
    channel = fresh_channel()
    processes = ranks.acquire(2)
    for rank, process in enumerate(processes):
        process.start(job("headers", [channel], rank, 4, join_timeout_s=0.6))
    for process in processes:
        outcome = process.answer()
        assert outcome is not None
        assert (outcome["error"], outcome["peers"]) == ("TransportTimeout", [2, 3]), outcome
    ranks.release(processes)
    assert not channel_path(channel).exists()


def test_a_missing_rank_0_is_named() -> None:
    channel = fresh_channel()
    begin = time.monotonic()
    with pytest.raises(TransportTimeout, match="has not been created") as failure:
        ShmTransport(channel, 1, 2, MAILBOX_BYTES, 0.2)
    assert failure.value.peers == (0,)
    assert 0.2 <= time.monotonic() - begin < 2.0


def test_a_crash_of_all_ranks_leaves_nothing(ranks: ProcessRanks) -> None:
    channel = fresh_channel()
    processes = ranks.acquire(3)
    for rank, process in enumerate(processes):
        arguments = {"victim": 1, "mailbox_bytes": MAILBOX_BYTES}
        process.start(job("storm", [channel], rank, 3, arguments=arguments))
    assert processes[1].answer() == {"told": "ready"}
    assert not channel_path(channel).exists()  # the ranks still run, and no name is there
    _kill(processes)
    assert not channel_path(channel).exists()


def test_a_crash_while_joining_is_seen_or_swept(ranks: ProcessRanks) -> None:
    """Ranks 0 and 1 wait for rank 2. Their segment is not swept while they live; all dead, it is."""
    channel = fresh_channel()
    processes = ranks.acquire(2)
    for rank, process in enumerate(processes):
        process.start(job("headers", [channel], rank, 3))
    _wait_until(channel_path(channel).exists, "rank 0 creates the segment")
    assert channel not in sweep_abandoned()
    assert channel_path(channel).exists()
    _kill(processes)
    assert channel_path(channel).exists()
    assert channel in sweep_abandoned()
    assert not channel_path(channel).exists()
    assert not unlink_channel(channel)


def test_a_survivor_of_a_crash_while_joining_unlinks(ranks: ProcessRanks) -> None:
    channel = fresh_channel()
    victim, survivor = ranks.acquire(2)
    victim.start(job("headers", [channel], 0, 3))
    _wait_until(channel_path(channel).exists, "rank 0 creates the segment")
    survivor.start(job("headers", [channel], 1, 3, join_timeout_s=0.8))
    time.sleep(0.1)
    victim.signal(signal.SIGKILL)
    outcome = survivor.answer()
    assert outcome is not None
    assert (outcome["error"], outcome["peers"]) in (("PeerLost", [0]), ("TransportTimeout", [2])), outcome
    assert not channel_path(channel).exists()
    victim.close()
    ranks.release([survivor])


def test_the_controller_can_unlink_its_channels(ranks: ProcessRanks) -> None:
    channel = fresh_channel()
    (process,) = ranks.acquire(1)
    process.start(job("headers", [channel], 0, 2))
    _wait_until(channel_path(channel).exists, "rank 0 creates the segment")
    _kill([process])
    assert unlink_channel(channel)
    assert not channel_path(channel).exists()


def test_two_generations_at_once(ranks: ProcessRanks) -> None:
    """The same processes hold two channels and use them in turn."""
    seed = secrets.randbits(32)
    processes = ranks.acquire(3)
    channels = [fresh_channel(), fresh_channel()]
    for rank, process in enumerate(processes):
        process.start(job("exchange", channels, rank, 3, num_rounds=3, arguments={"seed": seed, **EXCHANGE}))
    outcomes = [process.answer() or {} for process in processes]
    assert all(len(result) == 6 for result in results(outcomes)), f"seed={seed}"
    ranks.release(processes)


def test_a_late_rank_of_an_old_channel_finds_nothing(ranks: ProcessRanks) -> None:
    channel = fresh_channel()
    processes = ranks.acquire(2)
    for rank, process in enumerate(processes):
        arguments = {"victim": 0, "mailbox_bytes": MAILBOX_BYTES}
        process.start(job("storm", [channel], rank, 2, arguments=arguments))
    assert processes[0].answer() == {"told": "ready"}
    with pytest.raises(TransportTimeout) as failure:
        ShmTransport(channel, 1, 2, MAILBOX_BYTES, 0.2)
    assert failure.value.peers == (0,)
    processes[0].signal(signal.SIGKILL)
    outcome = processes[1].answer()
    assert outcome is not None
    seen = results([outcome])[0][0]
    assert (seen["error"], seen["peers"]) == ("PeerLost", [0]), seen  # the late rank disturbed nobody before
    _kill(processes)


def test_settings_that_differ_are_named() -> None:
    channel = fresh_channel()
    failures: list[BaseException] = []

    def rank_0() -> None:
        try:
            ShmTransport(channel, 0, 2, MAILBOX_BYTES, 0.6)
        except TransportError as error:
            failures.append(error)

    thread = threading.Thread(target=rank_0)
    thread.start()
    with pytest.raises(TransportTimeout, match=r"expected \d+: all ranks need one world_size and mailbox_bytes"):
        ShmTransport(channel, 1, 2, 2 * MAILBOX_BYTES, 0.4)
    thread.join()
    assert isinstance(failures[0], TransportTimeout)
    assert not channel_path(channel).exists()


def test_a_rank_joins_once() -> None:
    channel = fresh_channel()
    failures: list[BaseException] = []

    def join(rank: int) -> None:
        try:
            ShmTransport(channel, rank, 3, MAILBOX_BYTES, 1.0)
        except TransportError as error:
            failures.append(error)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == 3
    assert sum("same rank" in str(failure) for failure in failures) == 1
    assert not channel_path(channel).exists()


def test_a_name_in_use_is_refused_and_kept() -> None:
    channel = fresh_channel()
    channel_path(channel).touch()
    try:
        with pytest.raises(TransportError, match="fresh channel name"):
            ShmTransport(channel, 0, 2, MAILBOX_BYTES, 0.2)
        assert channel_path(channel).exists()
    finally:
        assert unlink_channel(channel)


@pytest.mark.parametrize("asked_first", [True, False])
def test_a_full_dev_shm_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, asked_first: bool) -> None:
    channel = fresh_channel()
    mailbox_bytes = MAILBOX_BYTES
    if asked_first:
        space = os.statvfs(segment.FOLDER)
        mailbox_bytes = min(space.f_bavail * space.f_frsize, MAILBOX_BYTES_MAX)
    else:

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TransportError, match=r"cannot reserve .* MiB are free.*--shm-size"):
        ShmTransport(channel, 0, 2, mailbox_bytes, 1.0)
    assert not channel_path(channel).exists()


@pytest.mark.parametrize(
    "arguments",
    [("../x", 0, 2, 4096), ("", 0, 2, 4096), ("a", 2, 2, 4096), ("a", -1, 2, 4096), ("a", 0, 65, 4096), ("a", 0, 2, 0)],
)
def test_arguments_that_cannot_work(arguments: tuple[str, int, int, int]) -> None:
    with pytest.raises(ConfigError):
        ShmTransport(*arguments, timeout_s=0.1)


def test_views_outlive_the_transport() -> None:
    """Reading a view after close() is safe: the mapping goes with its last view."""
    channel = fresh_channel()
    views: dict[int, list[memoryview]] = {}

    def run(rank: int) -> None:
        with ShmTransport(channel, rank, 2, MAILBOX_BYTES, TIMEOUT_S) as transport:
            send = [b"short" if peer else b"long" * MAILBOX_BYTES for peer in range(2)]
            views[rank] = transport.all_to_all_v(send, timeout_s=TIMEOUT_S)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bytes(views[0][1]) == b"long" * MAILBOX_BYTES
    assert bytes(views[1][0]) == b"short"
    assert _mapped(channel)
    views.clear()
    assert not _mapped(channel)


def _mapped(channel: str) -> bool:
    return f"sg-{channel}" in Path("/proc/self/maps").read_text()


def test_a_transport_that_is_dropped_frees_everything() -> None:
    before = _open_files()
    for _ in range(3):
        channel = fresh_channel()
        ShmTransport(channel, 0, 1, MAILBOX_BYTES, TIMEOUT_S)  # neither kept nor closed
        assert not _mapped(channel)
    assert _open_files() == before
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    assert "sg-heartbeat\n" not in names


def _open_files() -> list[str]:
    return [str(file.readlink()) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]


def test_a_channel_may_go_before_its_transport() -> None:
    """As when both are of one cycle that the collector takes: in any order."""
    transport = ShmTransport(fresh_channel(), 0, 1, MAILBOX_BYTES, 1.0)
    channel = transport._native
    assert channel is not None
    channel.__del__()
    transport.__del__()


def test_open_transport_opens_shm() -> None:
    descriptor = GenerationDescriptor(term=1, generation=1, world_size=1, epoch=0, channel=fresh_channel())
    transport = open_transport("shm", descriptor, 0, mailbox_bytes=MAILBOX_BYTES, timeout_s=TIMEOUT_S)
    assert transport.all_gather(b"one", timeout_s=1.0) == [b"one"]
    transport.close()
    with pytest.raises(ConfigError, match="transport='pigeon'"):
        open_transport("pigeon", descriptor, 0, mailbox_bytes=MAILBOX_BYTES, timeout_s=TIMEOUT_S)
