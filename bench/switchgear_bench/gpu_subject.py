"""A kernel of `bench gpu` beside torch: `Subject`, and `measure`, which checks it first and then times both by turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from switchgear_bench.gpu_clock import NUM_REPEATS, Bounds, Clock, Run


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is timed. `check` raises unless the two agree."""

    kernel: str
    num_bytes: int
    flops: float = 0.0
    ours: Run
    baseline: Run
    baseline_name: str
    check: Callable[[], None]
    baseline_captures: bool = True  # False: it waits for the device, and is timed as it is


def measure(subject: Subject, bounds: Bounds, clock: Clock) -> dict[str, Any]:
    subject.check()
    ours, baseline = clock.series([subject.ours]), clock.series([subject.baseline], captures=subject.baseline_captures)
    ours_s, baseline_s = clock.in_turns([ours, baseline])
    return {
        **bounds.row(subject.num_bytes, subject.flops, median(ours_s)),
        "graph": ours.is_graph,
        "num_repeats": NUM_REPEATS,
        "baseline": subject.baseline_name,
        "baseline_us": median(baseline_s) * 1e6,
        "baseline_graph": baseline.is_graph,
        "ratio_to_baseline": median(theirs / mine for theirs, mine in zip(baseline_s, ours_s, strict=True)),
    }
