"""What a measurement ran on: hardware, versions, commit, and the read bandwidth that bounds decoding."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import switchgear
from switchgear.collect_env import processor

_BUFFER_BYTES = 256 << 20  # well past any cache
_NUM_READS = 3


def read_bandwidth_bytes_per_s() -> float:
    """Best of three sums over 256 MiB on one thread: the read bandwidth a single rank can hope for."""
    buffer = np.ones(_BUFFER_BYTES // 8, dtype=np.int64)
    best_s = float("inf")
    for _ in range(_NUM_READS):
        start_s = time.perf_counter()
        total = int(buffer.sum())
        best_s = min(best_s, time.perf_counter() - start_s)
        if total != buffer.size:
            raise RuntimeError("the bandwidth probe read something else than it wrote")
    return buffer.nbytes / best_s


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


def describe() -> dict[str, Any]:
    """The header of every result file."""
    import torch

    return {
        "commit": commit(),
        "hardware": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "switchgear": version("switchgear"),
    }
