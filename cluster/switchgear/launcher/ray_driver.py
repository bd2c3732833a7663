"""The Ray driver of a cluster, as a process of its own: commands on stdin, events on stdout (ray_protocol.py).

Apart from the server, because a Ray driver dies a minute after its head does, logs as it likes, keeps threads running,
and changes signal handlers; the server should do none of these. It ends, with all it started, when stdin does: that is
also how the server's death reaches it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import shutil
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec
import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from switchgear.launcher.process import ProcessId, read_tail
from switchgear.launcher.ray_actor import PlannerActor, RankActor
from switchgear.launcher.ray_places import RayPlaces
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
from switchgear_runtime.rank_worker import sweep_channel

KILL_TIMEOUT_S = 10.0
SHUTDOWN_TIMEOUT_S = 20.0
OBJECT_STORE_BYTES = 80 << 20  # Ray's least; nothing of ours goes through it
STOPPED = "ended with status 0"  # as it was told
TOKEN_HINT = "if that cluster wants a token, set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Rank:
    """One start of one rank. `process` and `node_id` are known once the actor lives."""

    rank: int
    actor: Any  # an ActorHandle, whose methods Ray makes up
    process: ProcessId | None = None
    node_id: str = ""
    watch: asyncio.Task[None] | None = None


class RayDriver:
    """Places the bundles, then one named actor a rank, watched by the future of its never-ending `run`."""

    def __init__(self, settings: DriverSettings, emit: IO[bytes]) -> None:
        self._settings = settings
        self._emit_to = emit
        self._emit_lock = threading.Lock()
        self._ranks: dict[int, _Rank] = {}
        self._planner: Any = None  # an ActorHandle, from the first Plan on
        self._planner_process: ProcessId | None = None
        self._num_starts = 0
        self._node_id = ""
        self._session_dir = ""
        self._places = RayPlaces(settings)
        self._tasks: set[asyncio.Task[None]] = set()

    def emit(self, event: Event) -> None:
        with self._emit_lock:
            self._emit_to.write(msgspec.json.encode(event) + b"\n")
            self._emit_to.flush()

    def open(self) -> Opened:
        """Start or join Ray, and reserve the bundles. Blocks; RuntimeError says what to change."""
        context: Any = ray.init(**self._init_arguments())
        self._session_dir = context.address_info["session_dir"]
        self._node_id = ray.get_runtime_context().get_node_id()
        nodes = self._places.reserve()
        # The loopback interface whenever it reaches all ranks; never all interfaces.
        own_address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        host = "127.0.0.1" if nodes == {self._node_id} else own_address
        return Opened(host=host, address=str(context.address_info["gcs_address"]))

    async def serve(self) -> None:
        """Until stdin ends."""
        reader = asyncio.StreamReader(limit=LINE_BYTES_MAX)
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
        while line := await reader.readline():
            task = loop.create_task(self._run(msgspec.json.decode(line, type=Command)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        """Kill the actors, give the bundles back and leave Ray; a Ray that we started ends with that."""
        for rank in self._ranks.values():
            ray.kill(rank.actor, no_restart=True)
            if rank.process is not None and rank.node_id == self._node_id:
                rank.process.kill_and_wait(KILL_TIMEOUT_S)
        if self._planner_process is not None:
            self._planner_process.kill_and_wait(KILL_TIMEOUT_S)
        self._places.close()
        ray.shutdown()

    def _init_arguments(self) -> dict[str, Any]:
        settings = self._settings
        common = {"namespace": "switchgear", "log_to_driver": False, "logging_level": "WARNING"}
        if settings.address is not None:
            return {**common, "address": settings.address}
        room = math.ceil(settings.num_ranks * settings.cpus_per_rank)
        return {
            **common,
            "address": "local",
            "num_cpus": max(os.cpu_count() or 1, room),
            "num_gpus": None if settings.gpus_per_rank else 0,  # None: those that it finds
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": str(
                Path(settings.folder or "") / "ray"
            ),  # Ray opens this one to everybody; its parent is private
        }

    # --- commands -------------------------------------------------------------------------------------------------

    async def _run(self, command: Command) -> None:
        try:
            done = await self._execute(command)
        except (RayError, RuntimeError, OSError, TimeoutError) as error:
            done = Done(command.id, error=_reason(error))
        self.emit(done)

    async def _execute(self, command: Command) -> Done:
        match command:
            case StartActor():
                await self._start(command.rank, command.config)
            case KillActor():
                await self._kill(command.rank)
            case SweepChannel():
                await self._sweep(command.channel)
            case ReleasePlace():
                self._places.give_back(command.rank)
            case ReadLog():
                return Done(command.id, result=self._log_tail(command.rank))
            case Plan():
                return Done(command.id, data=await self._plan(command.body))
            case EndPlanner():
                await self._end_planner()
        return Done(command.id)

    async def _start(self, rank: int, config: dict[str, Any]) -> None:
        settings = self._settings
        self._num_starts += 1
        group, bundle = await self._places.of(rank)
        actor: Any = (
            ray.remote(RankActor)
            .options(
                name=f"switchgear-{settings.name}-rank{rank}-{self._num_starts}",
                num_cpus=settings.cpus_per_rank,
                num_gpus=settings.gpus_per_rank,
                max_restarts=0,  # a rank comes back by the controller's will, in a new generation
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle),
            )
            .remote(rank, settings.domain_label)
        )
        state = _Rank(rank, actor)
        self._ranks[rank] = state
        described = asyncio.wrap_future(actor.describe.remote().future())
        pid, created_s, state.node_id = await asyncio.wait_for(described, settings.timeout_s)
        state.process = ProcessId(pid, created_s)
        sentinel = asyncio.wrap_future(actor.run.remote(msgspec.json.encode(config)).future())
        state.watch = asyncio.get_running_loop().create_task(self._watch(state, sentinel))

    async def _watch(self, state: _Rank, sentinel: asyncio.Future[None]) -> None:
        """The sentinel resolves when the rank stopped, failed or died; its exit is reported once the process is
        gone."""
        try:
            await sentinel
            reason = STOPPED
        except RayTaskError as error:
            reason = f"failed: {_reason(error)}"
        except RayError:
            assert state.process is not None
            reason = f"died: its process {state.process.pid} is gone (killed, or crashed)"
        await self._end_process(state)
        self.emit(Exited(state.rank, reason))

    async def _kill(self, rank: int) -> None:
        state = self._ranks.get(rank)
        if state is None:
            return
        ray.kill(state.actor, no_restart=True)
        if state.watch is None:  # still being placed: its `describe` fails, which ends the start
            return
        await self._end_process(state)
        await asyncio.wait_for(asyncio.shield(state.watch), KILL_TIMEOUT_S)

    async def _end_process(self, state: _Rank) -> None:
        """SIGKILL and see it gone: Ray calls an actor dead long before its process has left the memory it shares."""
        assert state.process is not None
        ray.kill(state.actor, no_restart=True)
        pid, created_s = state.process.pid, state.process.created_s
        if state.node_id == self._node_id:
            gone = await asyncio.to_thread(state.process.kill_and_wait, KILL_TIMEOUT_S)
        else:
            gone = await self._on_node(state.node_id, _end_process, pid, created_s)
        if not gone:
            raise RuntimeError(f"process {pid} is still there {KILL_TIMEOUT_S:g} s after SIGKILL")

    async def _sweep(self, channel: str) -> None:
        for node_id in {state.node_id for state in self._ranks.values() if state.node_id}:
            if node_id == self._node_id:
                sweep_channel(channel)
            else:
                await self._on_node(node_id, sweep_channel, channel)

    async def _on_node(self, node_id: str, function: Any, *arguments: object) -> Any:
        """Run a function on a node of the cluster; a node that is gone took its processes and its memory along."""
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        if not any(node["NodeID"] == node_id and node["Alive"] for node in nodes):
            return True
        remote = ray.remote(function).options(
            num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        )
        return await asyncio.wait_for(asyncio.wrap_future(remote.remote(*arguments).future()), 2 * KILL_TIMEOUT_S)

    async def _plan(self, body: bytes) -> bytes:
        """By the planner's actor, here on the server's node: it takes no part of the ranks' bundles."""
        if self._planner is None:
            self._num_starts += 1
            self._planner = (
                ray.remote(PlannerActor)
                .options(
                    name=f"switchgear-{self._settings.name}-planner-{self._num_starts}",
                    num_cpus=0,
                    max_restarts=0,  # it comes back with the next request
                    scheduling_strategy=NodeAffinitySchedulingStrategy(self._node_id, soft=False),
                )
                .remote()
            )
        planner = self._planner
        try:
            if self._planner_process is None:
                pid, created_s = await asyncio.wrap_future(planner.describe.remote().future())
                self._planner_process = ProcessId(pid, created_s)
            reply: bytes = await asyncio.wrap_future(planner.plan.remote(body).future())
        except RayError:
            if self._planner is planner:
                self._planner = self._planner_process = None
            raise
        return reply

    async def _end_planner(self) -> None:
        planner, process = self._planner, self._planner_process
        self._planner = self._planner_process = None
        if planner is not None:
            ray.kill(planner, no_restart=True)
        if process is not None:
            await asyncio.to_thread(process.kill_and_wait, KILL_TIMEOUT_S)

    def _log_tail(self, rank: int) -> str:
        state = self._ranks.get(rank)
        if state is None or state.process is None:
            return ""
        if state.node_id != self._node_id:
            return f"(in Ray's logs on node {state.node_id}, process {state.process.pid})"
        texts = []
        for path in sorted(Path(self._session_dir, "logs").glob(f"worker-*-{state.process.pid}.*")):
            with path.open("rb") as file:
                texts.append(read_tail(file))
        return "\n".join(text for text in texts if text)


def _end_process(pid: int, created_s: float) -> bool:
    return ProcessId(pid, created_s).kill_and_wait(KILL_TIMEOUT_S)


def _reason(error: BaseException) -> str:
    """A task's own error without Ray's wrapping and traceback."""
    cause = error.cause if isinstance(error, RayTaskError) and error.cause is not None else error
    text = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {text[0] if text else ''}"


def main() -> int:
    events = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what Ray or a library prints goes to the log, not between the events
    settings = msgspec.json.decode(_first_line(), type=DriverSettings)
    logging.basicConfig(level="INFO", stream=sys.stderr, format="%(asctime)s ray driver %(levelname)s: %(message)s")
    driver = RayDriver(settings, events)
    try:
        try:
            driver.emit(driver.open())
        except (RayError, RuntimeError, ValueError, OSError) as error:
            log.exception("Ray did not come up")
            hint = f" ({TOKEN_HINT})" if isinstance(error, ConnectionError) else ""
            driver.emit(OpenFailed((str(error).strip() or type(error).__name__) + hint))
            return 1
        asyncio.run(driver.serve())
    finally:
        # The server may be dead already, so nobody else would end a shutdown that hangs.
        watchdog = threading.Timer(SHUTDOWN_TIMEOUT_S, os._exit, (1,))
        watchdog.daemon = True
        watchdog.start()
        driver.close()
        if settings.folder is not None:
            shutil.rmtree(settings.folder, ignore_errors=True)
    return 0


def _first_line() -> bytes:
    """Unbuffered, so that the commands after it are left to asyncio."""
    line = bytearray()
    while not line.endswith(b"\n") and len(line) < LINE_BYTES_MAX:
        part = os.read(0, 1)
        if not part:
            break
        line += part
    return bytes(line)


if __name__ == "__main__":
    sys.exit(main())
