"""What `switchgear bench transport` compares, as one rank's end of each: memcpy, shm, MPI and gloo.

A contender's calls map a call's name to a function that runs a job's iterations and returns their timing. Where a
library has a C entry, the C loop measures it; the `python` rows measure what a Python caller sees.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from switchgear_bench.transport_native import Buffer, Exchanger, Job, Timing, library
from switchgear_runtime.comm.network import Network
from switchgear_runtime.comm.shm import ShmTransport
from switchgear_runtime.comm.shm_native import NativeExchanger
from switchgear_runtime.comm.shm_native import library as shm_library
from switchgear_runtime.comm.transport import Transport

NUM_RANKS = 2
TIMEOUT_S = 60.0
NUM_UNTIMED = 2  # as in the C loops, like MEET_BYTES
MEET_BYTES = 64 << 10
GLOO_FIRST_BYTES = 1 << 20  # what travels with the header
Call = Callable[[Job], Timing]


class Contender:
    """Buffers, and the loops over them. `calls`: what can be measured here, by row name."""

    def __init__(self, rank: int, num_bytes_max: int) -> None:
        self.rank = rank
        self.send, self.receive = Buffer(num_bytes_max), Buffer(2 * num_bytes_max)
        self.calls: dict[str, Call] = {}
        self.version = ""

    def run(self, call: str, *, num_bytes: int, num_iterations: int, seed: int) -> Timing:
        job = Job(num_bytes, num_iterations, seed, self.rank, self.send.address, self.receive.address)
        return self.calls[call](job)

    def close(self) -> None:
        self.calls.clear()


def _native(name: str, *arguments: Any) -> Call:
    """A loop of the library with these arguments between job and timing; a function of another library is a pointer."""
    arguments = tuple(
        ctypes.cast(argument, ctypes.c_void_p) if callable(argument) else argument for argument in arguments
    )

    def run(job: Job) -> Timing:
        timing = Timing()
        if getattr(library(), f"sg_bench_{name}")(ctypes.byref(job), *arguments, ctypes.byref(timing)):
            raise RuntimeError(f"sg_bench_{name} failed at {job.num_bytes} bytes")
        return timing

    return run


def _python(send: Buffer, exchange: Callable[[memoryview], memoryview], meet: Callable[[], object]) -> Call:
    """The same loop in Python."""

    def run(job: Job) -> Timing:
        loops, peer, timing = library(), 1 - job.rank, Timing()
        message = send.view[: job.num_bytes]
        for iteration in range(job.num_iterations + NUM_UNTIMED):
            if iteration == NUM_UNTIMED:
                timing.write_ns = timing.exchange_ns = 0
            begin_ns = time.perf_counter_ns()
            loops.sg_bench_write(send.address, job.num_bytes, job.seed, iteration, job.rank)
            timing.write_ns += time.perf_counter_ns() - begin_ns
            if job.num_bytes >= MEET_BYTES:
                meet()
            written_ns = time.perf_counter_ns()
            received = np.frombuffer(exchange(message), np.uint64)
            checksum = int(received.sum())
            end_ns = time.perf_counter_ns()
            timing.exchange_ns += end_ns - written_ns
            expected = loops.sg_bench_expected(job.num_bytes, job.seed, iteration, peer)
            timing.mismatches += checksum != expected or received.nbytes != job.num_bytes
        return timing

    return run


def _through(transport: Transport) -> tuple[Callable[[memoryview], memoryview], Callable[[], object]]:
    rank = transport.rank

    def exchange(message: memoryview) -> memoryview:
        send: list[memoryview | bytes] = [b"", b""]
        send[1 - rank] = message
        return transport.all_to_all_v(send, timeout_s=TIMEOUT_S)[1 - rank]

    return exchange, lambda: transport.barrier(timeout_s=TIMEOUT_S)


class ShmContender(Contender):
    """Our channel, and the copy within one process that bounds it."""

    def __init__(self, rank: int, num_bytes_max: int, channel: str, mailbox_bytes: int) -> None:
        super().__init__(rank, num_bytes_max)
        self._transport = ShmTransport(channel, rank, NUM_RANKS, mailbox_bytes, TIMEOUT_S)
        shm, handle = shm_library(), self._transport.channel.handle
        segment = shm.sg_shm_base(handle)
        self._exchanger: NativeExchanger | None = NativeExchanger(self._transport.channel)
        self.calls = {
            "memcpy": _native("memcpy", shm.sg_shm_barrier, handle),
            "shm": _native("shm", shm.sg_shm_all_to_all_v, shm.sg_shm_barrier, shm.sg_shm_release, handle, segment),
            "shm held": _native("shm", shm.sg_shm_all_to_all_v, shm.sg_shm_barrier, None, handle, segment),
            "shm in place": _native("shm_in_place", ctypes.byref(self._in_place(shm, self._exchanger.handle, handle))),
            "shm python": _python(self.send, *_through(self._transport)),
            "shm all_gather": _native("shm_all_gather", shm.sg_shm_all_gather, handle),
        }
        self.version = f"mailbox {mailbox_bytes} bytes"

    def _in_place(self, shm: ctypes.CDLL, exchanger: int, channel: int) -> Exchanger:
        names = ("reserve", "exchange", "received", "release")
        functions = [*(getattr(shm, f"sg_shm_exchanger_{name}") for name in names), shm.sg_shm_barrier]
        addresses = (ctypes.cast(function, ctypes.c_void_p).value for function in functions)
        return Exchanger(exchanger, *addresses, channel)

    def close(self) -> None:
        super().close()
        self._exchanger = None
        self._transport.close()


class MpiContender(Contender):
    """MPI_Alltoallv with counts known beforehand, on COMM_WORLD of two ranks."""

    def __init__(self, num_bytes_max: int, packages: str, libmpi: str) -> None:
        sys.path.insert(0, packages)
        from mpi4py import MPI

        world, byte = MPI.COMM_WORLD, MPI.BYTE
        super().__init__(world.rank, num_bytes_max)
        functions = ctypes.CDLL(libmpi)
        handles = MPI._handleof(byte), MPI._handleof(world)
        receive = self.receive.view
        counts = [[0, 0]]

        def exchange(message: memoryview) -> memoryview:
            counts[0] = [len(message) if rank != world.rank else 0 for rank in range(NUM_RANKS)]
            world.Alltoallv([message, counts[0], [0, 0], byte], [receive, counts[0], [0, 0], byte])
            return receive[: len(message)]

        self.calls = {
            "native": _native("mpi", functions.MPI_Alltoallv, functions.MPI_Barrier, *handles),
            "python": _python(self.send, exchange, world.Barrier),
            "all_gather": _native("mpi_all_gather", functions.MPI_Allgather, *handles),
        }
        self.version = MPI.Get_library_version().splitlines()[0].strip("\0 ")


class FolderStore:
    """A `KeyValueStore` of files: how the gloo ranks find each other."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._rank = rank
        self._num_puts = 0

    def put(self, key: str, value: bytes) -> None:
        self._num_puts += 1
        draft = self._folder / f"draft-{self._rank}-{self._num_puts}"
        draft.write_bytes(value)
        draft.rename(self._path(key))  # whole, or not there

    def get(self, keys: Any, *, timeout_s: float) -> dict[str, bytes]:
        deadline_s = time.monotonic() + timeout_s
        while True:
            found = {key: self._path(key).read_bytes() for key in keys if self._path(key).exists()}
            if len(found) == len(keys) or time.monotonic() >= deadline_s:
                return found
            time.sleep(0.001)

    def _path(self, key: str) -> Path:
        return self._folder / key.replace("/", "-")


class GlooContender(Contender):
    """Our GlooTransport over loopback TCP; it has no C entry."""

    def __init__(self, rank: int, num_bytes_max: int, folder: Path) -> None:
        super().__init__(rank, num_bytes_max)
        import torch

        from switchgear_runtime.comm.gloo import GlooTransport

        network = Network(store=FolderStore(folder, rank), address="127.0.0.1", trusted=False)
        self._transport = GlooTransport(network, rank, NUM_RANKS, mailbox_bytes=GLOO_FIRST_BYTES, timeout_s=TIMEOUT_S)
        self.calls = {"gloo python": _python(self.send, *_through(self._transport))}
        self.version = f"torch {torch.__version__}"

    def close(self) -> None:
        super().close()
        self._transport.close()
