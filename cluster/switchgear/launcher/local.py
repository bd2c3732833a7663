"""Ranks as plain processes of this host: `LocalLauncher`."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

import msgspec

from switchgear.launcher.base import LaunchError, OnExit
from switchgear.launcher.process import describe_exit, read_tail
from switchgear_runtime.env import child_environment
from switchgear_runtime.rank_worker import RankWorkerConfig, sweep_channel

RANK_COMMAND = (sys.executable, "-m", "switchgear_runtime.rank_worker")
KILL_TIMEOUT_S = 10.0

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Child:
    process: subprocess.Popen[bytes]
    output: IO[bytes]  # an unlinked file: gone with its last reader, however this process ends
    pidfd: int
    exited: asyncio.Event


class LocalLauncher:
    """A `Launcher`. The thread of its event loop must outlive the ranks: the kernel ends them when that thread ends."""

    def __init__(self, on_exit: OnExit, command: Sequence[str] = RANK_COMMAND) -> None:
        self._on_exit = on_exit
        self._command = tuple(command)
        self._children: dict[int, _Child] = {}

    async def open(self) -> str:
        return "127.0.0.1"

    async def start(self, rank: int, config: RankWorkerConfig) -> None:
        self._forget(rank)
        config = msgspec.structs.replace(config, parent_pid=os.getpid())
        output = tempfile.TemporaryFile(prefix=f"switchgear-rank-{rank}-")  # noqa: SIM115 (lives as long as the child)
        try:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=child_environment({"OMP_NUM_THREADS": str(config.engine.get("num_threads", 1))}),
                start_new_session=True,  # a Ctrl-C at the terminal is for the server alone
            )
        except OSError as error:
            output.close()
            raise LaunchError(f"{sys.executable} does not start: {error}") from error
        assert process.stdin is not None
        try:
            process.stdin.write(msgspec.json.encode(config) + b"\n")
            process.stdin.flush()  # and stays open: its end tells the rank that this process is gone
        except BrokenPipeError:
            log.debug("rank %d ended before it read its configuration", rank)  # its exit will say why
        pidfd = os.pidfd_open(process.pid)
        child = _Child(process, output, pidfd, asyncio.Event())
        self._children[rank] = child
        asyncio.get_running_loop().add_reader(pidfd, self._reap, rank, child)

    async def kill(self, rank: int) -> None:
        child = self._children.get(rank)
        if child is None or child.exited.is_set():
            return
        child.process.kill()
        try:
            await asyncio.wait_for(child.exited.wait(), KILL_TIMEOUT_S)
        except TimeoutError:
            raise LaunchError(
                f"process {child.process.pid} is still there {KILL_TIMEOUT_S:g} s after SIGKILL"
            ) from None

    async def sweep(self, channel: str) -> None:
        sweep_channel(channel)

    def release(self, rank: int) -> None:
        """No place is kept."""

    async def log_tail(self, rank: int) -> str:
        child = self._children.get(rank)
        if child is None or child.output.closed:
            return ""
        return read_tail(child.output)

    async def close(self, timeout_s: float) -> None:
        for child in self._children.values():
            if not child.exited.is_set():
                child.process.kill()
        waits = [asyncio.ensure_future(child.exited.wait()) for child in self._children.values()]
        if waits:
            _, late = await asyncio.wait(waits, timeout=timeout_s)
            for wait in late:
                wait.cancel()
            if late:
                log.error("%d rank processes are still there %g s after SIGKILL", len(late), timeout_s)
        for rank in list(self._children):
            self._forget(rank)

    def _reap(self, rank: int, child: _Child) -> None:
        """The pidfd became readable: the process is a zombie; collect it."""
        status = child.process.wait(KILL_TIMEOUT_S)
        self._release(child)
        child.exited.set()
        self._on_exit(rank, describe_exit(status))

    def _release(self, child: _Child) -> None:
        asyncio.get_running_loop().remove_reader(child.pidfd)
        os.close(child.pidfd)
        assert child.process.stdin is not None
        try:
            child.process.stdin.close()
        except BrokenPipeError:
            log.debug("process %d ended before it read its configuration", child.process.pid)

    def _forget(self, rank: int) -> None:
        """Drop what is left of an earlier process of this rank."""
        child = self._children.pop(rank, None)
        if child is not None:
            if not child.exited.is_set():
                self._release(child)
            child.output.close()
