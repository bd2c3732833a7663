"""Ranks as processes that write into each other's mapped memory: the same tokens on one, two and four, with graphs and flips.

Through the twin, whose device memory is the host's; on a GPU (marker gpu) all ranks on that one, by CUDA IPC.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import device_rank
import pytest
from tiny_cluster import make_tiny_checkpoint
from usable_gpu import skip_without_gpu

HERE = Path(__file__).parent
TIMEOUT_S = 50.0  # of one number of ranks: three of them within a test's own limit
SEED = random.SystemRandom().randrange(1 << 30)


@pytest.fixture(scope="module", params=["twin", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        skip_without_gpu()
    kind: str = request.param
    return kind


def run_processes(
    model_dir: Path, device: str, world_size: int, requests: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    channel = secrets.token_hex(16)
    path = os.pathsep.join(sys.path)
    environment = os.environ | {"PYTHONPATH": path, "CUDA_MODULE_LOADING": "EAGER"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(device_rank.__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for _ in range(world_size)
    ]
    try:
        for rank, process in enumerate(ranks):
            job = {
                "rank": rank,
                "world_size": world_size,
                "model": str(model_dir),
                "device": device,
                "settings": {},
                "channel": channel,
                "seed": SEED,
                "requests": requests[rank::world_size],
            }
            assert process.stdin is not None
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        answers = []
        deadline_s = time.monotonic() + TIMEOUT_S
        for rank, process in enumerate(ranks):
            out, _ = process.communicate(timeout=max(1.0, deadline_s - time.monotonic()))
            assert process.returncode == 0, f"rank {rank} of {world_size} ended with status {process.returncode}"
            answers.append(json.loads(out))
        return answers
    finally:
        for process in ranks:
            process.kill()
            process.wait()


@pytest.mark.ranks
@pytest.mark.timeout(170)  # also where a run has a shorter limit for most
def test_one_two_and_four_ranks(device: str, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    model_dir = make_tiny_checkpoint(tmp_path, SEED)
    requests = [
        {
            "sequence_id": number,
            "prompt": [rng.randrange(96) for _ in range(rng.randrange(1, 30))],
            "max_tokens": rng.randrange(8, 30),
            "temperature": rng.choice([0.0, 1.0]),
            "seed": rng.randrange(1 << 63),
        }
        for number in range(12)
    ]
    expected: dict[str, list[int]] | None = None
    for world_size in (1, 2, 4):
        answers = run_processes(model_dir, device, world_size, requests)
        assert not [failure for answer in answers for failure in answer["failures"]], f"seed {SEED}"
        tokens = {name: given for answer in answers for name, given in answer["tokens"].items()}
        assert all(answer["last_epoch"] == device_rank.NUM_MAPS for answer in answers)
        assert all(answer["num_replays"] > 0 for answer in answers), answers
        assert all(tokens.values())
        expected = expected or tokens
        assert tokens == expected, f"seed {SEED}, {world_size} ranks"
