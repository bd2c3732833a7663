"""Runs a scenario on some ranks: `ThreadRanks` over loopback, `ProcessRanks` over shm, `ForkedRanks` over networks."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import comm_scenarios
import pytest
from mpi_sites import MpiSite

import switchgear_runtime
from switchgear_runtime.comm.loopback import LoopbackHub
from switchgear_runtime.system import RealSystem

MAILBOX_BYTES = 4096
ANSWER_TIMEOUT_S = 75.0
GPU_JOIN_S = 60.0  # joining includes CUDA's start


class Ranks(Protocol):
    """Where a scenario runs. `fault` ("kill" or "stop") befalls the victim once it tells "ready"."""

    def run(
        self,
        scenario: str,
        world_size: int,
        *,
        fault: str | None = None,
        victim: int = 0,
        **arguments: Any,
    ) -> list[dict[str, Any]]: ...


class ThreadRanks:
    """Ranks as threads over one loopback hub."""

    def run(
        self, scenario: str, world_size: int, *, fault: str | None = None, victim: int = 0, **arguments: Any
    ) -> list[dict[str, Any]]:
        hub = LoopbackHub(world_size, RealSystem())
        if fault is not None:
            arguments["victim"] = victim
        outcomes: list[dict[str, Any]] = [{} for _ in range(world_size)]
        ready = threading.Event()
        transports = [hub.transport(rank) for rank in range(world_size)]

        def tell(text: str) -> None:
            assert text == "ready"
            ready.set()

        def run_rank(rank: int) -> None:
            run = comm_scenarios.SCENARIOS[scenario]
            try:
                outcomes[rank] = comm_scenarios.outcome(lambda: [run(transports[rank], tell, **arguments)])
            except BaseException as error:  # noqa: BLE001 - RankCrashed, when the hub killed it
                outcomes[rank] = {"error": type(error).__name__, "peers": [], "text": str(error)}
            if fault is None:
                transports[rank].close()

        threads = [threading.Thread(target=run_rank, args=(rank,), daemon=True) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        if fault is not None:
            assert ready.wait(ANSWER_TIMEOUT_S)
            (hub.kill if fault == "kill" else hub.stop)(victim)
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        for rank, thread in enumerate(threads):
            if fault != "stop" or rank != victim:
                thread.join(deadline - time.monotonic())
                assert not thread.is_alive(), f"rank {rank} hangs"
        hub.kill(victim)  # lets a stopped victim end
        return outcomes


class RankProcess:
    """A process that waits for jobs; kept from test to test, since starting Python is what costs."""

    def __init__(self, prefix: Sequence[str] = ()) -> None:
        self._process = subprocess.Popen(
            [*prefix, sys.executable, comm_scenarios.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
        )
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(json.loads(line))
        self._answers.put(None)

    def start(self, job: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any] | None:
        """The next thing it says; None once it is dead."""
        return self._answers.get(timeout=ANSWER_TIMEOUT_S)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """Reaped only in `close`: a dead process that its parent has not waited for is dead all the same."""
        self._process.kill()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


class ForkedRank:
    """As RankProcess, but forked from one that has imported torch, which costs more than all else."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile("r")
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        up = self.answer()
        assert up is not None
        self.pid: int = up["pid"]
        self._answers.put(up)

    def _read(self) -> None:
        try:
            for line in self._lines:
                self._answers.put(json.loads(line))
        except OSError:
            pass
        self._answers.put(None)

    def start(self, job: dict[str, Any]) -> None:
        self._connection.sendall(json.dumps(job).encode() + b"\n")

    def answer(self) -> dict[str, Any] | None:
        return self._answers.get(timeout=ANSWER_TIMEOUT_S)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def close(self) -> None:
        """Idempotent."""
        if self._connection.fileno() < 0:
            return
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)
            self._connection.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._lines.close()
        self._connection.close()


class ProcessRanks:
    """Ranks as processes over shm."""

    kind = "shm"

    def __init__(self) -> None:
        self._idle: list[Any] = []

    def fresh(self) -> Any:
        return RankProcess()

    def place(self, _world_size: int) -> dict[str, Any]:
        """What a job says beside the scenario."""
        return {}

    def acquire(self, num_processes: int) -> list[Any]:
        fresh = [self.fresh() for _ in range(num_processes - len(self._idle))]
        for process in fresh:
            answer = process.answer()
            assert answer is not None
            assert answer["told"] == "up"
        self._idle += fresh
        taken, self._idle = self._idle[:num_processes], self._idle[num_processes:]
        return taken

    def release(self, processes: Sequence[Any]) -> None:
        self._idle += processes

    def close(self) -> None:
        for process in self._idle:
            process.close()

    def run(
        self,
        scenario: str,
        world_size: int,
        *,
        fault: str | None = None,
        victim: int = 0,
        num_channels: int = 1,
        **arguments: Any,
    ) -> list[dict[str, Any]]:
        if fault is not None:
            arguments["victim"] = victim
        processes = self.acquire(world_size)
        channels = [fresh_channel() for _ in range(num_channels)]
        try:
            for rank, process in enumerate(processes):
                stay = fault is not None and rank == victim
                what = job(scenario, channels, rank, world_size, stay=stay, arguments=arguments)
                process.start({**what, "transport": self.kind, **self.place(world_size)})
            if fault is not None:
                assert processes[victim].answer() == {"told": "ready"}
                processes[victim].signal(signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
            outcomes: list[dict[str, Any]] = []
            for rank, process in enumerate(processes):
                outcome = {} if fault is not None and rank == victim else process.answer()
                assert outcome is not None, f"rank {rank} died"
                outcomes.append(outcome)
        except BaseException:
            for process in processes:
                process.close()
            raise
        assert not [channel for channel in channels if Path("/dev/shm", f"sg-{channel}").exists()]
        if fault is not None:
            processes.pop(victim).close()
        self.release(processes)
        return outcomes


class GpuRanks(ProcessRanks):
    """Ranks that share one GPU. nccl: each on a host of its own, as far as NCCL knows; auto: peer memory."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def fresh(self) -> RankProcess:
        if self.kind != "nccl":
            return RankProcess()
        # Another host for each is what NCCL before 2.30 needs to take one GPU twice; since then it asks for the word.
        shared = [f"NCCL_HOSTID=sg-{secrets.token_hex(8)}", "NCCL_MULTI_RANK_GPU_ENABLE=1", "NCCL_SOCKET_IFNAME=lo"]
        return RankProcess(["env", *shared])

    def place(self, _world_size: int) -> dict[str, Any]:
        return {"device": "cuda:0", "join_timeout_s": GPU_JOIN_S}


class ForkedRanks(ProcessRanks):
    """Ranks over gloo, or over shm on each of two pretended hosts and gloo between."""

    def __init__(self, kind: str, folder: Path) -> None:
        super().__init__()
        self.kind = kind
        self.hosts: list[str] = []  # of the next run's ranks; empty: two halves
        self.dispatch = "flat"
        self._folder = folder
        self._path = str(folder / f"{kind}.socket")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self._path)
        self._listener.listen()
        self._listener.settimeout(ANSWER_TIMEOUT_S)
        self._parent = subprocess.Popen(
            [sys.executable, comm_scenarios.__file__, "--fork"], stdin=subprocess.PIPE, env=environment()
        )

    def fresh(self) -> ForkedRank:
        assert self._parent.stdin is not None
        self._parent.stdin.write(f"{self._path}\n".encode())
        self._parent.stdin.flush()
        return ForkedRank(self._listener.accept()[0])

    def place(self, world_size: int) -> dict[str, Any]:
        hosts = self.hosts or [f"host-{2 * rank // world_size}" for rank in range(world_size)]
        where = {"hosts": hosts if self.kind == "hierarchical" else [], "dispatch": self.dispatch}
        return {"folder": str(self._folder), "address": comm_scenarios.LOCAL, **where}

    def close(self) -> None:
        super().close()
        assert self._parent.stdin is not None
        self._parent.stdin.close()
        self._parent.wait(ANSWER_TIMEOUT_S)
        self._listener.close()


class MpiRanks(ProcessRanks):
    """Ranks of one MPI job, which ends, and is started anew, with any of them. Smaller worlds use its first ranks."""

    kind = "mpi"
    size = 4

    def __init__(self, site: MpiSite, folder: Path, *, survives: bool = False) -> None:
        super().__init__()
        self._site = site
        self._survives = survives  # user-level failure mitigation: the job goes on without its dead
        self._path = str(folder / "socket")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self._path)
        self._listener.listen()
        self._listener.settimeout(ANSWER_TIMEOUT_S)
        self._job: subprocess.Popen[bytes] | None = None
        self._ranks: list[ForkedRank] = []

    def acquire(self, num_processes: int) -> list[Any]:
        if num_processes > self.size:
            pytest.skip(f"the MPI job of the tests has {self.size} ranks")
        if self._job is None:
            program = [sys.executable, comm_scenarios.__file__, "--connect", self._path]
            self._job = subprocess.Popen(
                [self._site.mpiexec, *(["--with-ft", "ulfm"] * self._survives), "-n", str(self.size), *program],
                env=self._site.environment(environment()),
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # mpiexec's complaint about a rank that the tests ended
            )
            ranks = [ForkedRank(self._listener.accept()[0]) for _ in range(self.size)]
            ups = [rank.answer() for rank in ranks]
            self._ranks = [rank for _, rank in sorted(zip(ups, ranks, strict=True), key=lambda pair: pair[0]["rank"])]
        return self._ranks[:num_processes]

    def release(self, processes: Sequence[Any]) -> None:
        """They stay with the job."""

    def run(self, scenario: str, world_size: int, **arguments: Any) -> list[dict[str, Any]]:
        if arguments.get("fault") == "kill" and not self._survives:
            pytest.skip("fail-stop: MPI ends the whole job with one dead rank (test_cluster_mpi.py)")
        try:
            outcomes = super().run(scenario, world_size, **arguments)
        except AssertionError:
            self.end()
            raise
        if arguments.get("fault") is not None:
            self.end()
        return outcomes

    def end(self) -> None:
        for rank in self._ranks:
            rank.close()
        self._ranks = []
        if self._job is not None:
            self._job.kill()
            self._job.wait(ANSWER_TIMEOUT_S)
            self._job = None

    def close(self) -> None:
        self.end()
        self._listener.close()


def environment() -> dict[str, str]:
    folders = [str(Path(package).parent) for package in switchgear_runtime.__path__]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])}


def job(
    scenario: str,
    channels: list[str],
    rank: int,
    world_size: int,
    *,
    mailbox_bytes: int = MAILBOX_BYTES,
    join_timeout_s: float = 30.0,
    num_rounds: int = 1,
    stay: bool = False,
    arguments: dict[str, Any] | None = None,
) -> dict[str, Any]:
    return {
        "transport": "shm",
        "scenario": scenario,
        "channels": channels,
        "rank": rank,
        "world_size": world_size,
        "mailbox_bytes": mailbox_bytes,
        "join_timeout_s": join_timeout_s,
        "num_rounds": num_rounds,
        "stay": stay,
        "arguments": arguments or {},
    }


def fresh_channel() -> str:
    return f"test-{secrets.token_hex(8)}"


def results(outcomes: list[dict[str, Any]]) -> list[Any]:
    """What the ranks returned; fails with the first error of any."""
    for rank, outcome in enumerate(outcomes):
        assert "result" in outcome, f"rank {rank}: {outcome}"
    return [outcome["result"] for outcome in outcomes]
