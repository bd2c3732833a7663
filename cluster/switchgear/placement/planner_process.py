"""The server's side of the planner: `Planner` is what the service asks, `PlannerProcess` one that is a child process."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import IO, Protocol

from switchgear.launcher.process import describe_exit, read_tail
from switchgear.placement.events import PlanReply, PlanRequest
from switchgear.placement.planner_protocol import PREFIX, decode_reply, encode_request, frame_length
from switchgear_runtime.env import child_environment
from switchgear_runtime.errors import WireError

WORKER_COMMAND = (sys.executable, "-m", "switchgear.placement.worker")
END_TIMEOUT_S = 5.0

log = logging.getLogger(__name__)


class PlannerLost(RuntimeError):
    """It died, or could not be started; the text reads on after "the planner died: "."""


class Planner(Protocol):
    """All coroutines run on one event loop. Whoever asks has a deadline of its own, and restarts it when that passed."""

    async def ask(self, request: PlanRequest) -> PlanReply:
        """Starts the planner if it does not run. PlannerLost if it ends without an answer."""
        ...

    async def restart(self) -> None:
        """End it, however little it answers; the next request starts another."""
        ...

    async def close(self) -> None:
        """End it for good. Idempotent."""
        ...


class PlannerProcess:
    """A `Planner`, started by its first request: a cluster that never plans has no such process."""

    def __init__(self, command: Sequence[str] = WORKER_COMMAND) -> None:
        self._command = tuple(command)
        self._process: asyncio.subprocess.Process | None = None
        self._output: IO[bytes] | None = None  # an unlinked file: gone with its last reader
        self._lock = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def ask(self, request: PlanRequest) -> PlanReply:
        async with self._lock:
            process = await self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(encode_request(request))
                await process.stdin.drain()
                length = frame_length(await process.stdout.readexactly(PREFIX.size))
                return decode_reply(await process.stdout.readexactly(length))
            except (OSError, asyncio.IncompleteReadError):
                status = await process.wait()
                raise PlannerLost(f"its process {describe_exit(status)}{self._tail()}") from None
            except WireError as error:
                self._kill()
                raise PlannerLost(f"it breaks its protocol: {error}") from None

    async def restart(self) -> None:
        self._kill()

    async def close(self) -> None:
        process = self._process
        self._kill()
        if process is not None:
            try:
                await asyncio.wait_for(process.wait(), END_TIMEOUT_S)
            except TimeoutError:
                log.error("planner process %d is still there %g s after SIGKILL", process.pid, END_TIMEOUT_S)
        if self._output is not None:
            self._output.close()

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        if self._output is not None:
            self._output.close()
        self._output = tempfile.TemporaryFile(prefix="switchgear-planner-")  # noqa: SIM115 (lives as long as the child)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._output,
                env=child_environment({"OMP_NUM_THREADS": "1"}),
                start_new_session=True,  # a Ctrl-C at the terminal is for the server alone
            )
        except OSError as error:
            raise PlannerLost(f"{self._command[0]} does not start: {error}") from None
        log.info("the planner runs as process %d", self._process.pid)
        return self._process

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            try:
                self._process.kill()
            except ProcessLookupError:
                log.debug("the planner had ended already")

    def _tail(self) -> str:
        text = "" if self._output is None or self._output.closed else read_tail(self._output)
        return f"; the end of its log:\n{text}" if text else ""
