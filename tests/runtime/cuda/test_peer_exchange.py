"""Exchanges through peer memory by ranks that run at once: threads, each with its own pace, over the kernels' twin."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from arena import Checked
from checks_peer import PeerRanks

from switchgear_runtime.cuda.library import device_library

SEED = random.SystemRandom().randrange(1 << 32)
LAYERS = 30


def test_ranks_that_run_at_once() -> None:
    num_ranks = 3
    ranks = PeerRanks(Checked(device_library("twin")), SEED, num_ranks=num_ranks, timeout_ns=60_000_000_000)
    verified = threading.Barrier(num_ranks)  # what was sent is drawn anew only when all have compared with it

    def run(rank: int) -> None:
        rng = np.random.default_rng((SEED, rank))
        for layer in range(1, LAYERS + 1):
            ranks.draw(rank, rng)
            time.sleep(rng.random() * 1e-3)
            ranks.call("dispatch", rank)
            ranks.call("arrive", rank)  # waits for the others, in the kernel
            ranks.verify_arrived(rank)
            ranks.compute(rank, rng)
            time.sleep(rng.random() * 1e-3)
            ranks.call("give_back", rank)
            ranks.call("combine", rank)
            ranks.verify_combined(rank)
            assert ranks.sequences[rank][0] == ranks.number_after(layer)
            verified.wait(timeout=60)

    with ThreadPoolExecutor(num_ranks) as pool:
        for done in [pool.submit(run, rank) for rank in range(num_ranks)]:
            done.result(timeout=120)
    assert not any(fault.any() for fault in ranks.faults), f"seed {SEED}"
    ranks.arena.check()
