"""One question: what does a step cost while experts migrate, against the same step while none do?

Ranks over shared memory decode without a pause, in short blocks of steps of three arms that take turns in random order:
no migration, no migration again (what two equal arms differ by on this machine), and maps applied back to back. All arms
so see the same machine, the same sequences and the same placement drift. A step's time is from the end of the one before,
on the rank where that took longer; the first steps of a block, which belong to two arms, do not count.

What is timed is checked to have happened: experts really arrived, epochs flipped, tokens were made.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from switchgear_bench.migration_worker import Job

ARMS = ("none", "none again", "migrating")
SETTLE_STEPS = 10  # of each block
PERCENTILES = (50.0, 99.0, 99.9)
_BOOTSTRAPS = 400
_START_TIMEOUT_S, _STEP_S_MAX = 60.0, 0.05
Float64 = NDArray[np.float64]


class NotMeasured(RuntimeError):
    """What was to be timed did not happen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    model: str
    ranks: int = 2
    steps: int = 10_000  # an arm
    block_steps: int = 250
    batch_size: int = 8  # sequences a rank
    experts_per_s: int = 256  # over all ranks
    moves_per_map: int = 16  # to each rank
    source: str = "auto"
    seed: int = 1
    expert_bytes: int = 0


def run(setup: Setup) -> dict[str, Any]:
    """One row."""
    rng = np.random.default_rng(setup.seed)
    num_blocks = -(-setup.steps // (setup.block_steps - SETTLE_STEPS))
    arms = np.concatenate([rng.permutation(len(ARMS)) for _ in range(num_blocks)])
    with tempfile.TemporaryDirectory(prefix="bench-migration-") as folder:
        answers = _run_workers(setup, [bool(arm == 2) for arm in arms], Path(folder))
        arrays = [dict(np.load(Path(folder) / f"rank{rank}.npz")) for rank in range(setup.ranks)]
    wall_RN = np.stack([np.diff(one["ended_s"]) for one in arrays])
    cpu_RN = np.stack([np.diff(one["cpu_s"]) for one in arrays])
    epochs = arrays[0]["epochs"]
    flips = np.diff(epochs) > 0
    num_steps = len(arms) * setup.block_steps
    counts = np.arange(num_steps) % setup.block_steps >= SETTLE_STEPS
    arm_N = np.repeat(arms, setup.block_steps)
    migrating_s = float(wall_RN.max(axis=0)[arm_N == 2].sum())
    _check(answers, arrays)
    row: dict[str, Any] = {
        "ranks": setup.ranks,
        "batch_size": setup.batch_size,
        "steps_per_arm": int((counts & (arm_N == 0)).sum()),
        "num_flips": int(flips.sum()),
        "experts_moved": sum(answer["experts_moved"] for answer in answers),
        "experts_per_s": sum(answer["experts_moved"] for answer in answers) / migrating_s,
        "moved_bytes_per_s": sum(answer["moved_bytes"] for answer in answers) / migrating_s,
        "source": "host cache" if answers[0]["shares_weights"] else setup.source,
        "pinned": all(answer["pinned"] for answer in answers),
        "native": all(answer["is_native"] for answer in answers),
    }
    for clock, values_RN in (("wall", wall_RN), ("cpu", cpu_RN)):
        slowest_N = values_RN.max(axis=0)
        row[clock] = _compare([_blocks(slowest_N, counts, arm_N, arm, setup.block_steps) for arm in range(3)])
    slowest_N = wall_RN.max(axis=0)
    row["flip_step_us"] = {"p50": float(np.median(slowest_N[flips]) * 1e6), "max": float(slowest_N[flips].max() * 1e6)}
    return row


def _blocks(values_N: Float64, counts: NDArray[np.bool_], arm_N: NDArray[Any], arm: int, size: int) -> Float64:
    """[blocks of the arm, steps that count]"""
    chosen: Float64 = values_N[counts & (arm_N == arm)].reshape(-1, size - SETTLE_STEPS)
    return chosen


def _compare(blocks: Sequence[Float64]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    rng = np.random.default_rng(0)
    for percentile in PERCENTILES:
        base, again, migrating = (float(np.percentile(one, percentile)) for one in blocks)
        ratios = [_resampled_ratio(rng, blocks[0], blocks[1], percentile) for _ in range(_BOOTSTRAPS)]
        moving = [_resampled_ratio(rng, blocks[0], blocks[2], percentile) for _ in range(_BOOTSTRAPS)]
        found[f"p{percentile:g}"] = {
            "none_us": base * 1e6,
            "none_again_us": again * 1e6,
            "migrating_us": migrating * 1e6,
            "ratio": migrating / (0.5 * (base + again)),
            "ratio_95": np.percentile(moving, [2.5, 97.5]).tolist(),
            "same_ratio": again / base,
            "same_ratio_95": np.percentile(ratios, [2.5, 97.5]).tolist(),
        }
    found["mean_us"] = {name: float(one.mean() * 1e6) for name, one in zip(ARMS, blocks, strict=True)}
    return found


def _resampled_ratio(rng: np.random.Generator, base: Float64, other: Float64, percentile: float) -> float:
    """Of two arms, by blocks drawn again: steps of one block are no independent samples."""
    one, two = (blocks[rng.integers(len(blocks), size=len(blocks))] for blocks in (base, other))
    return float(np.percentile(two, percentile) / np.percentile(one, percentile))


def _check(answers: list[dict[str, Any]], arrays: list[dict[str, Any]]) -> None:
    for answer in answers:
        if answer["refused"]:
            raise NotMeasured(f"rank {answer['rank']} refused maps: {answer['refused'][:3]}")
        if not answer["num_tokens"] or not answer["experts_moved"] or not answer["moved_bytes"]:
            raise NotMeasured(f"rank {answer['rank']} made {answer['num_tokens']} tokens: nothing moved: {answer}")
    if any(not np.array_equal(arrays[0]["epochs"], one["epochs"]) for one in arrays):
        raise NotMeasured("ranks computed a step with different epochs")


def _run_workers(setup: Setup, arms: list[bool], folder: Path) -> list[dict[str, Any]]:
    channel = secrets.token_hex(16)
    timeout_s = _START_TIMEOUT_S + len(arms) * setup.block_steps * _STEP_S_MAX
    jobs = [
        Job(
            rank=rank,
            world_size=setup.ranks,
            folder=str(folder),
            engine={"model": setup.model, "max_model_len": 1024, "num_kv_blocks": 64 * (setup.batch_size + 1)},
            arms=arms,
            block_steps=setup.block_steps,
            batch_size=setup.batch_size,
            moves_per_map=setup.moves_per_map,
            bytes_per_s=setup.experts_per_s * setup.expert_bytes // setup.ranks,
            source=setup.source,
            seed=setup.seed,
            channel=channel,
        )
        for rank in range(setup.ranks)
    ]
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "switchgear_bench.migration_worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in jobs
    ]
    try:
        for worker, job in zip(workers, jobs, strict=True):
            assert worker.stdin is not None
            worker.stdin.write(msgspec.json.encode(job) + b"\n")
            worker.stdin.flush()
        answers = []
        for rank, worker in enumerate(workers):
            out, _ = worker.communicate(timeout=timeout_s)
            if worker.returncode != 0 or not out:
                raise NotMeasured(f"rank {rank} ended with status {worker.returncode}")
            answers.append(json.loads(out))
        return answers
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
