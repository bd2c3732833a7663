"""Libraries of others behind an ExpertGroup, as made-up modules with the real signatures: our bits, or a refusal.

Nothing here has run with a real DeepEP or NCCL EP.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from random import SystemRandom
from typing import Any

import fake_deep_ep
import fake_nccl_ep
import pytest
import torch
from fake_deep_ep import Hub
from fake_nccl import FakeNccl, HostGpu
from layer_run import HIDDEN, TIMEOUT_S, LayerRun, kernels
from tiny_checkpoints import run_ranks

from switchgear_runtime.comm.nccl_communicator import NcclCommunicator, start_together
from switchgear_runtime.comm.peer_regions import PeerRegions
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.config import LIBRARY_DISPATCHES
from switchgear_runtime.cuda import group_choice, nccl_ep_dispatch, preflight
from switchgear_runtime.cuda.deepep_dispatch import NCCL_VERSION_MIN, DeepEp
from switchgear_runtime.cuda.group_choice import GenerationGroups, check_rows
from switchgear_runtime.cuda.local_group import LocalGroup
from switchgear_runtime.cuda.nccl_ep_dispatch import NcclEp
from switchgear_runtime.cuda.pair_dispatch import PairDispatch
from switchgear_runtime.cuda.row_payload import RowPayload
from switchgear_runtime.errors import ConfigError, TransportError, TransportTimeout

MAX_PAIRS = 20 * 8 + 3


@pytest.fixture(params=LIBRARY_DISPATCHES)
def dispatch(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def install(monkeypatch: pytest.MonkeyPatch, num_ranks: int) -> tuple[Hub, FakeNccl]:
    """Both made-up libraries, and a blocking NCCL, for ranks that are threads."""
    hub, nccl = Hub(num_ranks, SystemRandom().randrange(1 << 30)), FakeNccl(blocking=True)
    for name, module in {"deep_ep": fake_deep_ep.make_module(hub), **fake_nccl_ep.make_modules(hub)}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return hub, nccl


def open_group(dispatch: str, nccl: FakeNccl, control: Transport) -> PairDispatch:
    gpu = HostGpu(nccl, control.rank)
    shape = {"max_pairs": MAX_PAIRS, "hidden": HIDDEN, "timeout_s": TIMEOUT_S}
    library: Any
    if dispatch == "deepep":
        library = DeepEp(control, gpu, nccl.of(control.rank, NCCL_VERSION_MIN), **shape)
    else:
        library = NcclEp(control, gpu, **shape)
    return PairDispatch(kernels(), control, library, gpu.mark)


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_bits_are_those_of_a_lone_rank(monkeypatch: pytest.MonkeyPatch, dispatch: str, num_ranks: int) -> None:
    """Layers of several numbers of slots, as between epochs, and back to the first."""
    seed = SystemRandom().randrange(1 << 30)
    hub, nccl = install(monkeypatch, num_ranks)
    layers = [LayerRun(seed + number % 3, num_ranks) for number in range(4)]

    def run(rank: int, control: Transport) -> None:
        group = open_group(dispatch, nccl, control)
        for layer in layers:
            assert torch.equal(layer.forward(group, rank), layer.alone(rank)), f"seed {seed}"
        group.close()
        group.close()

    run_ranks(num_ranks, run)
    counts = {(calls.count("dispatch"), calls.count("combine")) for calls in hub.calls}
    assert counts == {(4, 4)}
    if dispatch == "nccl-ep":
        sizes = [layer.slots_per_rank for layer in layers]
        num_groups = 1 + sum(one != other for one, other in pairwise(sizes))
        assert sum(call.startswith("group ") for call in hub.calls[0]) == num_groups
        assert hub.calls[0].count("end of group") == num_groups - 1


def test_pairs_without_a_slot_go_nowhere(monkeypatch: pytest.MonkeyPatch, dispatch: str) -> None:
    _, nccl = install(monkeypatch, 2)

    def run(rank: int, control: Transport) -> torch.Tensor:
        group = open_group(dispatch, nccl, control)
        handle = group.create_handle(torch.tensor([[1, -1], [-1, 0]], dtype=torch.int32), 1)
        h_TD = torch.full((2, HIDDEN), 1.0 + rank)
        received = group.dispatch(h_TD, handle, timeout_s=TIMEOUT_S)
        y_ND = received.x_MX[received.groups.x_rows_N.long()]
        return group.combine(y_ND, torch.tensor([[0.5, 9.0], [9.0, 0.25]]), handle, timeout_s=TIMEOUT_S)

    for rank, y_TD in enumerate(run_ranks(2, run)):
        assert y_TD[:, 0].tolist() == [0.5 * (1.0 + rank), 0.25 * (1.0 + rank)]


def test_a_device_that_never_finishes_is_named(monkeypatch: pytest.MonkeyPatch, dispatch: str) -> None:
    _, nccl = install(monkeypatch, 2)
    layer = LayerRun(5, 2)

    def run(rank: int, control: Transport) -> TransportTimeout:
        group = open_group(dispatch, nccl, control)
        group._mark = lambda: lambda: rank != 1
        handle = group.create_handle(layer.slots_R[rank], layer.slots_per_rank)
        with pytest.raises(TransportTimeout, match=r"dispatch: waited 0\.50 s for the GPU of rank 1") as caught:
            group.dispatch(layer.h_R[rank], handle, timeout_s=0.5)
        return caught.value

    assert [error.peers for error in run_ranks(2, run)] == [(1,), ()]


@pytest.mark.parametrize(
    ("outcome", "error", "word"),
    [
        (lambda: 6, TransportError, "failed on rank 1: "),
        (lambda: 1 // 0, TransportError, "failed on rank 1: "),
        (lambda: time.sleep(3), TransportTimeout, "for the GPU of rank 1"),
    ],
)
def test_a_start_that_fails_or_hangs_is_told_to_all(
    outcome: Callable[[], Any], error: type[TransportError], word: str
) -> None:
    def run(rank: int, control: Transport) -> TransportError:
        begin = time.monotonic()
        with pytest.raises(error, match=word) as caught:
            start_together(control, "start", outcome if rank == 1 else lambda: 0, timeout_s=1.0)
        assert time.monotonic() - begin < 2.5
        return caught.value

    first, second, third = run_ranks(3, run)
    assert (first.peers, second.peers, third.peers) == ((1,), (), (1,))
    if error is TransportError:
        assert "see its log" in str(first)
        assert "see its log" not in str(second)


def test_a_communicator_for_a_library() -> None:
    nccl = FakeNccl(blocking=True)

    def run(rank: int, control: Transport) -> None:
        comm = NcclCommunicator(control, HostGpu(nccl, rank), nccl.of(rank), timeout_s=TIMEOUT_S)
        assert comm.address == 1000 + rank
        comm.close()
        comm.close()

    run_ranks(3, run)
    assert nccl.aborted == {0, 1, 2}
    nccl.broken[1] = 6

    def fail(rank: int, control: Transport) -> None:
        with pytest.raises(TransportError, match="NCCL start: failed on rank 1"):
            NcclCommunicator(control, HostGpu(nccl, rank), nccl.of(rank), timeout_s=TIMEOUT_S)

    run_ranks(3, fail)


def test_libraries_that_are_too_old_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hub, nccl = install(monkeypatch, 1)
    for name, module in fake_nccl_ep.make_modules(hub, "0.1.0").items():
        monkeypatch.setitem(sys.modules, name, module)

    def run(rank: int, control: Transport) -> None:
        gpu = HostGpu(nccl, rank)
        with pytest.raises(ConfigError, match=r"NCCL EP 0\.2 or later, and libnccl_ep is 0\.1\.0"):
            NcclEp(control, gpu, max_pairs=8, hidden=512, timeout_s=1.0)
        with pytest.raises(ConfigError, match=r"needs NCCL 2\.30\.4 or later, and fake is 2\.29\.7"):
            DeepEp(control, gpu, nccl.of(rank), max_pairs=8, hidden=512, timeout_s=1.0)

    run_ranks(1, run)


def test_rows_that_a_library_cannot_take_are_refused(dispatch: str) -> None:
    multiple = {"deepep": 256, "nccl-ep": 512}[dispatch]
    check_rows(dispatch, 3 * multiple)
    check_rows("auto", 40)
    with pytest.raises(
        ConfigError, match=f"dispatch='{dispatch}' takes rows of multiples of {multiple} values, .* 128"
    ):
        check_rows(dispatch, 128)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_generation_gets_the_library_where_there_are_ranks(
    monkeypatch: pytest.MonkeyPatch, dispatch: str, num_ranks: int
) -> None:
    _, nccl = install(monkeypatch, num_ranks)
    here = threading.local()
    monkeypatch.setattr(group_choice, "Gpu", lambda _device: HostGpu(nccl, here.rank))
    monkeypatch.setattr(group_choice, "nccl", lambda: nccl.of(here.rank, NCCL_VERSION_MIN))

    def run(rank: int, control: Transport) -> tuple[type, bool]:
        here.rank = rank
        groups = GenerationGroups.of(
            kernels(),
            control,
            RowPayload(kernels(), "auto", 512),
            regions=PeerRegions(),
            descriptor=None,
            peer_faults_R1=torch.zeros(num_ranks + 1, dtype=torch.int32),
            max_tokens=8,
            top_k=2,
            hidden=512,
            dispatch=dispatch,
            max_batched_tokens=64,
            timeout_s=TIMEOUT_S,
        )
        return type(groups.large), groups.small is None

    expected = (LocalGroup, False) if num_ranks == 1 else (PairDispatch, True)
    assert run_ranks(num_ranks, run) == [expected] * num_ranks


def test_a_library_that_is_missing_is_named_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    assert preflight.missing_library("auto") == preflight.missing_library("flat") == []
    for name, fix in (("deepep", "build DeepEP"), ("nccl-ep", "nccl-extensions[cu13]")):
        (obstacle,) = preflight.missing_library(name)
        assert f"dispatch='{name}' needs the module" in obstacle.what
        assert fix in obstacle.fix
    monkeypatch.setattr(preflight, "_is_installed", lambda _module: True)
    assert preflight.missing_library("nccl-ep") == []


def test_what_is_left_to_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither library's end is called when a generation is over: it waits for all peers."""
    _, nccl = install(monkeypatch, 2)
    before = len(nccl_ep_dispatch._LEFT)

    def run(_rank: int, control: Transport) -> None:
        for dispatch in LIBRARY_DISPATCHES:
            open_group(dispatch, nccl, control).close()

    run_ranks(2, run)
    assert len(nccl_ep_dispatch._LEFT) == before + 2
