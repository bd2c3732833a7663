"""The C ABI of libswitchgear_bench.so (csrc/bench/transport_loop.h), and the buffers that its loops read and write."""

from __future__ import annotations

import ctypes
import functools
import mmap
from pathlib import Path

import switchgear_runtime.comm.shm_native
from switchgear_runtime.comm.shm_native import address_of


class Timing(ctypes.Structure):
    """Mirror of sg_bench_timing: sums over the iterations."""

    _fields_ = [("write_ns", ctypes.c_uint64), ("exchange_ns", ctypes.c_uint64), ("mismatches", ctypes.c_uint64)]
    write_ns: int
    exchange_ns: int
    mismatches: int


class Job(ctypes.Structure):
    """Mirror of sg_bench_job."""

    _fields_ = [
        ("num_bytes", ctypes.c_uint64),
        ("num_iterations", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("rank", ctypes.c_uint32),
        ("send", ctypes.c_void_p),
        ("receive", ctypes.c_void_p),
    ]
    num_bytes: int
    num_iterations: int
    seed: int
    rank: int
    send: int
    receive: int


class Exchanger(ctypes.Structure):
    """Mirror of sg_bench_exchanger."""

    _fields_ = [
        ("self", ctypes.c_void_p),
        ("reserve", ctypes.c_void_p),
        ("exchange", ctypes.c_void_p),
        ("received", ctypes.c_void_p),
        ("release", ctypes.c_void_p),
        ("barrier", ctypes.c_void_p),
        ("channel", ctypes.c_void_p),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The loops, with their signatures declared. They let go of the interpreter lock."""
    folder = Path(switchgear_runtime.comm.shm_native.library()._name).parent
    loops = ctypes.CDLL(str(folder / "libswitchgear_bench.so"))
    pointer, u64, i64, u32 = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int64, ctypes.c_uint32
    job, timing = ctypes.POINTER(Job), ctypes.POINTER(Timing)
    for name, result, arguments in (
        ("write", None, (pointer, u64, u64, u64, u32)),
        ("checksum", u64, (pointer, u64)),
        ("expected", u64, (u64, u64, u64, u32)),
        ("memcpy", ctypes.c_int32, (job, pointer, pointer, timing)),
        ("shm", ctypes.c_int32, (job, pointer, pointer, pointer, pointer, pointer, timing)),
        ("shm_in_place", ctypes.c_int32, (job, ctypes.POINTER(Exchanger), timing)),
        ("shm_all_gather", ctypes.c_int32, (job, pointer, pointer, timing)),
        ("mpi", ctypes.c_int32, (job, pointer, pointer, pointer, pointer, timing)),
        ("mpi_all_gather", ctypes.c_int32, (job, pointer, pointer, pointer, timing)),
    ):
        function = getattr(loops, f"sg_bench_{name}")
        function.restype = result
        function.argtypes = arguments
    loops.sg_bench_repeat.restype = ctypes.c_int32
    loops.sg_bench_repeat.argtypes = [ctypes.c_char_p, pointer, pointer, i64, i64, i64, i64, ctypes.POINTER(u64)]
    return loops


class Buffer:
    """Page-aligned private memory; the same kind for every contender."""

    def __init__(self, num_bytes: int) -> None:
        self.mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = address_of(self.mapping)
        ctypes.memset(self.address, 1, num_bytes)  # no page fault is left for the measurement
        self.view = memoryview(self.mapping)
