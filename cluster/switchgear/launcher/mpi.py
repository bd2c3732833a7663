"""Ranks as the processes of one MPI job: `MpiLauncher`, on top of the site's `mpiexec` or `srun`.

Fail-stop: MPI ends the job with any of its processes, so a death is reported for all ranks, and the controller starts
all of them again, which is a new job.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import subprocess
import sys
import tempfile
from typing import IO

import msgspec
import psutil

from switchgear.launcher.base import LaunchError, OnExit
from switchgear.launcher.process import describe_exit, end_session, read_tail
from switchgear_runtime.env import child_environment
from switchgear_runtime.rank_worker import RankWorkerConfig, sweep_channel

WORKER = (sys.executable, "-m", "switchgear_runtime.mpi_worker")
TERMINATE_TIMEOUT_S = 2.0
KILL_TIMEOUT_S = 10.0

log = logging.getLogger(__name__)


class MpiLauncher:
    """A `Launcher`. `command`: how to start `{ranks}` processes; `address`: this host's, as the ranks reach it."""

    def __init__(self, on_exit: OnExit, *, num_ranks: int, command: str, address: str) -> None:
        self._on_exit = on_exit
        self._num_ranks = num_ranks
        self._command = [word.replace("{ranks}", str(num_ranks)) for word in shlex.split(command)]
        self._address = address
        self._waiting: dict[int, RankWorkerConfig] = {}  # until all ranks are to be started
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None  # an unlinked file: gone with its last reader
        self._job: asyncio.Task[None] | None = None

    async def open(self) -> str:
        return self._address

    async def start(self, rank: int, config: RankWorkerConfig) -> None:
        self._waiting[rank] = config
        if len(self._waiting) < self._num_ranks:
            return
        if self._job is not None:
            await asyncio.wait([self._job], timeout=KILL_TIMEOUT_S)  # it has ended, or its ranks would not start anew
        configs = [self._waiting[rank] for rank in range(self._num_ranks)]
        self._waiting = {}
        self._forget_output()
        self._output = tempfile.TemporaryFile(prefix="switchgear-mpi-")  # noqa: SIM115 (lives as long as the job)
        threads = configs[0].engine.get("num_threads", 1)
        try:
            process = subprocess.Popen(
                [*self._command, *WORKER],
                stdin=subprocess.PIPE,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                env=child_environment({"OMP_NUM_THREADS": str(threads)}),
                start_new_session=True,  # a Ctrl-C at the terminal is for the server alone
            )
        except OSError as error:
            raise LaunchError(
                f"mpi_command does not start: {error}; install an MPI (pip install mpich, say), or give its full path"
            ) from error
        self._process = process
        assert process.stdin is not None
        try:
            process.stdin.write(msgspec.json.encode(configs) + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            log.debug("mpiexec ended before it read the ranks' configurations")  # its exit will say why
        self._job = asyncio.get_running_loop().create_task(self._watch(process))

    async def kill(self, rank: int) -> None:
        """Ends the job, and so all ranks."""
        if self._waiting.pop(rank, None) is not None:
            self._on_exit(rank, "was never started")
        elif self._process is not None and self._job is not None and not self._job.done():
            await asyncio.to_thread(_end_job, self._process)
            _, late = await asyncio.wait([self._job], timeout=KILL_TIMEOUT_S)
            if late:
                raise LaunchError(f"the MPI job is still there {KILL_TIMEOUT_S:g} s after SIGKILL")

    async def sweep(self, channel: str) -> None:
        sweep_channel(channel)

    def release(self, rank: int) -> None:
        """No place is kept."""

    async def log_tail(self, rank: int) -> str:  # noqa: ARG002 (mpiexec mixes all ranks' output)
        return "" if self._output is None else read_tail(self._output)

    async def close(self, timeout_s: float) -> None:
        self._waiting = {}
        if self._process is not None and self._job is not None:
            if not self._job.done():
                await asyncio.to_thread(_end_job, self._process)
            _, late = await asyncio.wait([self._job], timeout=timeout_s)
            if late:
                log.error("the MPI job is still there %g s after SIGKILL", timeout_s)
                self._job.cancel()
        self._forget_output()

    async def _watch(self, process: subprocess.Popen[bytes]) -> None:
        loop = asyncio.get_running_loop()
        exited = asyncio.Event()
        pidfd = os.pidfd_open(process.pid)
        loop.add_reader(pidfd, exited.set)
        try:
            await exited.wait()
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
        status = process.wait(KILL_TIMEOUT_S)
        await asyncio.to_thread(end_session, process.pid)  # ranks that outlived their mpiexec
        assert process.stdin is not None
        try:
            process.stdin.close()
        except BrokenPipeError:
            log.debug("mpiexec left part of its input unread")
        what = describe_exit(status)
        reason = what if status == 0 else f"ended with its MPI job, which ends as a whole: {self._command[0]} {what}"
        for rank in range(self._num_ranks):
            self._on_exit(rank, reason)

    def _forget_output(self) -> None:
        if self._output is not None:
            self._output.close()
            self._output = None


def _end_job(process: subprocess.Popen[bytes]) -> None:
    """mpiexec is asked first, since only it reaches processes on other hosts; its exit then is for `_watch` to see."""
    try:
        mpiexec = psutil.Process(process.pid)
        family = [mpiexec, *mpiexec.children(recursive=True)]
        mpiexec.terminate()
        _, alive = psutil.wait_procs(family, timeout=TERMINATE_TIMEOUT_S)
        for left in alive:
            left.kill()
    except psutil.NoSuchProcess:
        return
