"""Runs a scenario on some ranks: `ThreadRanks` over loopback, `ProcessRanks` over shm."""

from __future__ import annotations

import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import comm_scenarios

import switchgear_runtime
from switchgear_runtime.comm.loopback import LoopbackHub
from switchgear_runtime.system import RealSystem

MAILBOX_BYTES = 4096
ANSWER_TIMEOUT_S = 60.0


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

    def __init__(self) -> None:
        folders = [str(Path(package).parent) for package in switchgear_runtime.__path__]
        self._process = subprocess.Popen(
            [sys.executable, comm_scenarios.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])},
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


class ProcessRanks:
    """Ranks as processes over shm."""

    def __init__(self) -> None:
        self._idle: list[RankProcess] = []

    def acquire(self, num_processes: int) -> list[RankProcess]:
        fresh = [RankProcess() for _ in range(num_processes - len(self._idle))]
        for process in fresh:
            assert process.answer() == {"told": "up"}
        self._idle += fresh
        taken, self._idle = self._idle[:num_processes], self._idle[num_processes:]
        return taken

    def release(self, processes: Sequence[RankProcess]) -> None:
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
                process.start(job(scenario, channels, rank, world_size, stay=stay, arguments=arguments))
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
