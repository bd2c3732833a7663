"""A process that may be no child of ours, pinned by its start time so that a reused pid is never mistaken for it."""

from __future__ import annotations

import logging
import os
import select
import signal
from dataclasses import dataclass
from typing import IO

import psutil

LOG_TAIL_BYTES = 8192

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProcessId:
    """`created_s`: when it started, as psutil gives it."""

    pid: int
    created_s: float

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        return cls(pid, psutil.Process(pid).create_time())

    def is_gone(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return bool(process.create_time() != self.created_s or process.status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True

    def kill_and_wait(self, timeout_s: float) -> bool:
        """SIGKILL it; True once it is seen gone, False when `timeout_s` passed first."""
        try:
            handle = os.pidfd_open(self.pid)  # a pidfd stays with this process, whatever happens to its number
        except ProcessLookupError:
            return True
        try:
            if self.is_gone():
                return True
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            return bool(poll.poll(timeout_s * 1000))
        except ProcessLookupError:
            return True
        finally:
            os.close(handle)


def describe_exit(status: int) -> str:
    """A `Popen.returncode` in words that read on after "rank 2": "was killed by SIGKILL", "ended with status 1"."""
    number = -status if status < 0 else status - 128
    if status < 0 or 0 < number < signal.NSIG:
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        return f"was killed by {name}"
    return f"ended with status {status}"


def read_tail(output: IO[bytes]) -> str:
    """The end of a file that a process still writes; its write position, which is shared, stays."""
    size = os.fstat(output.fileno()).st_size
    start = max(0, size - LOG_TAIL_BYTES)
    return os.pread(output.fileno(), size - start, start).decode(errors="replace").strip()


def end_session(session_id: int) -> None:
    """SIGKILL what is left of a launcher's session: processes that whoever leads it could not end itself."""
    left: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session_id:
                process.send_signal(signal.SIGKILL)
                left.append(process)
        except (ProcessLookupError, PermissionError, psutil.Error):
            continue
    _, alive = psutil.wait_procs(left, timeout=5.0)
    if alive:
        log.error("processes %s are still there after SIGKILL", [process.pid for process in alive])
