"""What loopback adds to the conformance suite: kill, stop and resume, strictness, rendezvous by channel."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from switchgear_runtime.comm.faulty import RankCrashed
from switchgear_runtime.comm.loopback import LoopbackHub
from switchgear_runtime.comm.rendezvous import open_transport
from switchgear_runtime.errors import ConfigError, PeerLost, TransportError, TransportTimeout
from switchgear_runtime.generation import GenerationDescriptor
from switchgear_runtime.system import RealSystem

TIMEOUT_S = 30.0


def _together(*runs: Callable[[], Any]) -> list[Any]:
    """The results, or errors, of `runs`, each in a thread of its own."""
    outcomes: list[Any] = [None] * len(runs)

    def run(index: int) -> None:
        try:
            outcomes[index] = runs[index]()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            outcomes[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
    return outcomes


def test_an_expired_view_shows_rubbish() -> None:
    """A reader that breaks the lifetime rule fails here always, not over shm sometimes."""
    hub = LoopbackHub(2, RealSystem())
    first, second = hub.transport(0), hub.transport(1)
    views: list[memoryview] = []

    def run() -> None:
        for number in range(3):
            received = first.all_to_all_v([b"", bytes([number]) * 8], timeout_s=TIMEOUT_S)
            views.append(received[1])
            if number < 2:
                assert bytes(views[0]) == b"hello 00"

    def other() -> None:
        for number in range(3):
            second.all_to_all_v([b"hello %02d" % number, b""], timeout_s=TIMEOUT_S)

    assert _together(run, other) == [None, None]
    assert bytes(views[0]) == b"\xdb" * 8
    assert [bytes(view) for view in views[1:]] == [b"hello 01", b"hello 02"]


def test_ranks_whose_calls_differ_are_told() -> None:
    hub = LoopbackHub(2, RealSystem())
    ends = [hub.transport(rank) for rank in range(2)]
    gathered, barred = _together(
        lambda: ends[0].all_gather(b"", timeout_s=TIMEOUT_S), lambda: ends[1].barrier(timeout_s=TIMEOUT_S)
    )
    for outcome in (gathered, barred):
        assert isinstance(outcome, TransportError)
        assert "ranks disagree" in str(outcome)


def test_a_killed_rank_unwinds_and_its_peer_is_told() -> None:
    hub = LoopbackHub(2, RealSystem())
    ends = [hub.transport(rank) for rank in range(2)]
    hub.kill(1)
    lost, crashed = _together(
        lambda: ends[0].barrier(timeout_s=TIMEOUT_S), lambda: ends[1].barrier(timeout_s=TIMEOUT_S)
    )
    assert isinstance(lost, PeerLost)
    assert lost.peers == (1,)
    assert isinstance(crashed, RankCrashed)
    assert not isinstance(crashed, Exception)


def test_a_killed_rank_may_join_a_later_channel() -> None:
    hub = LoopbackHub(2, RealSystem())
    for rank in range(2):
        hub.transport(rank, "g1")
    hub.kill(1)
    ends = [hub.transport(rank, "g2") for rank in range(2)]
    assert _together(*(lambda end=end: end.barrier(timeout_s=TIMEOUT_S) for end in ends)) == [None, None]


def test_a_stopped_rank_goes_on_after_resume() -> None:
    hub = LoopbackHub(2, RealSystem())
    ends = [hub.transport(rank) for rank in range(2)]
    hub.stop(1)
    resumed = threading.Timer(0.1, lambda: hub.resume(1))
    resumed.start()
    assert (
        _together(*(lambda end=end: end.all_gather(b"%d" % end.rank, timeout_s=TIMEOUT_S) for end in ends))
        == [[b"0", b"1"]] * 2
    )
    resumed.join()


def test_open_names_the_missing_ranks() -> None:
    hub = LoopbackHub(3, RealSystem())
    outcomes = _together(*(lambda r=r: hub.open(r, "c", world_size=3, timeout_s=0.1) for r in (0, 2)))
    for outcome in outcomes:
        assert isinstance(outcome, TransportTimeout)
        assert outcome.peers == (1,)
    with pytest.raises(TransportTimeout):
        hub.open(1, "c", world_size=3, timeout_s=0.0)  # too late: the others have given up


def test_open_transport_meets_at_the_hub() -> None:
    hub = LoopbackHub(2, RealSystem())
    for generation, world_size in ((1, 2), (2, 3)):
        descriptor = GenerationDescriptor(
            term=1, generation=generation, world_size=world_size, epoch=0, channel=f"g{generation}"
        )

        def run(rank: int, descriptor: GenerationDescriptor = descriptor) -> list[bytes]:
            end = open_transport("loopback", descriptor, rank, mailbox_bytes=1, timeout_s=TIMEOUT_S, hub=hub)
            try:
                return end.all_gather(b"%d" % rank, timeout_s=TIMEOUT_S)
            finally:
                end.close()

        expected = [b"%d" % rank for rank in range(world_size)]
        assert _together(*(lambda r=r, run=run: run(r) for r in range(world_size))) == [expected] * world_size
    with pytest.raises(ConfigError, match="one process"):
        open_transport("loopback", descriptor, 0, mailbox_bytes=1, timeout_s=TIMEOUT_S)


def test_a_rank_joins_a_channel_once() -> None:
    hub = LoopbackHub(2, RealSystem())
    hub.transport(0)
    with pytest.raises(TransportError, match="before"):
        hub.transport(0)
    with pytest.raises(ValueError, match="rank=2"):
        hub.transport(2)
