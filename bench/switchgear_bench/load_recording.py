"""One question: what does it cost a decode step to record who wants which expert?

The counting in native code is timed by the step's clock, Python's share of it and the report once a second by a clock
around each call. One rank in this process takes the whole batch: in a cluster each rank counts its own part of one.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import numpy as np

from switchgear_bench.serve import NotMeasured
from switchgear_bench.step_profile import WARM_STEPS, OneRank
from switchgear_bench.timed_load import RECORDING

PROMPT_TOKENS = 16


def measure(model_dir: str, batch_size: int, *, num_threads: int, num_steps: int, num_repeats: int) -> dict[str, Any]:
    """Microseconds of a step: means over steps, since a report belongs to many of them; medians over the repeats."""
    one = OneRank.of(model_dir, precision="bf16", num_threads=num_threads, num_tokens_max=PROMPT_TOKENS + num_steps)
    spec = one.runner.spec
    pairs_of_token = spec.num_moe_layers * spec.moe.top_k
    num_tokens = batch_size * (PROMPT_TOKENS + num_steps + 2 * WARM_STEPS - 1)
    recording_us, step_us = [], []
    try:
        for repeat in range(num_repeats + 1):
            before = one.load.num_recorded
            steps = one.run(batch_size, PROMPT_TOKENS, num_steps, seed=repeat)
            if (recorded := one.load.num_recorded - before) != num_tokens * pairs_of_token:
                raise NotMeasured(f"{recorded} pairs were recorded instead of {num_tokens * pairs_of_token}")
            if repeat:  # the first one warms up
                recording_us.append(float(np.mean([phase_ns[RECORDING] for phase_ns in steps.phase_ns])) / 1e3)
                step_us.append(1e6 * float(np.mean(steps.wall_s)))
    finally:
        one.stop()
    return {
        "num_ranks": 1,
        "num_threads": num_threads,
        "batch": batch_size,
        "num_steps": num_steps,
        "num_repeats": num_repeats,
        "recording_us": median(recording_us),
        "step_us": median(step_us),
        "fraction": median(mine / step for mine, step in zip(recording_us, step_us, strict=True)),
    }
