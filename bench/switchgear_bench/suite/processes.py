"""Commands that the suite runs, one or several at once: `run`, `run_all`.

None outlives its limit or the suite's budget, nor do its children. Each is the leader of a process group in the suite's own
session: its group is killed when it has ended, whatever the reason, since a rank left behind would hold the GPU; and who
kills the session kills all.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path

from switchgear_bench.suite.budget import Budget
from switchgear_bench.suite.log import PART_BYTES_MAX, Log

ROOT = Path(__file__).resolve().parents[3]
LINES = 400  # of a command's end that are kept
LINE_CHARACTERS_MAX = 500
_POLL_S = 0.05
_CHUNK_BYTES = 1 << 16
_DRAIN_S = 5.0
_BEGIN_S = 5.0  # with less left, no further command begins


class End(Enum):
    NONE_YET = auto()  # for the budget's end it never began, if the suite is through with it
    BY_ITSELF = auto()
    LATE = auto()
    CUT = auto()  # by the budget


@dataclass(slots=True)
class Job:
    """A command; what became of it."""

    command: Sequence[str]
    timeout_s: float
    name: str = ""
    end: End = End.NONE_YET
    status: int | None = None  # None: it did not end by itself
    seconds: float = 0.0
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=LINES))

    @property
    def is_cut(self) -> bool:
        return self.end in (End.CUT, End.NONE_YET)

    @property
    def is_late(self) -> bool:
        return self.end is End.LATE

    def said(self, num_lines: int = LINES) -> list[str]:
        return list(self.lines)[-num_lines:]


def run(
    command: Sequence[str],
    *,
    timeout_s: float,
    log: Log,
    budget: Budget,
    while_it_runs: Callable[[], None] | None = None,
) -> Job:
    job = Job(command, timeout_s)
    run_all([job], num_at_once=1, log=log, budget=budget, while_they_run=while_it_runs)
    return job


def run_all(
    jobs: Sequence[Job],
    *,
    num_at_once: int,
    log: Log,
    budget: Budget,
    while_they_run: Callable[[], None] | None = None,
) -> None:
    """Their outcomes are in the jobs. What one alone writes goes to the log at once, of several each when it has ended."""
    waiting, running = list(jobs), list[_Running]()
    try:
        while waiting or running:
            if not budget.has(_BEGIN_S):
                waiting.clear()
            while waiting and len(running) < num_at_once:
                running.append(_Running(waiting.pop(0), log, at_once=num_at_once == 1))
            time.sleep(_POLL_S)
            for process in [process for process in running if process.has_ended(budget)]:
                running.remove(process)
                process.close()
            if while_they_run is not None:
                while_they_run()
    finally:
        for process in running:
            process.close()


class _Running:
    def __init__(self, job: Job, log: Log, *, at_once: bool) -> None:
        self._job = job
        self._log = log
        self._at_once = at_once
        self._kept: list[bytes] = []
        self._num_bytes = 0
        self._start_s = time.monotonic()
        self._process = subprocess.Popen(
            job.command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        rest = b""
        with suppress(OSError, ValueError):  # closed below, while a stray child still holds the other end
            while chunk := os.read(self._process.stdout.fileno(), _CHUNK_BYTES):
                self._keep(chunk)
                *whole, rest = (rest + chunk).split(b"\n")
                rest = rest[-_CHUNK_BYTES:]
                self._job.lines.extend(line.decode(errors="replace")[:LINE_CHARACTERS_MAX] for line in whole)
        if rest:
            self._job.lines.append(rest.decode(errors="replace")[:LINE_CHARACTERS_MAX])

    def _keep(self, chunk: bytes) -> None:
        room = PART_BYTES_MAX - self._num_bytes
        self._num_bytes += len(chunk)
        if room <= 0:
            return
        if self._at_once:
            self._log.write(chunk[:room])
        else:
            self._kept.append(chunk[:room])

    def has_ended(self, budget: Budget) -> bool:
        """By itself, or because its time is up."""
        job = self._job
        job.status = self._process.poll()
        if job.status is not None:
            job.end = End.BY_ITSELF
        elif time.monotonic() - self._start_s >= job.timeout_s:
            job.end = End.LATE
        elif not budget.has(0.0):
            job.end = End.CUT
        return job.end is not End.NONE_YET

    def close(self) -> None:
        """Kills the group, also what a process that ended by itself has left there."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._job.seconds = time.monotonic() - self._start_s
        self._reader.join(_DRAIN_S)
        assert self._process.stdout is not None
        if not self._reader.is_alive():
            self._process.stdout.close()
        if self._num_bytes > PART_BYTES_MAX:  # its end tells most
            self._kept.append(b"\n[...]\n" + "\n".join(self._job.said()).encode() + b"\n")
        if self._kept:
            head = f"\n----- {self._job.name or ' '.join(self._job.command[:3])}\n" if not self._at_once else ""
            self._log.write(head.encode() + b"".join(self._kept))
        if self._job.status is None:
            self._log.write(f"\n[killed after {self._job.seconds:.0f} s]\n".encode())
