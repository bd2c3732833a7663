"""`Clock` over a made-up torch.cuda: what waits for the device is never captured, and a capture that fails leaves nothing begun."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from switchgear_bench.gpu_clock import Clock
from switchgear_bench.gpu_layer import TINY, UNIFORM, Routing
from switchgear_bench.gpu_moving import combine, dispatch
from switchgear_runtime.cuda.backend import kernels_of
from switchgear_runtime.cuda.uncollected import uncollected


class FakeCuda:
    """Notes captures; a call that waits raises as torch's does in debug mode, or inside a capture."""

    def __init__(self) -> None:
        self.mode: Any = 0
        self.is_capturing = False
        self.captures: list[str] = []
        self.ended: list[Any] = []

    def set_mode(self, mode: Any) -> None:
        self.mode = mode

    @contextmanager
    def graph(self, graph: Any, *, pool: Any, stream: Any) -> Iterator[None]:  # noqa: ARG002
        assert not gc.isenabled()
        self.is_capturing = True
        try:
            yield
        except RuntimeError:
            self.captures.append("failed")
            raise
        finally:
            self.is_capturing = False
        self.captures.append("made")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    pools = iter(range(100))
    changes: dict[str, Callable[..., Any]] = {
        "synchronize": lambda _=None: None,
        "get_sync_debug_mode": lambda: fake.mode,
        "set_sync_debug_mode": fake.set_mode,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph_pool_handle": lambda: next(pools),
        "graph": fake.graph,
        "current_stream": lambda _: None,
        "current_device": lambda: 0,
    }
    for name, change in changes.items():
        monkeypatch.setattr(torch.cuda, name, change)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *given: fake.ended.append(given), raising=False)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: SimpleNamespace(zero_=lambda: None))
    return fake


def test_what_does_not_wait_is_a_graph(cuda: FakeCuda) -> None:
    assert Clock(torch.device("cuda")).series([lambda: None]).is_graph
    assert cuda.captures == ["made"]
    assert cuda.mode == 0
    assert gc.isenabled()


def test_what_waits_is_never_captured(cuda: FakeCuda) -> None:
    calls = []

    def waits() -> None:
        calls.append(cuda.mode)
        if cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    for captures in (True, False):
        assert not Clock(torch.device("cuda")).series([waits], captures=captures).is_graph
    assert cuda.captures == []
    assert cuda.mode == 0
    assert calls == [0, "error", 0, 0, 0]  # twice at least as it is


def test_a_capture_that_fails_is_ended(cuda: FakeCuda) -> None:
    def waits_unseen() -> None:
        if cuda.is_capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    assert not Clock(torch.device("cuda")).series([waits_unseen]).is_graph
    assert cuda.captures == ["failed", "made"]
    assert cuda.ended == [(0, 0)]
    assert gc.isenabled()


def test_of_the_baselines_dispatch_alone_is_said_to_wait() -> None:
    kernels = kernels_of("twin", 0)
    routing = Routing.draw(TINY, 8, UNIFORM, 1, kernels.device)
    assert not dispatch(kernels, TINY, routing).baseline_captures
    assert combine(kernels, TINY, routing).baseline_captures


def test_collections_pause_until_the_last_capture_ends() -> None:
    with uncollected():
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
