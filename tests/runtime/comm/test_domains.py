"""Which ranks share fast links, the transport that knows it, and the exchange of one domain over that of all."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from device_messages import TIMEOUT_S, exchange_and_check
from tiny_checkpoints import run_ranks

from switchgear_runtime.comm import rendezvous
from switchgear_runtime.comm.device_exchange import HostStaged, Parts
from switchgear_runtime.comm.domain_transport import DomainTransport, with_domains
from switchgear_runtime.comm.domains import Domains
from switchgear_runtime.comm.hierarchical import HierarchicalTransport
from switchgear_runtime.comm.partition_exchange import PartitionExchange
from switchgear_runtime.comm.transport import Transport, TransportStats
from switchgear_runtime.generation import GenerationDescriptor


@pytest.mark.parametrize("names", ["a", "aaaa", "abcd", "aabb", "abab", "abba", "aaab", "cabbage"])
def test_domains_and_their_gateways(names: str) -> None:
    domains = Domains.of(names)
    assert sorted(rank for ranks in domains.members for rank in ranks) == list(range(len(names)))
    assert domains.num_ranks == len(names)
    firsts = [ranks[0] for ranks in domains.members]
    assert firsts == sorted(firsts)
    for rank, name in enumerate(names):
        domain, place = domains.at(rank)
        assert domains.members[domain][place] == rank
        assert {names[peer] for peer in domains.members[domain]} == {name}
        assert domains.gateway(rank, domain) == rank  # what is for its own domain goes nowhere first
        for other, ranks in enumerate(domains.members):
            assert domains.gateway(rank, other) in ranks
    for ranks in domains.members:  # equal domains share the network evenly
        for others in domains.members:
            if len(ranks) == len(others):
                domain = domains.at(others[0])[0]
                assert {domains.gateway(rank, domain) for rank in ranks} == set(others)
    assert domains.are_worth_it == (1 < len(set(names)) < len(names))
    with pytest.raises(ValueError, match=f"rank {len(names)} is in no domain"):
        domains.at(len(names))


@pytest.mark.parametrize("names", ["aabb", "abcab", "abc", "aaa"])
def test_an_exchange_of_each_domain_over_that_of_all(names: str) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    domains = Domains.of(names)

    def run(rank: int, transport: Transport) -> int:
        domain, place = domains.at(rank)
        members = domains.members[domain]
        exchange = PartitionExchange(HostStaged(transport), members, len(names))
        data = torch.arange(40, dtype=torch.uint8)
        offsets = list(accumulate([3] * len(members), initial=2))  # what lies before and behind is nobody's
        (got,) = exchange.exchange([Parts(data, offsets)], timeout_s=TIMEOUT_S)
        assert got.data.tolist() == list(range(2 + 3 * place, 5 + 3 * place)) * len(members)
        return exchange_and_check(exchange, place, len(members), seed)

    run_ranks(len(names), run)


class _TwoHosts(HierarchicalTransport):
    """One that has met nobody."""

    def __init__(self) -> None:
        self._rank, self._neighbours = 1, [0, 1]
        self.hosts = ((0, 1), (2, 3))
        self.closed = 0

    @property
    def world_size(self) -> int:
        return 4

    def close(self) -> None:
        self.closed += 1


class _OnDevice:
    """What stands beside a transport of the hosts."""

    def __init__(self, control: Any) -> None:
        self.control, self.calls = control, []  # type: ignore[var-annotated]
        self.rank, self.world_size = control.rank, control.world_size

    def stats(self) -> TransportStats:
        return TransportStats(num_calls=1, sent_bytes=10, received_bytes=100)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: self.calls.append(name)


def test_a_domain_that_is_a_host_has_a_transport_of_its_own() -> None:
    for names, is_host in (("aabb", True), ("abab", False), ("aaaa", False), ("aabc", False)):
        transport = with_domains(_TwoHosts(), Domains.of(names), _OnDevice)  # type: ignore[arg-type]
        assert (transport.inner is not None) == is_host
        parts: list[Any] = [transport.world] + ([transport.inner] if is_host else [])
        if is_host:
            assert (parts[1].rank, parts[1].world_size, parts[1].control.ranks) == (1, 2, (0, 1))
        assert (transport.rank, transport.world_size) == (1, 4)
        assert transport.stats() == TransportStats(
            num_calls=len(parts), sent_bytes=10 * len(parts), received_bytes=100 * len(parts)
        )
        transport.abort("enough")
        transport.close()
        assert all(part.calls == ["abort", "close"] for part in parts)
        transport.barrier(timeout_s=1.0)
        assert parts[0].calls[2:] == ["barrier"]


def test_a_second_communicator_that_fails_takes_the_first_along() -> None:
    made: list[_OnDevice] = []

    def on_device(control: Transport) -> Any:
        if made:
            raise RuntimeError("no second one")
        made.append(_OnDevice(control))
        return made[0]

    with pytest.raises(RuntimeError, match="no second one"):
        with_domains(_TwoHosts(), Domains.of("aabb"), on_device)
    assert made[0].calls == ["close"]


@pytest.mark.parametrize("dispatch", ["auto", "flat", "deepep", "nccl-ep"])
def test_a_library_brings_its_own_nccl(dispatch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    beside: list[str] = []

    def nccl_beside(device: str, **_: Any) -> Callable[[Transport], Transport]:
        beside.append(device)
        return lambda control: control

    monkeypatch.setattr(rendezvous, "_nccl_beside", nccl_beside)
    descriptor = GenerationDescriptor(
        term=1, generation=1, world_size=1, epoch=0, channel=f"test-{random.getrandbits(64):x}"
    )
    transport = rendezvous.open_transport(
        "auto", descriptor, 0, mailbox_bytes=4096, timeout_s=5.0, device="cuda:0", dispatch=dispatch
    )
    assert not isinstance(transport, DomainTransport)
    assert beside == (["cuda:0"] if dispatch in ("auto", "flat") else [])
    transport.close()
