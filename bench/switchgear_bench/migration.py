"""One question: what does a step cost while experts migrate, against the same step while none do?

Ranks over shared memory decode without a pause, in rounds of three short blocks of steps, an arm each, in random order: no
migration, no migration again (what two equal arms differ by on this machine), and maps applied back to back. All blocks
compute the same tokens. A step's time is from the end of the one before, on the rank where that took longer; the first
steps of a block, which begin its requests, do not count, nor does the first round. Three clocks: wall; the largest
rank's thread CPU time; and the sum over layers of the largest rank's thread CPU time in that layer, which is what counts
where ranks share cores.

What is timed is checked to have happened: experts really arrived, epochs flipped, every block made the same tokens.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from switchgear_bench.migration_compare import ARMS, compare
from switchgear_bench.migration_worker import Job
from switchgear_bench.quiet import quietly

SETTLE_STEPS = 20  # of each block
WARM_ROUNDS = 1
_START_TIMEOUT_S, _STEP_S_MAX = 60.0, 0.1
Float64 = NDArray[np.float64]


class NotMeasured(RuntimeError):
    """What was to be timed did not happen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    model: str
    ranks: int = 2
    steps: int = 10_000  # an arm
    block_steps: int = 500
    batch_size: int = 8  # sequences a rank
    experts_per_s: int = 256  # over all ranks
    moves_per_map: int = 16  # to each rank
    source: str = "auto"
    seed: int = 1
    expert_bytes: int = 0
    lock: Path | None = None  # held while a round is timed

    @property
    def num_rounds(self) -> int:
        return WARM_ROUNDS - (-self.steps // (self.block_steps - SETTLE_STEPS))


def run(setup: Setup) -> dict[str, Any]:
    """One row."""
    rng = np.random.default_rng(setup.seed)
    arms_BA = np.stack([rng.permutation(len(ARMS)) for _ in range(setup.num_rounds)])
    with tempfile.TemporaryDirectory(prefix="bench-migration-") as folder:
        answers = _run_workers(setup, [ARMS[arm] == "migrating" for arm in arms_BA.reshape(-1)], Path(folder))
        arrays = [dict(np.load(Path(folder) / f"rank{rank}.npz")) for rank in range(setup.ranks)]
    _check(answers, arrays)
    clocks = {
        "wall": _slowest(setup, arrays, "ended_s", "began_s"),
        "cpu": _slowest(setup, arrays, "ended_cpu_s", "began_cpu_s"),
        "layers": np.max([one["layer_cpu_ns"] for one in arrays], axis=0).sum(axis=1) * 1e-9,
    }
    flips = np.diff(arrays[0]["epochs"], prepend=0) > 0
    is_migrating_N = np.repeat(arms_BA.reshape(-1) == ARMS.index("migrating"), setup.block_steps)
    migrating_s = float(clocks["wall"][is_migrating_N].sum())
    experts_moved = sum(answer["experts_moved"] for answer in answers)
    row: dict[str, Any] = {
        "ranks": setup.ranks,
        "batch_size": setup.batch_size,
        "rounds": setup.num_rounds - WARM_ROUNDS,
        "steps_per_arm": (setup.num_rounds - WARM_ROUNDS) * (setup.block_steps - SETTLE_STEPS),
        "num_flips": int(flips.sum()),
        "experts_moved": experts_moved,
        "experts_per_s": experts_moved / migrating_s,
        "other_threads_us_per_expert": _other_threads_s(setup, arms_BA, arrays) * 1e6 / experts_moved,
        "moved_bytes_per_s": sum(answer["moved_bytes"] for answer in answers) / migrating_s,
        "source": "host cache" if answers[0]["shares_weights"] and setup.source == "auto" else setup.source,
        "pinned": all(answer["pinned"] for answer in answers),
        "native": all(answer["is_native"] for answer in answers),
    }
    for clock, seconds_N in clocks.items():
        row[clock] = compare(_by_arm(setup, arms_BA, seconds_N))
    slowest_N = clocks["wall"]
    row["flip_step_us"] = {"p50": float(np.median(slowest_N[flips]) * 1e6), "max": float(slowest_N[flips].max() * 1e6)}
    return row


def _slowest(setup: Setup, arrays: Sequence[dict[str, NDArray[Any]]], ended: str, began: str) -> Float64:
    """Of each step, on the rank where it took longer."""
    found = []
    for one in arrays:
        ended_BN = one[ended].reshape(-1, setup.block_steps)
        found.append(np.diff(ended_BN, axis=1, prepend=one[began][:, None]).reshape(-1))
    slowest: Float64 = np.max(found, axis=0)
    return slowest


def _other_threads_s(setup: Setup, arms_BA: NDArray[np.int64], arrays: Sequence[dict[str, NDArray[Any]]]) -> float:
    """CPU time of all but the ranks' step threads in the migrating blocks, beyond what they take in those without."""
    other_BA = np.zeros(arms_BA.shape)
    for one in arrays:
        step_thread_s = one["ended_cpu_s"].reshape(-1, setup.block_steps)[:, -1] - one["began_cpu_s"]
        process_s = one["ended_process_s"] - one["began_process_s"]
        other_BA += (process_s - step_thread_s).reshape(arms_BA.shape)
    migrates_BA = arms_BA == ARMS.index("migrating")
    return float(other_BA[migrates_BA].sum() - other_BA[~migrates_BA].sum() / (len(ARMS) - 1))


def _by_arm(setup: Setup, arms_BA: NDArray[np.int64], seconds_N: Float64) -> dict[str, Float64]:
    """[rounds, steps that count] of each arm."""
    blocks = seconds_N.reshape(setup.num_rounds, len(ARMS), setup.block_steps)[WARM_ROUNDS:, :, SETTLE_STEPS:]
    places = np.argsort(arms_BA, axis=1)[WARM_ROUNDS:]
    rounds = np.arange(len(blocks))
    return {name: blocks[rounds, places[:, arm]] for arm, name in enumerate(ARMS)}


def _check(answers: list[dict[str, Any]], arrays: list[dict[str, Any]]) -> None:
    for answer in answers:
        if answer["refused"]:
            raise NotMeasured(f"rank {answer['rank']} refused maps: {answer['refused'][:3]}")
        if not answer["num_tokens"] or not answer["experts_moved"] or not answer["moved_bytes"]:
            raise NotMeasured(f"rank {answer['rank']} made {answer['num_tokens']} tokens: nothing moved: {answer}")
        if len(set(answer["digests"])) != 1:
            raise NotMeasured(f"rank {answer['rank']}: blocks of the same requests made different tokens")
    if any(not np.array_equal(arrays[0]["epochs"], one["epochs"]) for one in arrays):
        raise NotMeasured("ranks computed a step with different epochs")


def _run_workers(setup: Setup, arms: list[bool], folder: Path) -> list[dict[str, Any]]:
    channel = secrets.token_hex(16)
    engine = {
        "model": setup.model,
        "max_model_len": 1024,
        "num_kv_blocks": 64 * (setup.batch_size + 1),
        "enable_prefix_caching": False,  # a prompt comes in every block
    }
    jobs = [
        Job(
            rank=rank,
            world_size=setup.ranks,
            folder=str(folder),
            engine=engine,
            arms=arms,
            block_steps=setup.block_steps,
            round_blocks=len(ARMS),
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
        _start_rounds(quietly(range(setup.num_rounds), setup.lock), setup, workers, folder)
        answers = []
        for rank, worker in enumerate(workers):
            out, _ = worker.communicate(timeout=_START_TIMEOUT_S)
            if worker.returncode != 0 or not out:
                raise NotMeasured(f"rank {rank} ended with status {worker.returncode}")
            answers.append(json.loads(out))
        return answers
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def _start_rounds(
    rounds: Iterable[int], setup: Setup, workers: Sequence[subprocess.Popen[bytes]], folder: Path
) -> None:
    timeout_s = _START_TIMEOUT_S + len(ARMS) * setup.block_steps * _STEP_S_MAX
    for index in rounds:
        (folder / f"go-{index}").touch()
        deadline_s = time.monotonic() + timeout_s
        while True:
            ended = [rank for rank, worker in enumerate(workers) if worker.poll() is not None]
            if len(list(folder.glob(f"done-{index}-*"))) == setup.ranks:
                break
            if ended or time.monotonic() > deadline_s:
                raise NotMeasured(
                    f"round {index}: ranks {ended} ended" if ended else f"round {index} took {timeout_s:g} s"
                )
            time.sleep(0.1)
