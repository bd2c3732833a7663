"""An NCCL of one process: the calls that NcclTransport makes, over host memory, for ranks that are threads.

It keeps what the real one demands: sends and receives of a group are matched by (source, destination) in order, lengths
must agree, nothing moves before the group ends, and a communicator that was aborted takes no more calls.
"""

from __future__ import annotations

import ctypes
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from switchgear_runtime.comm.nccl import Gpu
from switchgear_runtime.comm.nccl_library import IN_PROGRESS, SUCCESS, Nccl, UniqueId

INVALID_USAGE = 5


class HostGpu(Gpu):
    """Host memory that passes for a device's."""

    def __init__(self, nccl: FakeNccl, rank: int, name: str | None = None) -> None:
        super().__init__(torch.device("cpu"))
        self._nccl = nccl
        self._rank = rank
        self._name = name or f"GPU-{rank}"

    def identity(self) -> str:
        return self._name

    def current(self) -> AbstractContextManager[object]:
        return nullcontext()

    def stream(self) -> int:
        return 7

    def mark(self) -> Callable[[], bool]:
        nccl, rank = self._nccl, self._rank
        posted = nccl.num_posted[rank]
        return lambda: nccl.num_done[rank] >= posted and rank not in nccl.stuck


class FakeNccl:
    """Shared by all ranks. `stuck`: ranks whose device never finishes; `broken`: whose communicator reports an error."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.num_posted: dict[int, int] = defaultdict(int)
        self.num_done: dict[int, int] = defaultdict(int)
        self.stuck: set[int] = set()
        self.broken: dict[int, int] = {}
        self.aborted: set[int] = set()
        self._sends: dict[tuple[int, int], deque[tuple[int, int, int]]] = defaultdict(deque)
        self._receives: dict[tuple[int, int], deque[tuple[int, int, int]]] = defaultdict(deque)

    def of(self, rank: int, version: int = 22907) -> Nccl:
        return Nccl(library=FakeLibrary(self, rank), path="fake", version=version, cuda_major=13)  # type: ignore[arg-type]

    def end_group(self, rank: int, calls: list[tuple[str, int, int, int]]) -> int:
        with self.lock:
            self.num_posted[rank] += len(calls)
            for kind, address, length, peer in calls:
                mine, theirs = self._sends, self._receives
                key = (rank, peer)
                if kind == "recv":
                    mine, theirs, key = self._receives, self._sends, (peer, rank)
                if not theirs[key]:
                    mine[key].append((address, length, rank))
                    continue
                other_address, other_length, other = theirs[key].popleft()
                if other_length != length:
                    return INVALID_USAGE
                source, to = (address, other_address) if kind == "send" else (other_address, address)
                ctypes.memmove(to, source, length)
                self.num_done[rank] += 1
                self.num_done[other] += 1
        return SUCCESS


class FakeLibrary:
    """The functions, for one rank."""

    def __init__(self, nccl: FakeNccl, rank: int) -> None:
        self._nccl = nccl
        self._rank = rank
        self._group: list[tuple[str, int, int, int]] | None = None

    def ncclGetLastError(self, _comm: Any) -> bytes:
        return b"made up"

    def ncclGetUniqueId(self, to: Any) -> int:
        ctypes.memmove(to, b"unique\0id" + bytes(119), ctypes.sizeof(UniqueId))
        return SUCCESS

    def ncclCommInitRankConfig(self, comm: Any, world_size: int, unique_id: UniqueId, rank: int, config: Any) -> int:
        assert bytes(unique_id).startswith(b"unique\0id\0")
        assert rank == self._rank < world_size
        assert config._obj.blocking == 0, "a blocking communicator cannot be given up"
        comm._obj.value = 1000 + rank
        return IN_PROGRESS

    def ncclCommGetAsyncError(self, comm: ctypes.c_void_p, state: Any) -> int:
        self._check(comm)
        state._obj.value = self._nccl.broken.get(self._rank, SUCCESS)
        return SUCCESS

    def ncclCommAbort(self, comm: ctypes.c_void_p) -> int:
        self._check(comm)
        self._nccl.aborted.add(self._rank)
        return SUCCESS

    def ncclGroupStart(self) -> int:
        assert self._group is None
        self._group = []
        return SUCCESS

    def ncclSend(self, address: int, length: int, dtype: int, peer: int, comm: ctypes.c_void_p, stream: int) -> int:
        return self._post("send", address, length, dtype, peer, comm, stream)

    def ncclRecv(self, address: int, length: int, dtype: int, peer: int, comm: ctypes.c_void_p, stream: int) -> int:
        return self._post("recv", address, length, dtype, peer, comm, stream)

    def ncclGroupEnd(self) -> int:
        assert self._group is not None
        calls, self._group = self._group, None
        return self._nccl.end_group(self._rank, calls)

    def _post(self, kind: str, address: int, length: int, dtype: int, peer: int, comm: Any, stream: int) -> int:
        self._check(comm)
        assert self._group is not None, "outside a group"
        assert (dtype, stream) == (1, 7)
        assert length > 0
        assert peer != self._rank
        self._group.append((kind, address, length, peer))
        return SUCCESS

    def _check(self, comm: ctypes.c_void_p) -> None:
        assert comm.value == 1000 + self._rank, "not this rank's communicator"
        assert self._rank not in self._nccl.aborted, "a call after the abort"
