"""`switchgear serve` as a process, for tests: start it, find its URL, stop it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

STOP_TIMEOUT_S = 30


def start_server(*flags: str) -> tuple[subprocess.Popen[str], str]:
    """`switchgear serve` as a user starts it; (process, URL) once it is ready."""
    command = [sys.executable, "-m", "switchgear.cli", "serve", "--launcher", "local", "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:  # ends when the server does
        if found := re.search(r"http://\S+", line):
            return process, found.group()
    process.stdout.close()
    raise AssertionError(f"the server ended with status {process.wait(STOP_TIMEOUT_S)} before it was ready")


def stop_server(process: subprocess.Popen[str]) -> int:
    """Its exit status after SIGTERM; killed if it takes too long."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_TIMEOUT_S)
        raise
    finally:
        assert process.stdout is not None
        process.stdout.close()
