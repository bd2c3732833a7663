"""An NCCL communicator for a library that calls NCCL itself: `NcclCommunicator`, blocking, as such libraries expect it.

Never shared with NcclTransport. A rank that is inside a call of such a library when a peer goes away is let go by that
library's own timeout.

STATUS: has run on no GPU yet.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any

from switchgear_runtime.comm.device_rounds import DONE, FAILED, LATE, until_all_done
from switchgear_runtime.comm.nccl import Gpu, meet
from switchgear_runtime.comm.nccl_library import SUCCESS, Nccl, communicator_config
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.errors import TransportError


class NcclCommunicator:
    """All ranks of `control` construct it together."""

    def __init__(self, control: Transport, gpu: Gpu, library: Nccl, *, timeout_s: float) -> None:
        self._library = library
        self._comm = ctypes.c_void_p()
        unique_id, error = meet(control, gpu, library, timeout_s=timeout_s)
        config = communicator_config(blocking=True)

        def connect() -> int:
            with gpu.current():
                return error or library.library.ncclCommInitRankConfig(
                    ctypes.byref(self._comm), control.world_size, unique_id, control.rank, ctypes.byref(config)
                )

        start_together(control, "NCCL start", connect, timeout_s=timeout_s, describe=library.result_text)

    @property
    def address(self) -> int:
        """The ncclComm_t."""
        assert self._comm.value is not None
        return self._comm.value

    def close(self) -> None:
        """Local, and waits for no peer. Idempotent."""
        if self._comm:
            self._library.library.ncclCommAbort(self._comm)
            self._comm = ctypes.c_void_p()


def start_together(
    control: Transport,
    what: str,
    start: Callable[[], int],
    *,
    timeout_s: float,
    describe: Callable[[int], str] = "error {}".format,
) -> None:
    """`start`, which may block for ever, in a thread, until all ranks' have returned SUCCESS. TransportTimeout names those
    whose has not by the deadline, TransportError those whose failed, by its result or an exception."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(start())
        except Exception as error:  # noqa: BLE001 - told to all ranks below
            outcome.append(error)

    def watch(until_s: float) -> int:
        while not outcome:
            if time.monotonic() >= until_s:
                return LATE
            time.sleep(0.001)
        return DONE if outcome[0] == SUCCESS else FAILED

    threading.Thread(target=run, name=what, daemon=True).start()
    failed = until_all_done(control, what, watch, deadline_s=time.monotonic() + timeout_s, timeout_s=timeout_s)
    if failed:
        own = outcome[0] if outcome and outcome[0] != SUCCESS else None
        detail = (
            "see its log" if own is None else describe(own) if isinstance(own, int) else f"{type(own).__name__}: {own}"
        )
        text = f"rank {control.rank}: {what}: failed on rank {', '.join(map(str, failed))}: {detail}"
        raise TransportError(text, rank=control.rank, peers=[peer for peer in failed if peer != control.rank])
