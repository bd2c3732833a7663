"""What a measurement ran on: hardware, versions, commit, and the read bandwidth that bounds decoding."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import switchgear
from switchgear.collect_env import processor

_BUFFER_BYTES = 256 << 20  # well past any cache
_NUM_READS = 3


@functools.cache
def read_bandwidth_bytes_per_s(num_threads: int) -> float:
    """Best of three sums over 256 MiB a thread, all threads at once (as many as there are cores, at most)."""
    num_threads = min(num_threads, num_cores())
    buffers = [np.ones(_BUFFER_BYTES // 8, dtype=np.int64) for _ in range(num_threads)]
    best_s = float("inf")
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(_NUM_READS):
            start_s = time.perf_counter()
            totals = list(pool.map(lambda buffer: int(buffer.sum()), buffers))  # NumPy sums without the GIL
            best_s = min(best_s, time.perf_counter() - start_s)
            if totals != [buffer.size for buffer in buffers]:
                raise RuntimeError("the bandwidth probe read something else than it wrote")
    return num_threads * _BUFFER_BYTES / best_s


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
        "switchgear": version("switchgear"),
    }
