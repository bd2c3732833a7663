"""One question: how near does each kernel come to the machine's bound, and how does it compare with torch in the same run?

Ours, torch and a read of memory take turns, repetition by repetition, so that what the machine does meanwhile meets all
three. A kernel is checked against its reference before and after. Ours is called by a native loop, torch from Python, as
its users do: below some ten microseconds that alone is most of torch's time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from switchgear_bench import kernel_attention, kernel_experts, kernel_linear, kernel_rows, kernel_sampler, probes
from switchgear_bench.kernel_subject import ARENA_BYTES, Subject
from switchgear_bench.quiet import OthersUse

_OTHERS_CORES_MAX = 0.1  # that other processes may use meanwhile, or the subject is measured again
_NUM_TRIES = 3
_REPEAT_S = 0.02  # of one contender
_SETTLE_S = 0.01  # until the other one's threads sleep: OpenMP's spin for some milliseconds


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bytes and FLOPs per second of this many threads; memory and arithmetic are measured again beside each subject."""

    num_threads: int
    cache_bytes_per_s: float
    peak_flops_per_s: dict[str, float]

    @classmethod
    def of(cls, num_threads: int) -> Bounds:
        peaks = {dtype: probes.peak_flops_per_s(dtype, num_threads) for dtype in ("float32", "bfloat16")}
        return cls(num_threads, probes.cache_bytes_per_s(num_threads), peaks)


def subjects(kernels: Sequence[str], arena_bytes: int = ARENA_BYTES) -> Iterator[Subject]:
    """Of the kernels named; all if none is."""
    groups: dict[tuple[str, ...], Callable[[], Iterator[Subject]]] = {
        ("linear",): lambda: kernel_linear.subjects(arena_bytes),
        ("experts",): lambda: kernel_experts.subjects(arena_bytes),
        ("attention",): lambda: kernel_attention.subjects(arena_bytes),
        ("rms_norm", "rope", "router", "dispatch_pack", "combine"): kernel_rows.subjects,
        ("sampler",): lambda: kernel_sampler.subjects(arena_bytes),
    }
    for names, make in groups.items():
        if not kernels or set(names) & set(kernels):
            yield from (one for one in make() if not kernels or one.kernel in kernels)


KERNELS = ("linear", "experts", "attention", "rms_norm", "rope", "router", "dispatch_pack", "combine", "sampler")


@dataclass(slots=True)
class _Samples:
    """Seconds a call of each repetition, and what memory and arithmetic gave in it."""

    ours_s: list[float]
    baseline_s: list[float]
    memory_bytes_per_s: list[float]
    peak_flops_per_s: list[float]
    num_calls: int = 0


def _num_calls(call_s: float) -> int:
    return max(1, math.ceil(_REPEAT_S / max(call_s, 1e-7)))


def _machine_now(subject: Subject, num_threads: int) -> tuple[float, float]:
    """Bytes per second of memory, FLOPs per second."""
    memory = probes.memory_bytes_per_s_now(num_threads)
    return memory, probes.peak_flops_per_s_now(subject.arithmetic, num_threads)


def _measure(subject: Subject, num_threads: int, num_repeats: int) -> _Samples:
    samples = _Samples([], [], [], [])
    subject.check_once()
    at, baseline_at = 1, 0
    samples.num_calls = _num_calls(min(subject.repeat(i, 1) for i in range(3)))
    baseline_calls = 0
    for repeat in range(num_repeats + 1):
        time.sleep(_SETTLE_S)
        before = _machine_now(subject, num_threads)
        subject.repeat(at, 1)  # wakes the pool
        ours_s = subject.repeat(at + 1, samples.num_calls) / samples.num_calls
        after = _machine_now(subject, num_threads)
        at += samples.num_calls + 1
        baseline_s = None
        if subject.baseline is not None:
            start_s = time.perf_counter()
            subject.baseline.run(baseline_at)
            baseline_calls = baseline_calls or _num_calls(time.perf_counter() - start_s)
            start_s = time.perf_counter()
            for i in range(baseline_calls):
                subject.baseline.run(baseline_at + 1 + i)
            baseline_s = (time.perf_counter() - start_s) / baseline_calls
            baseline_at += baseline_calls + 1
        if repeat:  # the first one warms up
            samples.ours_s.append(ours_s)
            samples.memory_bytes_per_s.append((before[0] + after[0]) / 2)
            samples.peak_flops_per_s.append((before[1] + after[1]) / 2)
            if baseline_s is not None:
                samples.baseline_s.append(baseline_s)
    subject.check_once()
    return samples


def row(subject: Subject, samples: _Samples, bounds: Bounds) -> dict[str, Any]:
    """Medians; the bound is what memory (or the cache) and arithmetic allow, by what both gave in the same repetition."""
    bandwidths = samples.memory_bytes_per_s
    if subject.source == "cache":
        bandwidths = [bounds.cache_bytes_per_s] * len(samples.ours_s)
    machine = list(zip(bandwidths, samples.peak_flops_per_s, strict=True))
    bounds_s = [max(subject.num_bytes / bandwidth, subject.flops / peak) for bandwidth, peak in machine]
    is_by_bytes = subject.num_bytes / median(bandwidths) >= subject.flops / median(samples.peak_flops_per_s)
    ours_s = median(samples.ours_s)
    ratios = [theirs / ours for theirs, ours in zip(samples.baseline_s, samples.ours_s, strict=False)]
    return {
        "kernel": subject.kernel,
        "format": subject.format,
        "shape": subject.shape,
        "num_tokens": subject.num_tokens,
        "num_threads": bounds.num_threads,
        "operands_from": subject.source,
        "time_us": ours_s * 1e6,
        "time_us_min": min(samples.ours_s) * 1e6,
        "time_us_max": max(samples.ours_s) * 1e6,
        "num_bytes": subject.num_bytes,
        "flops": subject.flops,
        "gigabytes_per_s": subject.num_bytes / ours_s / 1e9,
        "gigaflops_per_s": subject.flops / ours_s / 1e9,
        "bandwidth_gb_per_s": median(bandwidths) / 1e9,
        "peak_gflops_per_s": median(samples.peak_flops_per_s) / 1e9,
        "bound_us": median(bounds_s) * 1e6,
        "bound_by": "bytes" if is_by_bytes else "flops",
        "fraction_of_bound": median(bound / ours for bound, ours in zip(bounds_s, samples.ours_s, strict=True)),
        "baseline": subject.baseline.name if subject.baseline else None,
        "baseline_us": median(samples.baseline_s) * 1e6 if ratios else None,
        "ratio_to_baseline": median(ratios) if ratios else None,
        "num_calls": samples.num_calls,
        "num_repeats": len(samples.ours_s),
    }


def measure(subject: Subject, bounds: Bounds, num_repeats: int) -> dict[str, Any]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(bounds.num_threads)
    try:
        with probes.threads(bounds.num_threads), torch.inference_mode():
            for _ in range(_NUM_TRIES):
                others = OthersUse()
                samples = _measure(subject, bounds.num_threads, num_repeats)
                cores = others.cores()
                if cores < _OTHERS_CORES_MAX:
                    break
            return row(subject, samples, bounds) | {"others_used_cores": cores}
    finally:
        torch.set_num_threads(before)
