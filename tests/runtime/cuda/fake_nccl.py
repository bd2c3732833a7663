"""An NCCL of one process: the calls that NcclTransport makes, over host memory, for ranks that are threads.

It keeps what the real one demands: sends and receives of a group are matched by (source, destination) in order, lengths
must agree, and a communicator that was aborted takes no more calls. It is as late as a non-blocking one may be: a group
is in progress when it ends, and on the stream only once the communicator's state is SUCCESS again; and nothing moves
until a mark is asked.
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
NUM_IN_PROGRESS = 3
Call = tuple[str, int, int, int]  # kind, address, length, peer


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

        def is_done() -> bool:
            if nccl.num_done[rank] < posted:
                nccl.move(rank)
            return nccl.num_done[rank] >= posted and rank not in nccl.stuck

        return is_done


class FakeNccl:
    """Shared by all ranks. `stuck`: ranks whose device never finishes; `broken`: whose communicator reports an error.
    `blocking`: the kind of communicator that may be opened."""

    def __init__(self, *, blocking: bool = False) -> None:
        self.blocking = blocking
        self.lock = threading.Lock()
        self.num_posted: dict[int, int] = defaultdict(int)
        self.num_done: dict[int, int] = defaultdict(int)
        self.stuck: set[int] = set()
        self.broken: dict[int, int] = {}
        self.aborted: set[int] = set()
        self._on_stream: dict[int, list[Call]] = defaultdict(list)
        self._sends: dict[tuple[int, int], deque[tuple[int, int, int]]] = defaultdict(deque)
        self._receives: dict[tuple[int, int], deque[tuple[int, int, int]]] = defaultdict(deque)

    def of(self, rank: int, version: int = 22907) -> Nccl:
        return Nccl(library=FakeLibrary(self, rank), path="fake", version=version, cuda_major=13)  # type: ignore[arg-type]

    def launch(self, rank: int, calls: list[Call]) -> None:
        """Onto the rank's stream."""
        self.num_posted[rank] += len(calls)
        self._on_stream[rank] += calls

    def move(self, rank: int) -> None:
        """What is on the rank's stream."""
        with self.lock:
            for kind, address, length, peer in self._on_stream.pop(rank, []):
                mine, theirs = self._sends, self._receives
                key = (rank, peer)
                if kind == "recv":
                    mine, theirs, key = self._receives, self._sends, (peer, rank)
                if not theirs[key]:
                    mine[key].append((address, length, rank))
                    continue
                other_address, other_length, other = theirs[key].popleft()
                if other_length != length:
                    self.broken[rank] = INVALID_USAGE
                    return
                source, to = (address, other_address) if kind == "send" else (other_address, address)
                ctypes.memmove(to, source, length)
                self.num_done[rank] += 1
                self.num_done[other] += 1


class FakeLibrary:
    """The functions, for one rank."""

    def __init__(self, nccl: FakeNccl, rank: int) -> None:
        self._nccl = nccl
        self._rank = rank
        self._group: list[Call] | None = None
        self._late: list[Call] = []  # not launched yet
        self._num_in_progress = 0  # how often the state is IN_PROGRESS before it is SUCCESS

    def ncclGetLastError(self, _comm: Any) -> bytes:
        return b"made up"

    def ncclGetUniqueId(self, to: Any) -> int:
        ctypes.memmove(to, b"unique\0id" + bytes(119), ctypes.sizeof(UniqueId))
        return SUCCESS

    def ncclCommInitRankConfig(self, comm: Any, world_size: int, unique_id: UniqueId, rank: int, config: Any) -> int:
        assert bytes(unique_id).startswith(b"unique\0id\0")
        assert rank == self._rank < world_size
        assert config._obj.blocking == self._nccl.blocking, "a blocking communicator cannot be given up"
        comm._obj.value = 1000 + rank
        if self._nccl.blocking:
            return self._nccl.broken.get(rank, SUCCESS)
        self._num_in_progress = NUM_IN_PROGRESS
        return IN_PROGRESS

    def ncclCommGetAsyncError(self, comm: ctypes.c_void_p, state: Any) -> int:
        self._check(comm)
        if self._num_in_progress:
            self._num_in_progress -= 1
            state._obj.value = IN_PROGRESS
            return SUCCESS
        self._nccl.launch(self._rank, self._late)
        self._late = []
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
        self._late, self._group = self._group, None
        self._num_in_progress = NUM_IN_PROGRESS
        return IN_PROGRESS

    def _post(self, kind: str, address: int, length: int, dtype: int, peer: int, comm: Any, stream: int) -> int:
        self._check(comm)
        assert self._group is not None, "outside a group"
        assert not self._num_in_progress, "a call while another is in progress"
        assert (dtype, stream) == (1, 7)
        assert length > 0
        assert peer != self._rank
        self._group.append((kind, address, length, peer))
        return SUCCESS

    def _check(self, comm: ctypes.c_void_p) -> None:
        assert comm.value == 1000 + self._rank, "not this rank's communicator"
        assert self._rank not in self._nccl.aborted, "a call after the abort"
