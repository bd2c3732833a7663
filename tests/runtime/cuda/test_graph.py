"""Graphs: what is captured does not run, and runs as often as it is launched, on what memory then holds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from usable_gpu import skip_without_gpu

from switchgear_runtime.cuda.backend import kernels_of
from switchgear_runtime.cuda.graph import Graph
from switchgear_runtime.cuda.kernels import Kernels
from switchgear_runtime.cuda.library import DeviceError
from switchgear_runtime.cuda.step_memory import CHUNK_BYTES_MIN, StepMemory


@pytest.fixture(params=["twin", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    if request.param == "twin":
        yield kernels_of("twin", 0)
        return
    skip_without_gpu()
    made = kernels_of("cuda", 0)
    with made.on_stream():
        yield made


def test_a_graph_runs_when_it_is_launched(kernels: Kernels) -> None:
    device = kernels.device
    x_TD, w_D = torch.randn(5, 32, device=device), torch.randn(32, device=device)
    source, copied, zeroed = (torch.ones(7, device=device) for _ in range(3))
    memory = StepMemory(device)
    outs: list[torch.Tensor] = []

    def enqueue() -> None:
        with kernels.in_memory(memory), memory.scope():
            outs[:] = [kernels.rms_norm(kernels.rms_norm(x_TD, w_D, 1e-6), w_D, 1e-6)]
            kernels.copy_(copied, source)
            kernels.zero_(zeroed)

    def expected() -> torch.Tensor:
        return kernels.rms_norm(kernels.rms_norm(x_TD, w_D, 1e-6), w_D, 1e-6)

    enqueue()  # which makes the memory
    outs[0].zero_()
    copied.zero_()
    zeroed.fill_(3)
    with Graph.capture(kernels, enqueue) as graph:
        assert not outs[0].any()
        assert not copied.any()
        assert zeroed.all()
        for value in (2.0, 5.0):
            x_TD.copy_(torch.randn(5, 32))
            source.fill_(value)
            graph.launch()
            assert torch.equal(outs[0], expected())
            assert torch.equal(copied, source)
            assert not zeroed.any()


def test_what_fails_while_it_is_captured_leaves_a_usable_stream(kernels: Kernels) -> None:
    def fail() -> None:
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        Graph.capture(kernels, fail)
    x_TD = torch.randn(2, 8, device=kernels.device)
    with Graph.capture(kernels, lambda: kernels.zero_(x_TD)) as graph:
        graph.launch()
    assert not x_TD.any()


def test_a_graph_within_a_graph_is_refused(kernels: Kernels) -> None:
    with pytest.raises(DeviceError):
        Graph.capture(kernels, lambda: Graph.capture(kernels, lambda: None))


def test_step_memory_gives_the_same_places_again() -> None:
    memory = StepMemory(torch.device("cpu"))
    first = memory.empty(3, dtype=torch.float32)
    with memory.scope():
        one, other = (memory.empty(4, 5, dtype=torch.bfloat16) for _ in range(2))
        huge = memory.empty(CHUNK_BYTES_MIN + 1, dtype=torch.uint8)
        places = [tensor.data_ptr() for tensor in (one, other, huge)]
        assert one.shape == (4, 5)
        assert len({first.data_ptr(), *places}) == 4
        assert all(place % 64 == 0 for place in places)
        one.fill_(1)
        other.fill_(2)
        assert bool((one == 1).all())
    held = memory.num_bytes
    with memory.scope():
        again = [memory.empty(4, 5, dtype=torch.bfloat16) for _ in range(2)]
        again.append(memory.empty(CHUNK_BYTES_MIN + 1, dtype=torch.uint8))
        assert [tensor.data_ptr() for tensor in again] == places
    assert memory.num_bytes == held
