"""Ranks as Ray actors: `RayLauncher`, the server's side of the Ray driver process (ray_driver.py)."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

import msgspec

from switchgear.launcher.base import LaunchError, OnExit
from switchgear.launcher.process import describe_exit, end_session, read_tail
from switchgear.launcher.ray_planner import RayPlanner
from switchgear.launcher.ray_protocol import (
    LINE_BYTES_MAX,
    Command,
    Done,
    DriverSettings,
    EndPlanner,
    Event,
    Exited,
    KillActor,
    Opened,
    OpenFailed,
    Plan,
    ReadLog,
    ReleasePlace,
    StartActor,
    SweepChannel,
)
from switchgear_runtime.env import child_environment
from switchgear_runtime.rank_worker import RankWorkerConfig

COMMAND_TIMEOUT_S = 40.0
FOLDER_CHARS_MAX = 36  # Ray puts Unix sockets deep below it, and their paths end at 107

log = logging.getLogger(__name__)


class RayLauncher:
    """A `Launcher`. Without `address` it starts a Ray of its own: reachable with a token of its own, files in a folder
    of its own, no dashboard."""

    def __init__(
        self,
        on_exit: OnExit,
        *,
        name: str,
        num_ranks: int,
        cpus_per_rank: float,
        gpus_per_rank: float = 0.0,
        ranks_per_domain: int = 0,
        domain_label: str = "",
        one_host: bool,
        address: str | None,
        timeout_s: float,
    ) -> None:
        self._on_exit = on_exit
        self._folder: Path | None = None
        self._settings = DriverSettings(
            name=name,
            num_ranks=num_ranks,
            cpus_per_rank=cpus_per_rank,
            gpus_per_rank=gpus_per_rank,
            ranks_per_domain=ranks_per_domain,
            domain_label=domain_label,
            one_host=one_host,
            address=address,
            folder=None,
            timeout_s=timeout_s,
        )
        self._output: IO[bytes] | None = None  # an unlinked file: gone with its last reader
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._opened: asyncio.Future[Opened] | None = None
        self._ids = itertools.count()
        self._waiting: dict[int, asyncio.Future[Done]] = {}
        self._running: set[int] = set()  # ranks whose exit has not been reported
        self._closing = False
        self.ray_address: str | None = None

    async def open(self) -> str:
        environment = child_environment({})
        settings = self._settings
        if settings.address is None:
            self._folder = _private_folder()
            settings = msgspec.structs.replace(settings, folder=str(self._folder))
            environment = child_environment(_local_ray_environment(self._folder))
        self._opened = asyncio.get_running_loop().create_future()
        self._output = tempfile.TemporaryFile(prefix="switchgear-ray-")  # noqa: SIM115 (lives as long as the driver)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "switchgear.launcher.ray_driver",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            env=environment,
            start_new_session=True,
            limit=LINE_BYTES_MAX,
        )
        self._reader = asyncio.get_running_loop().create_task(self._read(self._process))
        self._write(settings)
        try:
            opened = await asyncio.wait_for(self._opened, self._settings.timeout_s)
        except TimeoutError:
            raise LaunchError(f"Ray did not come up within {self._settings.timeout_s:g} s{self._tail()}") from None
        self.ray_address = opened.address
        return opened.host

    async def start(self, rank: int, config: RankWorkerConfig) -> None:
        self._running.add(rank)
        try:
            await self._call(StartActor(next(self._ids), rank, msgspec.to_builtins(config)))
        except LaunchError:
            self._running.discard(rank)
            raise

    async def kill(self, rank: int) -> None:
        if rank in self._running:
            await self._call(KillActor(next(self._ids), rank))

    async def sweep(self, channel: str) -> None:
        await self._call(SweepChannel(next(self._ids), channel))

    def release(self, rank: int) -> None:
        if self._process is not None and self._process.returncode is None and not self._closing:
            self._write(ReleasePlace(next(self._ids), rank))  # nobody waits for it

    async def log_tail(self, rank: int) -> str:
        return (await self._call(ReadLog(next(self._ids), rank))).result

    async def plan(self, body: bytes) -> bytes:
        """By the planner's actor; LaunchError if it dies over it."""
        return (await self._call(Plan(next(self._ids), body))).data

    async def end_planner(self) -> None:
        """Kill the planner's actor, if there is one; the next `plan` starts another."""
        await self._call(EndPlanner(next(self._ids)))

    def make_planner(self) -> RayPlanner:
        return RayPlanner(self)

    async def close(self, timeout_s: float) -> None:
        self._closing = True
        process = self._process
        if process is not None and process.returncode is None:
            assert process.stdin is not None
            process.stdin.close()  # the driver ends its actors and its Ray, then itself
            try:
                await asyncio.wait_for(process.wait(), timeout_s)
            except TimeoutError:
                log.warning("the Ray driver did not end within %g s and is killed", timeout_s)
        if process is not None:
            await asyncio.to_thread(end_session, process.pid)
        if self._reader is not None:
            await asyncio.wait([self._reader], timeout=1.0)
            self._reader.cancel()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._output is not None:
            self._output.close()

    # --- the driver process -----------------------------------------------------------------------------------------

    async def _call(self, command: Command) -> Done:
        if self._process is None or self._process.returncode is not None:
            raise LaunchError("the Ray driver process has ended")
        done: asyncio.Future[Done] = asyncio.get_running_loop().create_future()
        self._waiting[command.id] = done
        try:
            self._write(command)
            return await asyncio.wait_for(done, max(COMMAND_TIMEOUT_S, self._settings.timeout_s))
        except TimeoutError:
            raise LaunchError(f"the Ray driver did not finish {type(command).__name__} in time") from None
        finally:
            del self._waiting[command.id]

    def _write(self, message: Command | DriverSettings) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(message) + b"\n")

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            self._take(msgspec.json.decode(line, type=Event))
        status = await process.wait()
        reason = f"the Ray driver process {describe_exit(status)}"
        if not self._closing:
            log.error("%s%s", reason, self._tail())
        waiting: list[asyncio.Future[Any]] = [*self._waiting.values()]
        if self._opened is not None:
            waiting.append(self._opened)
        for future in waiting:
            if not future.done():
                future.set_exception(LaunchError(reason + self._tail()))
        for rank in list(self._running):
            self._ended(rank, f"is lost: {reason}")

    def _take(self, event: Event) -> None:
        match event:
            case Opened():
                assert self._opened is not None
                self._opened.set_result(event)
            case OpenFailed():
                assert self._opened is not None
                self._opened.set_exception(LaunchError(f"Ray did not come up: {event.error}"))
            case Done():
                waiting = self._waiting.get(event.id)
                if waiting is None or waiting.done():
                    log.debug("a late answer of the Ray driver: %s", event)
                elif event.error is not None:
                    waiting.set_exception(LaunchError(event.error))
                else:
                    waiting.set_result(event)
            case Exited():
                self._ended(event.rank, event.reason)

    def _ended(self, rank: int, reason: str) -> None:
        if rank in self._running:
            self._running.discard(rank)
            self._on_exit(rank, reason)

    def _tail(self) -> str:
        text = "" if self._output is None or self._output.closed else read_tail(self._output)
        return f"; the end of its log:\n{text}" if text else ""


def _private_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="sg-"))
    if len(str(folder)) > FOLDER_CHARS_MAX:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="sg-", dir="/tmp"))
    return folder


def _local_ray_environment(folder: Path) -> dict[str, str]:
    """Defaults for a Ray of our own; what the user has set wins. A token in our folder, so that nothing is written to
    the home directory."""
    token_path = folder / "auth_token"
    with os.fdopen(os.open(token_path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_path), "RAY_USAGE_STATS_ENABLED": "0"}
