"""FaultyTransport does what its plan says, when it says, and nothing else."""

from __future__ import annotations

import pytest

from switchgear_runtime.comm.faulty import Fault, FaultyTransport, RankCrashed
from switchgear_runtime.comm.loopback import LoopbackHub
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.errors import PeerLost, TransportAborted
from switchgear_runtime.system import RealSystem


class SleepingSystem(RealSystem):
    """Keeps what it was asked to sleep, instead."""

    def __init__(self) -> None:
        super().__init__(seed=0)
        self.slept_s: list[float] = []

    def sleep(self, duration_s: float) -> None:
        self.slept_s.append(duration_s)


def _call(transport: Transport, number: int) -> None:
    if number % 3 == 0:
        assert transport.all_gather(b"x", timeout_s=1.0) == [b"x"]
    elif number % 3 == 1:
        assert [bytes(view) for view in transport.all_to_all_v([b"y"], timeout_s=1.0)] == [b"y"]
    else:
        transport.barrier(timeout_s=1.0)


def test_a_delay_is_slept_before_its_call_only() -> None:
    system = SleepingSystem()
    inner = LoopbackHub(1, system).transport(0)
    plan = [Fault(call=2, kind="delay", duration_s=5.0), Fault(call=4, kind="delay", duration_s=7.0, moment="after")]
    transport = FaultyTransport(inner, system, plan)
    slept = []
    for number in range(5):
        _call(transport, number)
        slept.append(len(system.slept_s))
    assert (system.slept_s, slept) == ([5.0, 7.0], [0, 1, 1, 2, 2])
    assert transport.stats() == inner.stats()
    assert transport.stats().num_calls == 5
    assert (transport.rank, transport.world_size) == (0, 1)


def test_an_abort_is_seen_by_the_peers() -> None:
    system = RealSystem()
    hub = LoopbackHub(2, system)
    transport, peer = FaultyTransport(hub.transport(0), system, [Fault(call=1, kind="abort")]), hub.transport(1)
    with pytest.raises(TransportAborted, match="planned at call 1"):
        transport.barrier(timeout_s=1.0)
    with pytest.raises(TransportAborted, match="planned at call 1"):
        peer.barrier(timeout_s=1.0)


def test_a_crash_unwinds_and_the_peers_lose_the_rank() -> None:
    system = RealSystem()
    hub = LoopbackHub(2, system)
    plan = [Fault(call=1, kind="crash")]
    transport, peer = FaultyTransport(hub.transport(0), system, plan, crash=lambda: hub.kill(0)), hub.transport(1)
    with pytest.raises(RankCrashed, match="planned at call 1"):
        transport.barrier(timeout_s=1.0)
    with pytest.raises(PeerLost) as failure:
        peer.barrier(timeout_s=1.0)
    assert failure.value.peers == (0,)
    transport.abort("too late")
    transport.close()
