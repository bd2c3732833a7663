"""`switchgear bench transport` end to end, small; and its table."""

from __future__ import annotations

import ctypes
import json
import random
import secrets
from pathlib import Path

import numpy as np
import pytest

from switchgear.cli import main
from switchgear_bench.transport_command import markdown
from switchgear_bench.transport_native import Buffer, library

MPI = Path(__file__).resolve().parents[2] / "build" / "mpi"


def test_checksum_of_the_loops_is_the_sum_of_the_words() -> None:
    seed = secrets.randbits(32)
    random_ = random.Random(seed)
    loops = library()
    for _ in range(50):
        num_bytes, key, iteration = 8 * random_.randrange(1, 3000), random_.getrandbits(64), random_.randrange(10**6)
        buffer = Buffer(num_bytes)
        loops.sg_bench_write(buffer.address, num_bytes, key, iteration, 1)
        words = np.frombuffer(buffer.view, np.uint64)
        expected = int(words.sum(dtype=np.uint64))
        assert loops.sg_bench_checksum(buffer.address, num_bytes) == expected, f"seed={seed}"
        assert loops.sg_bench_expected(num_bytes, key, iteration, 1) == expected, f"seed={seed}"
        assert loops.sg_bench_expected(num_bytes, key, iteration, 0) != expected, f"seed={seed}"
        assert len(np.unique(words)) == len(words), f"seed={seed}"
        ctypes.memset(buffer.address, 0, 8)
        assert loops.sg_bench_checksum(buffer.address, num_bytes) != expected, f"seed={seed}"


@pytest.mark.ranks
def test_bench_transport_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.json"
    sizes = ["--sizes", "64,65536", "--num-repeats", "1", "--mailbox-bytes", "65536"]
    assert main(["bench", "transport", *sizes, "--mpi", str(MPI), "--no-gloo", "--output", str(output)]) == 0
    result = json.loads(output.read_text(encoding="utf-8"))
    cells = {(row["call"], row["num_bytes"], row["contender"]): row for row in result["rows"]}
    for size in (64, 65536):
        for name in ("memcpy", "shm", "shm in place", "shm python"):
            row = cells["all_to_all_v", size, name]
            assert 0 < row["time_us_min"] <= row["time_us"] <= row["time_us_max"]
            assert row["time_us"] < row["written_us"]
        assert cells["all_to_all_v", size, "memcpy"]["ratio_to_memcpy"] == 1.0
    assert cells["all_gather", 64, "shm"]["time_us"] > 0
    assert markdown(result["rows"]) in capsys.readouterr().out
