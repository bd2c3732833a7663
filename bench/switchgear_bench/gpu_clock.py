"""Seconds on a device: `Clock`, and what torch reaches there: `Bounds`.

Calls are timed as a graph where they can be captured, so that what a launch costs the host is in no number; what cannot
be captured runs as it is, and its row says so. With the twin library calls run on the host, to test a benchmark.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from switchgear_runtime.cuda.uncollected import uncollected

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

    def series(self, runs: Sequence[Run], *, captures: bool = True) -> Series:
        """Each run twice before it is captured: what it compiles or allocates once lies in no number. `captures`: False
        where it is known to wait for the device; what is found to do so is not captured either."""
        eager = Series(lambda: [run() for run in runs], len(runs), is_graph=False)
        if self._device.type != "cuda":
            return eager
        eager.run()
        if not captures or self._waits(eager):
            eager.run()
            return eager
        torch.cuda.synchronize(self._device)
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            self._capture(graph, eager.run, pool)
        except RuntimeError:  # of what torch does not see to wait, as a library's own call
            self._after_failed_capture(pool)
            return eager
        return Series(graph.replay, len(runs), is_graph=True)

    def _waits(self, series: Series) -> bool:
        """By torch's own word. A capture that fails leaves torch's generators and allocator as if it still ran: none that
        will fail may begin."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            series.run()
        except RuntimeError:
            is_waiting = True
        else:
            is_waiting = False
        finally:
            torch.cuda.set_sync_debug_mode(before)
        torch.cuda.synchronize(self._device)  # raises what was an error of another kind
        return is_waiting

    def _capture(self, graph: torch.cuda.CUDAGraph, run: Run, pool: Any) -> None:
        with uncollected(), torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream(self._device)):
            run()

    def _after_failed_capture(self, pool: Any) -> None:
        """A capture that succeeds ends what a failed one left begun, but for the allocator, which goes by pools."""
        torch.cuda.synchronize(self._device)
        end: Any = getattr(torch._C, "_cuda_endAllocateToPool", None)
        if end is not None:
            with suppress(RuntimeError):  # it has been ended
                end(torch.cuda.current_device(), pool)
        zeros = torch.zeros(1, device=self._device)
        self._capture(torch.cuda.CUDAGraph(), zeros.zero_, torch.cuda.graph_pool_handle())

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
