"""Ranks on CPUs of their own, also where clusters take turns on one host: `pin_ranks`.

A cluster's ranks claim their CPUs (`--bind-cpus`), so of several clusters the first one has them and the others run
anywhere, and slower: an arm's advantage that is nobody's merit. Here all have the same CPUs.
"""

from __future__ import annotations

import os
from pathlib import Path

from switchgear import LLM


def pin_ranks(llm: LLM, num_threads: int) -> bool:
    """Rank r to the r-th `num_threads` CPUs, all threads that it has (later ones inherit it). False, and nothing done: there
    are too few CPUs, or the ranks are not of this host."""
    pids = [hello.pid for hello in llm._cluster.controller.hellos]
    cpus = sorted(os.sched_getaffinity(0))
    if len(pids) * num_threads > len(cpus) or not all(Path(f"/proc/{pid}").exists() for pid in pids):
        return False
    for rank, pid in enumerate(pids):
        own = cpus[rank * num_threads : (rank + 1) * num_threads]
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), own)
    return True
