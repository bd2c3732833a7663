"""NcclTransport over a made-up NCCL (ranks as threads, host memory); on GPUs the same exchange over the real one."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from comm_ranks import GpuRanks
from device_messages import TIMEOUT_S, draw, exchange_and_check
from fake_nccl import FakeNccl, HostGpu
from tiny_checkpoints import run_ranks
from usable_gpu import skip_without_gpu

from switchgear_runtime.comm import nccl as nccl_module
from switchgear_runtime.comm.device_exchange import DeviceExchange, HostStaged, Parts, device_exchange
from switchgear_runtime.comm.nccl import NcclTransport, SharedGpu, check_meeting, over_nccl
from switchgear_runtime.comm.nccl_library import Nccl, cuda_major_of
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.errors import ConfigError, TransportAborted, TransportError, TransportTimeout

Make = Callable[[FakeNccl, Transport], DeviceExchange]


def over_fake(nccl: FakeNccl, control: Transport) -> NcclTransport:
    return NcclTransport(control, HostGpu(nccl, control.rank), nccl.of(control.rank), timeout_s=TIMEOUT_S)


def staged(_nccl: FakeNccl, control: Transport) -> HostStaged:
    return HostStaged(control)


def test_one_rank_gets_views() -> None:
    def run(_rank: int, control: Transport) -> None:
        exchange = device_exchange(control)
        assert exchange_and_check(exchange, 0, 1, random.SystemRandom().randrange(1 << 30)) == 0
        data = torch.arange(10, dtype=torch.uint8)
        (got,) = exchange.exchange([Parts(data, [2, 8])], timeout_s=TIMEOUT_S)
        assert got.offsets == [0, 6]
        assert torch.equal(got.data, data[2:8])
        assert got.data.data_ptr() == data.data_ptr() + 2
        assert control.stats().num_calls == 0

    run_ranks(1, run)


@pytest.mark.parametrize("make", [over_fake, staged])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_exchanges_arrive_whole(make: Make, world_size: int) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    nccl = FakeNccl()

    def run(rank: int, control: Transport) -> None:
        exchange = make(nccl, control)
        crossed = exchange_and_check(exchange, rank, world_size, seed)
        if isinstance(exchange, NcclTransport):
            assert exchange.stats().sent_bytes - control.stats().sent_bytes == crossed, f"seed {seed}"

    run_ranks(world_size, run)
    assert (sum(nccl.num_done.values()) > 0) == (world_size > 1 and make is over_fake)


def test_it_is_a_transport_too() -> None:
    def run(rank: int, control: Transport) -> None:
        transport = over_fake(nccl, control)
        assert (transport.rank, transport.world_size) == (rank, 3)
        headers = [bytes([source]) for source in range(3)]
        assert transport.all_gather(headers[rank], timeout_s=TIMEOUT_S) == headers
        views = transport.all_to_all_v([bytes([rank, peer]) for peer in range(3)], timeout_s=TIMEOUT_S)
        assert [bytes(view) for view in views] == [bytes([peer, rank]) for peer in range(3)]
        transport.barrier(timeout_s=TIMEOUT_S)
        transport.close()
        transport.close()
        with pytest.raises(TransportAborted):
            transport.barrier(timeout_s=TIMEOUT_S)

    nccl = FakeNccl()
    run_ranks(3, run)
    assert nccl.aborted == {0, 1, 2}


def outcomes(
    world_size: int, break_it: Callable[[FakeNccl], None], timeout_s: float, ranks: Sequence[int] = ()
) -> list[Any]:
    """What each rank's exchange raises after `break_it`. `ranks`: their numbers among all, where these are of one host."""
    nccl = FakeNccl()

    def run(rank: int, control: Any) -> Any:
        if ranks:
            control.ranks = ranks
        transport = over_fake(nccl, control)
        data, offsets = draw(1, 0, rank, world_size, 0)
        transport.exchange([Parts(data, offsets)], timeout_s=TIMEOUT_S)
        transport.barrier(timeout_s=TIMEOUT_S)
        if rank == 0:
            break_it(nccl)
        transport.barrier(timeout_s=TIMEOUT_S)
        begin = time.monotonic()
        with pytest.raises(TransportError) as caught:
            transport.exchange([Parts(data, offsets)], timeout_s=timeout_s)
        with pytest.raises(TransportError):
            transport.exchange([Parts(data, offsets)], timeout_s=timeout_s)
        return caught.value, time.monotonic() - begin

    results = run_ranks(world_size, run)
    assert nccl.aborted == set(range(world_size)), "a communicator was not given up"
    return results


def test_a_gpu_that_never_finishes_is_named_at_the_deadline() -> None:
    for rank, (error, elapsed_s) in enumerate(outcomes(3, lambda nccl: nccl.stuck.add(1), 1.0)):
        assert isinstance(error, TransportTimeout)
        assert list(error.peers) == ([] if rank == 1 else [1])
        assert elapsed_s < 10.0


def test_an_error_of_nccl_is_named_at_once() -> None:
    for rank, (error, elapsed_s) in enumerate(outcomes(3, lambda nccl: nccl.broken.update({2: 6}), TIMEOUT_S)):
        assert "NCCL failed on rank 2" in str(error)
        assert list(error.peers) == ([] if rank == 2 else [2])
        assert ("a peer failed or is gone" in str(error)) == (rank == 2)
        assert elapsed_s < 10.0


def test_ranks_of_one_host_are_named_as_all_know_them() -> None:
    ranks = (2, 5, 6)
    for break_it in (lambda nccl: nccl.stuck.add(1), lambda nccl: nccl.broken.update({1: 6})):
        for rank, (error, _) in enumerate(outcomes(3, break_it, 1.0, ranks)):
            assert error.rank == ranks[rank]
            assert list(error.peers) == ([] if rank == 1 else [5])
            assert "rank 5" in str(error)


def test_a_rank_that_goes_is_named_by_the_hosts_transport() -> None:
    nccl = FakeNccl()

    def run(rank: int, control: Transport) -> None:
        if rank == 1:
            transport = over_fake(nccl, control)
            transport.abort("enough")
            transport.close()
            return
        with pytest.raises(TransportAborted, match="enough"):  # perhaps in the rendezvous already
            over_fake(nccl, control).exchange(
                [Parts(torch.zeros(3, dtype=torch.uint8), [0, 1, 2, 3])], timeout_s=TIMEOUT_S
            )

    run_ranks(3, run)
    assert nccl.aborted == {0, 1, 2}


def test_ranks_that_share_a_gpu() -> None:
    library = FakeNccl().of(0)
    check_meeting([(22907, False, "a"), (22907, False, "b")], library)
    check_meeting([(22907, True, "a"), (22907, True, "a")], library)
    with pytest.raises(SharedGpu, match=r"ranks 0 and 2 share GPU a, which NCCL 2\.29\.7 refuses"):
        check_meeting([(22907, False, "a"), (22907, False, "b"), (22907, False, "a")], library)
    with pytest.raises(ConfigError, match="different versions"):
        check_meeting([(22907, False, "a"), (22809, False, "b")], library)


def test_one_rank_needs_no_nccl() -> None:
    def run(_rank: int, control: Transport) -> None:
        assert over_nccl(control, torch.device("cuda", 0), required=True, timeout_s=1.0) is control

    run_ranks(1, run)


@pytest.mark.parametrize("gpus", [("a", "a", "b"), ("a", "b", "c")])
def test_ranks_that_share_a_gpu_need_no_nccl(gpus: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is required; ranks that each have their own do."""

    def missing() -> Nccl:
        raise ConfigError("not installed")

    fake = FakeNccl()
    monkeypatch.setattr(nccl_module, "Gpu", lambda device: HostGpu(fake, device.index, gpus[device.index]))
    monkeypatch.setattr(nccl_module, "nccl", missing)

    def run(rank: int, control: Transport) -> None:
        device = torch.device("cuda", rank)
        if len(set(gpus)) < len(gpus):
            assert over_nccl(control, device, required=False, timeout_s=TIMEOUT_S) is control
        with pytest.raises(ConfigError, match="not installed"):
            over_nccl(control, device, required=len(set(gpus)) < len(gpus), timeout_s=TIMEOUT_S)

    run_ranks(3, run)


@pytest.mark.gpu
@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["nccl", "auto"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_exchanges_over_the_real_ones(kind: str, world_size: int) -> None:
    """NCCL and peer memory, by processes that share the GPU."""
    skip_without_gpu(nccl=True)
    ranks = GpuRanks(kind)
    try:
        seed = random.SystemRandom().randrange(1 << 30)
        outcomes = ranks.run("device_exchange", world_size, seed=seed, device="cuda:0")
    finally:
        ranks.close()
    assert all("result" in outcome for outcome in outcomes), outcomes
    assert (sum(outcome["result"][0] for outcome in outcomes) > 0) == (world_size > 1)


def test_which_cuda_a_library_is_for(tmp_path: Any) -> None:
    library = tmp_path / "libnccl.so.2"
    library.write_bytes(bytes(5000) + b"NCCL version 2.29.7+cuda13.0\0" + bytes(100))
    assert cuda_major_of(library) == 13
    library.write_bytes(bytes(5000))
    assert cuda_major_of(library) is None
