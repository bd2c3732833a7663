"""A layer's rows to the experts of all ranks and back, in `bench gpu`: microseconds, of ranks that share one device.

Both ways of the engine: through peer memory by kernels alone (PeerGroup, of small steps), and by whatever exchange the
ranks have (FlatDispatch), where the host learns how much goes where. Ranks are processes, as in an engine; the experts give
back what they got, which is compared. Processes on one GPU run by turns, so these times hold what the driver takes to go
from one to the next: they say that it works and how it grows, not what several GPUs would do. The bound is the bytes that
all ranks together read and write.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from switchgear_bench.gpu_clock import Bounds
from switchgear_bench.gpu_layer import DEEPSEEK, TINY

NUM_RANKS = (2, 4)
SMALL_TOKENS, LARGE_TOKENS = (1, 16, 128), (128, 2048)  # of each rank
_DEADLINE_S = 120.0
_RANK = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])  # this process's: the packages may not be installed
from switchgear_bench.gpu_exchange_worker import main
main(json.loads(sys.argv[2]))
"""


def exchanges(device: str, bounds: Bounds, *, is_small: bool, gemm_family: str) -> Iterator[dict[str, Any]]:
    """A row for each number of ranks, way and number of tokens."""
    shape = TINY if is_small else DEEPSEEK
    small, large = ((1, 8), (8,)) if is_small else (SMALL_TOKENS, LARGE_TOKENS)
    for num_ranks in (2,) if is_small else NUM_RANKS:
        for answer in run_ranks(num_ranks, device, {"small": small, "large": large, "gemm_family": gemm_family}):
            num_tokens = answer["num_tokens"]
            num_pairs = num_tokens * shape.top_k
            # Tokens read and rows written; each result read and written, read again, and the sum written.
            values = 4 * num_tokens + 2 * answer["num_rows"] + 3 * 2 * num_pairs + 4 * num_tokens
            yield {
                "kernel": "exchange",
                "shape": f"{num_ranks} ranks, one device",
                "variant": answer["over"],
                "num_tokens": num_tokens,
                **bounds.row(num_ranks * values * shape.hidden, 0.0, answer["seconds"]),
                "baseline": None,
                "baseline_us": None,
                "ratio_to_baseline": None,
                "graph": False,
            }


def run_ranks(num_ranks: int, device: str, given: dict[str, Any]) -> list[dict[str, Any]]:
    """What rank 0 measured. A rank that fails or hangs ends all, by a RuntimeError with what it wrote."""
    channel = f"bench-{secrets.token_hex(8)}"
    deadline_s = time.monotonic() + _DEADLINE_S
    with ExitStack() as stack:
        ranks = []
        for rank in range(num_ranks):
            settings = {"rank": rank, "world_size": num_ranks, "channel": channel, "device": device, **given}
            command = [sys.executable, "-c", _RANK, json.dumps(sys.path), json.dumps(settings)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            stack.callback(_end, process)
            ranks.append(process)
        said = []
        for rank, process in enumerate(ranks):
            try:
                said.append(process.communicate(timeout=max(1.0, deadline_s - time.monotonic())))
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"rank {rank} of {num_ranks} did not finish within {_DEADLINE_S:.0f} s") from None
        wrong = [
            f"rank {rank} of {num_ranks}: {' | '.join(text.splitlines()[-2:])}"
            for rank, (process, (_, text)) in enumerate(zip(ranks, said, strict=True))
            if process.returncode
        ]
        if wrong:
            raise RuntimeError("; ".join(wrong))
    return [json.loads(line) for line in said[0][0].splitlines()]


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()
