"""The `own_ray` fixture: a place where the `ray` command may be used without touching another Ray of this machine.

Each has a folder, a token and a home of its own, and is gone after the test. `ray` is Ray's own, but for `ray stop`,
which would end every Ray of this user, also those of other tests: here it ends those of its test.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
MARK = "SG_TEST_FOLDER"
RAY_PROGRAM = """#!{python}
import os, signal, sys
import psutil
if sys.argv[1:2] != ["stop"]:
    os.execv(sys.executable, [sys.executable, "-m", "ray.scripts.scripts", *sys.argv[1:]])
for process in psutil.process_iter():
    try:
        words = " ".join(process.cmdline())
        ours = process.environ().get("SG_TEST_FOLDER") == os.environ["SG_TEST_FOLDER"]
        if ours and any(word in words for word in ("raylet", "gcs_server", "ray::", "site-packages/ray/")):
            process.send_signal(signal.SIGKILL)
    except psutil.Error:
        continue
"""


def ray_serve_python() -> str:
    """An interpreter that has Ray Serve and Ray's dashboard, or a skipped test."""
    if importlib.util.find_spec("grpc") is not None:
        return sys.executable
    python = ROOT / "build" / "ray-serve" / "bin" / "python"
    if not python.exists():
        pytest.skip("Ray Serve and Ray's dashboard are not installed; `make ray-serve` puts them under build/ray-serve")
    return str(python)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class OwnRay:
    """`folder`, and the environment whose `ray` stays inside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.use(sys.executable)
        (folder / "token").write_text("5" * 64)
        (folder / ".bashrc").touch()  # what `ray up` runs starts by reading it

    def use(self, python: str) -> str:
        """Run everything with this interpreter."""
        self.write_program("ray", RAY_PROGRAM.format(python=python))
        (self.folder / "bin" / "python").unlink(missing_ok=True)
        self.write_program("python", f'#!/bin/bash\nexec {python} "$@"\n')
        own = {
            "HOME": str(self.folder),
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("runtime", "cluster", "bench")),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            "RAY_TMPDIR": str(self.folder / "ray"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "TMPDIR": str(self.folder),
            MARK: str(self.folder),
        }
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | own
        return python

    def write_program(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def run(self, *command: str, more: Mapping[str, str] | None = None, timeout_s: float = 200) -> str:
        """Its output; a failure shows the end of it."""
        done = subprocess.run(
            self._resolved(command), env=self.environment | dict(more or {}), cwd=self.folder, capture_output=True,
            text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def _resolved(self, command: Sequence[str]) -> list[str]:
        ours = self.folder / "bin" / command[0]
        return [str(ours) if ours.exists() else command[0], *command[1:]]

    def processes(self) -> list[psutil.Process]:
        """Whatever was started from here and still runs, found by the mark in its environment."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def close(self) -> None:
        for _ in range(5):  # Ray's processes start others while they end
            for process in (left := self.processes()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            psutil.wait_procs(left, timeout=10)
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture
def own_ray() -> Iterator[OwnRay]:
    ray = OwnRay(Path(tempfile.mkdtemp(prefix="sg-", dir="/tmp")))  # short, for Ray's sockets
    yield ray
    ray.close()
