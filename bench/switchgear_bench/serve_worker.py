"""One runtime under measurement: a process that keeps its model loaded, speaks JSON lines and does nothing between its turns."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

WORKER = Path(__file__).parent / "peers" / "worker.py"
START_TIMEOUT_S, TURN_TIMEOUT_S, CLOSE_TIMEOUT_S = 600.0, 300.0, 20.0


class WorkerFailed(RuntimeError):
    """With the end of what the worker wrote to stderr."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Runner:
    """How to start one runtime. `environment` reaches it by the `env` program, so that this process's own stays as it is."""

    name: str
    adapter: str
    python: str
    model: str
    settings: dict[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None  # to start in; None: here

    def command(self) -> list[str]:
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        arguments = [str(WORKER), self.adapter, self.model, json.dumps(self.settings)]
        return ["env", *variables, self.python, *arguments]


class Worker:
    """A running `Runner`. A context manager; every wait has a deadline."""

    def __init__(self, runner: Runner, *, command: Sequence[str] | None = None) -> None:
        self.runner = runner
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 -- as long as the worker; close() closes it
        self._process = subprocess.Popen(
            list(command or runner.command()),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=runner.folder,
        )
        self._unread = b""
        try:
            self.description = self._answer(START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure("is gone") from None
        return self._answer(TURN_TIMEOUT_S)

    def cpu_s(self) -> float:
        """Processor time of the worker and its processes so far; what an idle one adds, it takes from the others' turns."""
        try:
            process = psutil.Process(self._process.pid)
            times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
        except psutil.NoSuchProcess:
            return 0.0
        return sum(float(one.user + one.system) for one in times)

    def close(self) -> None:
        """End of input is the request to end; who does not, is killed with its children."""
        children: list[psutil.Process] = []
        if self._process.poll() is None:
            children = psutil.Process(self._process.pid).children(recursive=True)
        if self._process.stdin and not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):  # it ended first
                self._process.stdin.close()
        try:
            self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(CLOSE_TIMEOUT_S)
        for child in psutil.wait_procs(children, timeout=1.0)[1]:
            child.kill()
        if self._process.stdout:
            self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline_s = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline_s - time.monotonic()))
            if not ready:
                raise self._failure(f"has not answered within {timeout_s:.0f} s")
            chunk = self._process.stdout.read1(1 << 20)  # type: ignore[attr-defined]
            if not chunk:
                raise self._failure("ended")
            self._unread += chunk
        line, self._unread = self._unread.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failure(self, what: str) -> WorkerFailed:
        self._errors.seek(0)
        tail = self._errors.read()[-3000:].decode(errors="replace")
        return WorkerFailed(f"{self.runner.name} {what}; its stderr ends with:\n{tail}")
