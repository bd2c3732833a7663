"""Seconds on a device: `Clock`, and what torch reaches there: `Bounds`.

Calls are timed as a graph where they can be captured, so that what a launch costs the host is in no number; what cannot
be captured runs as it is, and its row says so. With the twin library calls run on the host, to test a benchmark.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Run = Callable[[], object]
NUM_REPEATS = 7
_REPEAT_S = 0.02
_CALLS_MAX = 200


@dataclass(frozen=True, slots=True)
class Series:
    """Some calls, one after the other, that are timed as one."""

    run: Run
    num_calls: int
    is_graph: bool


class Clock:
    """Of one device. All that is timed is enqueued on the stream that is current, which must be the kernels' own
    (DenseKernels.on_stream): there it is captured, too."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def series(self, runs: Sequence[Run]) -> Series:
        """Each run twice before it is captured: what it compiles or allocates once lies in no number."""
        eager = Series(lambda: [run() for run in runs], len(runs), is_graph=False)
        if self._device.type != "cuda":
            return eager
        for _ in range(2):
            eager.run()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(self._device)):
                eager.run()
        except RuntimeError:  # something in it waits for the device
            torch.cuda.synchronize(self._device)
            return eager
        return Series(graph.replay, len(runs), is_graph=True)

    def seconds(self, series: Series, num_times: int) -> float:
        """Of one call."""
        if self._device.type != "cuda":
            start_s = time.perf_counter()
            for _ in range(num_times):
                series.run()
            return (time.perf_counter() - start_s) / num_times / series.num_calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(num_times):
            series.run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / num_times / series.num_calls

    def in_turns(self, contenders: Sequence[Series], num_repeats: int = NUM_REPEATS) -> list[list[float]]:
        """Seconds of each, repetition by repetition: all take turns."""
        times = [self._times(series) for series in contenders]
        seconds: list[list[float]] = [[] for _ in contenders]
        for _ in range(num_repeats):
            for series, num_times, found in zip(contenders, times, seconds, strict=True):
                found.append(self.seconds(series, num_times))
        return seconds

    def _times(self, series: Series) -> int:
        self.seconds(series, 2)
        return max(1, min(_CALLS_MAX, int(_REPEAT_S / max(self.seconds(series, 2) * series.num_calls, 1e-7))))


@dataclass(frozen=True, slots=True)
class Bounds:
    """What torch reaches: bytes per second of a copy (read and written), FLOPs per second of a bf16 product."""

    copy_bytes_per_s: float
    product_flops_per_s: float

    @classmethod
    def of(cls, device: torch.device) -> Bounds:
        is_gpu = device.type == "cuda"
        clock = Clock(device)
        source = torch.empty(1 << (30 if is_gpu else 20), dtype=torch.uint8, device=device)
        to = torch.empty_like(source)
        size = 8192 if is_gpu else 128
        a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))

        def best(run: Run) -> float:
            run()
            series = Series(run, 1, is_graph=False)
            return min(clock.seconds(series, 5 if is_gpu else 2) for _ in range(5))

        return cls(2 * source.numel() / best(lambda: to.copy_(source)), 2 * size**3 / best(lambda: a @ b))

    def row(self, num_bytes: float, flops: float, seconds: float) -> dict[str, float | str]:
        """How near: the bound, by what, and the fraction of it that was reached."""
        bytes_s, flops_s = num_bytes / self.copy_bytes_per_s, flops / self.product_flops_per_s
        return {
            "time_us": seconds * 1e6,
            "bound_us": max(bytes_s, flops_s) * 1e6,
            "bound_by": "bytes" if bytes_s >= flops_s else "flops",
            "fraction_of_bound": max(bytes_s, flops_s) / seconds,
        }
