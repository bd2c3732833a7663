"""HierarchicalDispatch: the bits of the flat way and of a lone rank, for any domains; and what it saves between them."""

from __future__ import annotations

import random
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from fake_nccl import FakeNccl, HostGpu
from layer_run import FFN, HIDDEN, TIMEOUT_S, Counting, LayerRun, kernels, payload, random_domains
from tiny_checkpoints import run_ranks

from switchgear_runtime.comm.device_exchange import DeviceExchange, HostStaged, OneRank, Parts
from switchgear_runtime.comm.domains import Domains
from switchgear_runtime.comm.loopback import LoopbackHub
from switchgear_runtime.comm.nccl import NcclTransport
from switchgear_runtime.comm.partition_exchange import PartitionExchange
from switchgear_runtime.comm.rendezvous import open_transport
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.cuda.flat_dispatch import FlatDispatch
from switchgear_runtime.cuda.group_choice import large_group
from switchgear_runtime.cuda.hierarchical_dispatch import HierarchicalDispatch
from switchgear_runtime.cuda.row_parts import Senders
from switchgear_runtime.errors import TransportError
from switchgear_runtime.generation import GenerationDescriptor
from switchgear_runtime.system import RealSystem

SYSTEM = random.SystemRandom()
ROW_BYTES = 2 * HIDDEN


def hierarchical(
    transport: Transport, domains: Domains, nccl: FakeNccl | None = None
) -> tuple[HierarchicalDispatch, Counting, Counting]:
    """And what counts its two exchanges."""
    rank = transport.rank
    exchange: DeviceExchange = HostStaged(transport)
    if nccl is not None:
        exchange = NcclTransport(transport, HostGpu(nccl, rank), nccl.of(rank), timeout_s=TIMEOUT_S)
    outer = Counting(exchange)
    inner = Counting(PartitionExchange(exchange, domains.members[domains.at(rank)[0]], domains.num_ranks))
    return HierarchicalDispatch(kernels(), outer, inner, payload(), domains, rank), outer, inner


@pytest.mark.parametrize(("num_ranks", "by_nccl"), [*((num, False) for num in range(1, 9)), (4, True), (7, True)])
def test_bits_do_not_depend_on_domains(num_ranks: int, by_nccl: bool) -> None:
    """Random experts, replicas, tokens and domains; three layers in turn over the same exchanges."""
    nccl = FakeNccl() if by_nccl else None
    seed = SYSTEM.randrange(1 << 30)
    layers = [LayerRun(seed + layer, num_ranks) for layer in range(3)]
    domains = random_domains(np.random.default_rng(seed), num_ranks)

    def run(rank: int, transport: Transport) -> None:
        flat = FlatDispatch(kernels(), HostStaged(transport), payload(), rank=rank, num_ranks=num_ranks)
        by_domain, _, _ = hierarchical(transport, domains, nccl)
        for layer in layers:
            expected = layer.alone(rank)
            for group in (flat, by_domain):
                assert torch.equal(layer.forward(group, rank), expected), f"seed {seed}: {group}, {domains}"
                assert group._kernels.faults.tolist() == [0, 0], f"seed {seed}: {group}, {domains}"

    run_ranks(num_ranks, run)


@pytest.mark.parametrize("names", ["aabb", "aaab", "abab", "abba", "aabbccdd", "aaaaaabb"])
def test_a_row_crosses_once_to_a_domain_and_once_inside(names: str) -> None:
    seed = SYSTEM.randrange(1 << 30)
    domains = Domains.of(names)
    num_ranks = len(names)
    layer = LayerRun(seed, num_ranks)

    def run(rank: int, transport: Transport) -> tuple[list[list[list[int]]], list[list[list[int]]], int, int]:
        by_domain, outer, inner = hierarchical(transport, domains)
        assert torch.equal(layer.forward(by_domain, rank), layer.alone(rank)), f"seed {seed}"
        flat = Counting(HostStaged(transport))
        layer.forward(FlatDispatch(kernels(), flat, payload(), rank=rank, num_ranks=num_ranks), rank)
        strangers = [peer for peer in range(num_ranks) if domains.at(peer)[0] != domains.at(rank)[0]]
        sent = [sum(part[peer] for peer in strangers) for part in flat.calls[0]]
        return outer.calls, inner.calls, sent[0], sum(flat.calls[1][0][peer] for peer in strangers)

    flat_rows = domain_rows = 0
    results = run_ranks(num_ranks, run)
    domain_of = [domains.at(rank)[0] for rank in range(num_ranks)]
    for rank, (outer, inner, flat_bytes, _) in enumerate(results):
        pairs = layer.pairs(rank)
        by_domain = {(token, domain_of[to]) for token, to in pairs}
        for domain in range(len(domains.members)):
            num_rows = sum(other == domain for _, other in by_domain)
            gateway = domains.gateway(rank, domain)
            (rows, ids), _ = outer
            assert (rows[gateway], ids[gateway]) == (num_rows * ROW_BYTES, num_rows * 4 * layer.top_k), f"seed {seed}"
            domain_rows += num_rows * (domain != domain_of[rank])
        assert sum(outer[0][0]) == len(by_domain) * ROW_BYTES  # and nothing goes to anybody else
        flat_rows += flat_bytes // ROW_BYTES
        assert flat_bytes == ROW_BYTES * len({pair for pair in pairs if domain_of[pair[1]] != domain_of[rank]})
        # Inside: each row that is at this gateway, once to each rank that needs it.
        at_gateway = [
            (source, token, to)
            for source in range(num_ranks)
            if domains.gateway(source, domain_of[rank]) == rank
            for token, to in layer.pairs(source)
            if domain_of[to] == domain_of[rank]
        ]
        assert sum(inner[0][0]) == ROW_BYTES * len(set(at_gateway)), f"seed {seed}"
        assert sum(inner[0][1]) == 8 * len(at_gateway)
        assert sum(outer[1][0]) == ROW_BYTES * len(at_gateway)  # results: one for each pair, by where it came from
    # Results cross in equal number both ways; so the saving is that of rows.
    assert sum(result[3] for result in results) == ROW_BYTES * sum(
        domain_of[to] != domain_of[rank] for rank in range(num_ranks) for _, to in layer.pairs(rank)
    )
    assert domain_rows <= flat_rows


def test_what_is_saved_when_every_token_goes_everywhere() -> None:
    """Two domains of four, each token to all eight ranks: between domains 1 row a token, flat 4."""
    domains, num_ranks = Domains.of("aaaabbbb"), 8
    layer = LayerRun(7, num_ranks)
    layer.experts_RS = np.arange(num_ranks)[:, None]
    layer.num_experts = layer.top_k = num_ranks
    generator = torch.Generator().manual_seed(8)
    layer.w13_E = [torch.randn(2 * FFN, HIDDEN, generator=generator).bfloat16() for _ in range(num_ranks)]
    layer.w2_E = [torch.randn(HIDDEN, FFN, generator=generator).bfloat16() for _ in range(num_ranks)]
    layer.slots_per_rank = 1
    layer.ids_R = [np.tile(np.arange(num_ranks), (len(h), 1)) for h in layer.h_R]
    layer.slots_R = [torch.from_numpy(ids.astype(np.int32)) for ids in layer.ids_R]
    layer.weights_R = [torch.full((len(h), num_ranks), 0.125) for h in layer.h_R]

    def run(rank: int, transport: Transport) -> tuple[int, int]:
        by_domain, outer, _ = hierarchical(transport, domains)
        y_TD = layer.forward(by_domain, rank)
        flat = Counting(HostStaged(transport))
        assert torch.equal(
            layer.forward(FlatDispatch(kernels(), flat, payload(), rank=rank, num_ranks=num_ranks), rank), y_TD
        )
        strangers = range(4, 8) if rank < 4 else range(4)
        return tuple(sum(calls[0][0][peer] for peer in strangers) for calls in (flat.calls, outer.calls))  # type: ignore[return-value]

    counts = run_ranks(num_ranks, run)
    num_tokens = sum(map(len, layer.h_R))
    assert num_tokens > 0
    assert sum(flat for flat, _ in counts) == 4 * num_tokens * ROW_BYTES
    assert sum(outer for _, outer in counts) == num_tokens * ROW_BYTES


@pytest.mark.parametrize(
    ("names", "dispatch", "expected"),
    [
        ("", "auto", FlatDispatch),
        ("aabb", "auto", HierarchicalDispatch),
        ("aabb", "flat", FlatDispatch),
        ("abcd", "auto", FlatDispatch),  # each a domain of its own: nothing to save
        ("aaaa", "auto", FlatDispatch),
        ("aaaa", "hierarchical", HierarchicalDispatch),
    ],
)
def test_the_way_is_chosen_by_the_domains(names: str, dispatch: str, expected: type) -> None:
    """As a rank chooses it from a generation's descriptor, whether domains are told or follow from hosts."""
    hub = LoopbackHub(4, RealSystem())
    for places in (
        {"domains": tuple(names)},
        {"hosts": tuple(names)},
        {"domains": tuple(names), "hosts": tuple("wxyz")},
    ):
        channel = secrets.token_hex(8)
        if not names and places.get("hosts"):
            continue  # hosts of their own
        descriptor = GenerationDescriptor(term=1, generation=1, world_size=4, epoch=0, channel=channel, **places)

        def run(rank: int, descriptor: GenerationDescriptor = descriptor) -> type:
            transport = open_transport(
                "loopback", descriptor, rank, mailbox_bytes=1, timeout_s=TIMEOUT_S, hub=hub, dispatch=dispatch
            )
            return type(large_group(kernels(), transport, payload()))

        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(run, range(4))) == {expected}, places


@pytest.mark.parametrize("lengths", [(ROW_BYTES + 1, 4), (2 * ROW_BYTES, 4), (0, 4)])
def test_rows_and_slots_that_do_not_go_together_are_an_error(lengths: tuple[int, int]) -> None:
    class Wrong(OneRank):
        def exchange(self, send: Sequence[Parts], *, timeout_s: float) -> list[Parts]:  # noqa: ARG002
            return [Parts(torch.zeros(num, dtype=torch.uint8), [0, num]) for num in lengths]

    group = HierarchicalDispatch(kernels(), Wrong(), OneRank(), payload(), Domains.of("a"), 0)
    handle = group.create_handle(torch.zeros(1, 1, dtype=torch.int32), 1)
    with pytest.raises(TransportError, match=r"rows came, which are no whole|slots came, for \[[02]\] rows") as caught:
        group.dispatch(torch.zeros(1, HIDDEN), handle, timeout_s=1.0)
    assert (caught.value.rank, tuple(caught.value.peers)) == (0, (0,))


def test_ranks_of_another_domain_are_blamed_by_their_own_numbers() -> None:
    senders = Senders(4, (1, 4, 6))
    senders.check([0, 4, 4, 12], lambda part, length: length == (4, 0, 8)[part], "rows")
    with pytest.raises(TransportError, match=r"\[0, 4, 4, 13\] bytes of rows") as caught:
        senders.check([0, 4, 4, 13], lambda part, length: length == (4, 1, 8)[part], "rows")
    assert (caught.value.rank, tuple(caught.value.peers)) == (4, (4, 6))


def test_results_that_do_not_come_back_are_an_error() -> None:
    class Silent(OneRank):
        def exchange(self, send: Sequence[Parts], *, timeout_s: float) -> list[Parts]:
            if len(send) == 1:
                return [Parts(torch.zeros(0, dtype=torch.uint8), [0, 0])]
            return super().exchange(send, timeout_s=timeout_s)

    for group in (
        FlatDispatch(kernels(), Silent(), payload(), rank=0, num_ranks=1),
        HierarchicalDispatch(kernels(), Silent(), OneRank(), payload(), Domains.of("a"), 0),
    ):
        handle = group.create_handle(torch.zeros(1, 1, dtype=torch.int32), 1)
        received = group.dispatch(torch.zeros(1, HIDDEN), handle, timeout_s=1.0)
        with pytest.raises(TransportError, match="came back"):
            group.combine(received.x_MX, torch.ones(1, 1), handle, timeout_s=1.0)
