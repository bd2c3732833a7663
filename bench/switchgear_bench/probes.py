"""Bounds of the machine by the instructions our kernels use: arithmetic of fma and of bf16 products, bytes read (csrc/kernels/probe.h)."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from switchgear_runtime import native, ops

_PEAK_STEPS = 1 << 21  # some milliseconds
_NUM_RUNS = 5
_MEMORY_BYTES = 512 << 20  # well past any cache
_CACHE_BYTES = 128 << 10  # of each thread; fits an L2 cache beside what else is there
_CACHE_REPEATS = 400
_HUGE_PAGE = 2 << 20


@contextlib.contextmanager
def threads(num_threads: int) -> Iterator[None]:
    """The kernels' pool has so many threads meanwhile."""
    before = ops.num_threads()
    ops.set_num_threads(num_threads)
    try:
        yield
    finally:
        ops.set_num_threads(before)


def _best_s(call: Callable[[], int], num_runs: int = _NUM_RUNS) -> float:
    best_s = float("inf")
    for _ in range(num_runs + 1):  # the first one warms up; being slower, it does not count
        start_s = time.perf_counter()
        if call():
            raise RuntimeError(f"the probe failed: {native.last_error()}")
        best_s = min(best_s, time.perf_counter() - start_s)
    return best_s


@functools.cache
def peak_flops_per_s(dtype: str, num_threads: int) -> float:
    """Of fma in fp32 (`float32`) or of dot products of bf16 pairs (`bfloat16`), operands in registers; the best of five.

    In the instruction set that the kernels run in: where it has no bf16 products, two fmas stand for one.
    """
    return peak_flops_per_s_now(dtype, num_threads, num_runs=_NUM_RUNS)


def peak_flops_per_s_now(dtype: str, num_threads: int, *, num_runs: int = 0) -> float:
    """The same, measured once: other guests of a host take their share, which changes from second to second."""
    flops, error = ctypes.c_double(), ctypes.c_double()
    code = ("float32", "bfloat16").index(dtype)
    with threads(num_threads):
        best_s = _best_s(
            lambda: native.core().sg_probe_peak(
                code, ctypes.c_int64(_PEAK_STEPS), ctypes.byref(flops), ctypes.byref(error)
            ),
            num_runs,
        )
    if error.value != 0.0:
        raise RuntimeError(f"the {dtype} probe's sums are off by {error.value}: it computed something else")
    return flops.value / best_s


@functools.cache
def memory_bytes_per_s(num_threads: int) -> float:
    """Reading 512 MiB once, each thread its part; the best of five."""
    return _read_bytes_per_s(_memory(), num_threads, 1)


@functools.cache
def cache_bytes_per_s(num_threads: int) -> float:
    """The same from 128 KiB a thread, again and again: what bounds a kernel whose operands the previous one just wrote."""
    return _read_bytes_per_s(_ones(_CACHE_BYTES * num_threads), num_threads, _CACHE_REPEATS)


def _ones(num_bytes: int) -> NDArray[np.float32]:
    """Page-aligned, and on huge pages where the system gives them: small ones cost a tenth of the bandwidth."""
    mapping = mmap.mmap(-1, -(-num_bytes // _HUGE_PAGE) * _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
    values = np.frombuffer(mapping, dtype=np.float32)[: num_bytes // 4]
    values[:] = 1.0
    return values


def memory_bytes_per_s_now(num_threads: int) -> float:
    """One such read, for the same reason."""
    return _read_bytes_per_s(_memory(), num_threads, 1, num_runs=0)


@functools.cache
def _memory() -> NDArray[np.float32]:
    return _ones(_MEMORY_BYTES)


def _read_bytes_per_s(values: NDArray[np.float32], num_threads: int, repeats: int, num_runs: int = _NUM_RUNS) -> float:
    total = ctypes.c_double()
    address, count = ctypes.c_void_p(values.ctypes.data), ctypes.c_int64(values.size)
    with threads(num_threads):
        best_s = _best_s(
            lambda: native.core().sg_probe_read(address, count, ctypes.c_int64(repeats), ctypes.byref(total)),
            num_runs,
        )
    if total.value != values.size * repeats:
        raise RuntimeError(f"the bandwidth probe read {total.value} ones of {values.size * repeats}")
    return values.nbytes * repeats / best_s
