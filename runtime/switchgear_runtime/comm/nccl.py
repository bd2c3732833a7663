"""Ranks whose GPUs exchange directly: `NcclTransport`, grouped sends and receives beside a transport of the hosts.

The hosts' transport (`control`: shm, gloo or both) carries headers and lengths, and names who is missing; NCCL's errors
name nobody. An exchange of device memory is three agreements over it: lengths (everybody is there), the grouped sends and
receives, and rounds of marks until every rank says that its part is complete. So a peer that dies or hangs in the middle
is named by the round, and then the communicator is aborted: it is non-blocking, and no rank is inside a call of NCCL's.

Where domains are hosts, their ranks have a communicator more, over the host's half of `control` (InsideHost); one is used
at a time, on one stream. Migration must share neither: two streams of one NCCL communicator may run in another order on
each rank.

STATUS: has run on no GPU yet.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate, pairwise
from typing import AnyStr, Never

import torch

from switchgear_runtime.comm.beside_hosts import BesideHosts, part_of
from switchgear_runtime.comm.device_exchange import Parts
from switchgear_runtime.comm.device_rounds import DONE, FAILED, LATE, among_all, until_all_done
from switchgear_runtime.comm.nccl_library import IN_PROGRESS, SUCCESS, UINT8, Nccl, UniqueId, communicator_config, nccl
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.env import ranks_may_share_gpu
from switchgear_runtime.errors import ConfigError, TransportError

_GPU = struct.Struct("<?64s")  # whether ranks may share a GPU, GPU
_MEET = struct.Struct("<I?64s128s")  # NCCL version, whether ranks may share a GPU, GPU, unique id (of rank 0)


class Gpu:
    """What NCCL needs of a device; tests have one of host memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def identity(self) -> str:
        return str(torch.cuda.get_device_properties(self.device).uuid)

    def current(self) -> AbstractContextManager[object]:
        """Calls inside are for this device."""
        return torch.cuda.device(self.device)

    def stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream

    def mark(self) -> Callable[[], bool]:
        """Tells whether what was enqueued before has finished."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event.query


class SharedGpu(ConfigError):
    """Two ranks have one GPU, which NCCL refuses."""


def over_nccl(control: Transport, device: torch.device, *, required: bool, timeout_s: float) -> Transport:
    """`control` with NCCL beside it. Where two ranks share a GPU, with peer memory or nothing, unless NCCL is `required`;
    all ranks decide the same, from the same headers, before any of them needs NCCL to be installed."""
    if control.world_size == 1:
        return control
    gpu = Gpu(device)
    if not required:
        header = _GPU.pack(ranks_may_share_gpu(), gpu.identity().encode())
        met = control.all_gather(header, timeout_s=timeout_s)
        if sharing([(shares, gpu) for shares, gpu in map(_GPU.unpack, met)]) is not None:
            from switchgear_runtime.comm.peer_transport import over_peer_memory

            return over_peer_memory(control, device, timeout_s=timeout_s)
    return NcclTransport(control, gpu, nccl(), timeout_s=timeout_s)


def sharing(met: Sequence[tuple[bool, AnyStr]]) -> tuple[int, int] | None:
    """`met`: whether each rank may share its GPU, and its GPU. Two ranks with one GPU, of which the later may not."""
    holders: dict[AnyStr, int] = {}
    for rank, (shares, gpu) in enumerate(met):
        if gpu in holders and not shares:
            return holders[gpu], rank
        holders[gpu] = rank
    return None


class NcclTransport(BesideHosts):
    """A Transport, by `control`, and a DeviceExchange. Constructing it is a rendezvous of its own, over `control`."""

    def __init__(self, control: Transport, gpu: Gpu, library: Nccl, *, timeout_s: float) -> None:
        super().__init__(control)
        self._gpu = gpu
        self._library = library
        self._comm = ctypes.c_void_p()
        self._lock = threading.Lock()  # of calls into NCCL
        try:
            self._connect(timeout_s)
        except BaseException:
            self._give_up()
            raise

    # --- between devices ----------------------------------------------------------------------------------------------

    def exchange(self, send: Sequence[Parts], *, timeout_s: float) -> list[Parts]:
        """As DeviceExchange, in one group. On the current stream; returns when every rank has what was sent to it."""
        deadline_s = time.monotonic() + timeout_s
        lengths = [[end - begin for begin, end in pairwise(parts.offsets)] for parts in send]
        with self._giving_up():
            told = self._control.all_to_all_v(
                [struct.pack(f"<{len(send)}Q", *to_peer) for to_peer in zip(*lengths, strict=True)],
                timeout_s=timeout_s,
            )
            sizes = [struct.unpack(f"<{len(send)}Q", view) for view in told]
            received = []
            for number in range(len(send)):
                starts = list(accumulate((from_peer[number] for from_peer in sizes), initial=0))
                received.append(Parts(torch.empty(starts[-1], dtype=torch.uint8, device=self._gpu.device), starts))
            with self._gpu.current():
                self._post(send, received)
                self._agree("exchange", self._marked_late(), deadline_s, timeout_s)
        self._count(send, received)
        return received

    def _post(self, send: Sequence[Parts], received: Sequence[Parts]) -> None:
        """Enqueue all of it as one group. Raises nothing of NCCL's: what fails shows in the marks."""
        for given, got in zip(send, received, strict=True):
            got.data[slice(*part_of(got, self.rank))].copy_(given.data[slice(*part_of(given, self.rank))])
        with self._lock:
            self._check_open()
            self._start_error = self._first_error(self._grouped(send, received, self._gpu.stream()))

    def _grouped(self, send: Sequence[Parts], received: Sequence[Parts], stream: int) -> Iterator[int]:
        library = self._library.library
        yield library.ncclGroupStart()
        for peer in range(self.world_size):
            if peer == self.rank:
                continue
            for call, all_parts in ((library.ncclSend, send), (library.ncclRecv, received)):
                for parts in all_parts:
                    begin, end = part_of(parts, peer)
                    if end > begin:
                        yield call(parts.data.data_ptr() + begin, end - begin, UINT8, peer, self._comm, stream)
        yield library.ncclGroupEnd()

    def _marked_late(self) -> Callable[[], bool]:
        """Marks at the first question, which `_watch` asks once the communicator's state is SUCCESS: a non-blocking one's
        group may be in progress when it ends, its kernels not on the stream yet, and a mark before them says nothing."""
        mark = functools.cache(self._gpu.mark)
        return lambda: mark()()

    @staticmethod
    def _first_error(results: Iterator[int]) -> int:
        """All calls are made, so that a group that was started ends."""
        errors = [result for result in results if result not in (SUCCESS, IN_PROGRESS)]
        return errors[0] if errors else SUCCESS

    # --- agreement ----------------------------------------------------------------------------------------------------

    def _agree(self, what: str, is_done: Callable[[], bool], deadline_s: float, timeout_s: float) -> None:
        """Until every rank's part is complete. Whoever has died or hangs is named by the rounds."""
        watch = functools.partial(self._watch, is_done)
        failed = until_all_done(self._control, what, watch, deadline_s=deadline_s, timeout_s=timeout_s)
        if failed:
            (own,) = among_all(self._control, [self.rank])
            self._fail(what, failed, own)

    def _watch(self, is_done: Callable[[], bool], until_s: float) -> int:
        """This rank's mark, as soon as it is not LATE."""
        while True:
            if self._start_error != SUCCESS or self._async_error() not in (SUCCESS, IN_PROGRESS):
                return FAILED
            if self._async_error() == SUCCESS and is_done():
                return DONE
            if time.monotonic() >= until_s:
                return LATE
            time.sleep(0)

    def _fail(self, what: str, failed: list[int], own: int) -> Never:
        error = self._start_error if self._start_error != SUCCESS else self._async_error()
        detail = self._library.result_text(error) if own in failed else "see its log"
        text = f"rank {own}: {what}: NCCL failed on rank {', '.join(map(str, failed))}: {detail}"
        raise TransportError(text, rank=own, peers=[peer for peer in failed if peer != own])

    def _async_error(self) -> int:
        with self._lock:
            if not self._comm:
                return FAILED
            state = ctypes.c_int()
            result = self._library.library.ncclCommGetAsyncError(self._comm, ctypes.byref(state))
        return int(result if result != SUCCESS else state.value)

    # --- life ---------------------------------------------------------------------------------------------------------

    def _connect(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        unique_id, self._start_error = meet(self._control, self._gpu, self._library, timeout_s=timeout_s)
        config = communicator_config(blocking=False)
        if self._start_error == SUCCESS:
            with self._lock, self._gpu.current():
                result = self._library.library.ncclCommInitRankConfig(
                    ctypes.byref(self._comm), self.world_size, unique_id, self.rank, ctypes.byref(config)
                )
            self._start_error = SUCCESS if result == IN_PROGRESS else result
        self._agree("NCCL start", lambda: True, deadline_s, timeout_s)

    def _check_open(self) -> None:
        if not self._comm:
            raise TransportError(f"rank {self.rank}: this NCCL communicator was given up", rank=self.rank)

    def _give_up(self) -> None:
        """Local, and waits for no peer. Idempotent."""
        with self._lock:
            if self._comm:
                self._library.library.ncclCommAbort(self._comm)
                self._comm = ctypes.c_void_p()


def meet(control: Transport, gpu: Gpu, library: Nccl, *, timeout_s: float) -> tuple[UniqueId, int]:
    """Rank 0's unique id, and what getting it returned here (SUCCESS on all other ranks). ConfigError on all ranks, or
    none, if they do not go together."""
    unique_id, error = UniqueId(), SUCCESS
    if control.rank == 0:
        error = int(library.library.ncclGetUniqueId(ctypes.byref(unique_id)))
    header = _MEET.pack(library.version, ranks_may_share_gpu(), gpu.identity().encode(), bytes(unique_id))
    met = [_MEET.unpack(given) for given in control.all_gather(header, timeout_s=timeout_s)]
    check_meeting([(version, shares, given.rstrip(b"\0").decode()) for version, shares, given, _ in met], library)
    ctypes.memmove(ctypes.byref(unique_id), met[0][3], len(met[0][3]))
    return unique_id, error


def check_meeting(met: Sequence[tuple[int, bool, str]], library: Nccl) -> None:
    """`met`: each rank's NCCL version, whether it may share its GPU, and its GPU. All ranks raise the same, or none does."""
    versions = {version for version, _, _ in met}
    if len(versions) > 1:
        names = ", ".join(f"rank {rank}: {version}" for rank, (version, _, _) in enumerate(met))
        raise ConfigError(f"ranks have different versions of NCCL ({names}); install one and the same everywhere")
    both = sharing([(shares, gpu) for _, shares, gpu in met])
    if both is not None:
        raise SharedGpu(
            f"ranks {both[0]} and {both[1]} share GPU {met[both[1]][2]}, which NCCL {library.version_text} refuses; give "
            "each rank a GPU, or use transport='shm', which goes by way of the host"
        )
