"""What a measurement ran on: hardware, versions, commit, and the read bandwidth that bounds decoding."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import switchgear
from switchgear.collect_env import processor
from switchgear_bench import probes


def read_bandwidth_bytes_per_s(num_threads: int) -> float:
    """What as many threads, of as many cores as there are at most, read from memory together."""
    return probes.memory_bytes_per_s(min(num_threads, num_cores()))


def num_cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0))


def commit() -> str:
    """The short commit id of the checkout this runs from, with `+` if the tree is dirty; `unknown` outside one."""
    folder = Path(switchgear.__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def own_version() -> str:
    """`not installed`: it runs from a checkout, and its commit says what it is."""
    try:
        return version("switchgear")
    except PackageNotFoundError:
        return "not installed"


def describe() -> dict[str, Any]:
    """The header of every result file."""
    import torch

    return {
        "commit": commit(),
        "hardware": processor(),
        "cores": num_cores(),
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "switchgear": own_version(),
    }
