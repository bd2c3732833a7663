"""One question: how long from starting Python to the first token, and how much memory does the cluster then take?

`python -m switchgear_bench.startup MODEL --ranks 1,2` prints a JSON row for each rank count, first with an empty weight
cache (cold, once), then with a full one (warm, medians). Each start is a fresh process (startup_worker.py); the files are
in the page cache. The baseline of every warm start is the cold one before it, whose tokens must be the same.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from switchgear.config import resolve_model, split_settings
from switchgear_bench import machine
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.model.footprint import KV_CACHE_BYTES, dense_bytes, run_dtype, slot_bytes
from switchgear_runtime.model.spec import load_spec

START_TIMEOUT_S = 300.0
PROCESS_BYTES = 300_000_000  # what a process may take beside weights and KV cache
SLACK = 1.1
_TIMES = ("import_s", "ready_s", "first_token_s", "rank_import_s", "rank_load_s")
_NUM_PROMPTS, _PROMPT_TOKENS = 16, 64


def run(
    model: str, ranks: Sequence[int], *, num_repeats: int, settings: dict[str, Any], seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Rows of cells, in the order they are measured. `settings`: keywords of LLM, such as launcher."""
    model = resolve_model(EngineConfig(model=model)).model
    rng, vocab_size = random.Random(seed), load_spec(model).vocab_size
    prompts = [[rng.randrange(vocab_size) for _ in range(_PROMPT_TOKENS)] for _ in range(_NUM_PROMPTS)]
    for num_ranks in ranks:
        with tempfile.TemporaryDirectory(prefix="bench-startup-") as folder:
            task = {
                "model": model,
                "prompts": prompts,
                "settings": {"ranks": num_ranks, "weight_cache_dir": folder, **settings},
            }
            cold = _start(task)
            warm = [_start(task) for _ in range(num_repeats)]
        for start in warm:
            if start["tokens"] != cold["tokens"]:
                raise RuntimeError("a warm start's tokens differ from the cold one's")
            if start["blobs"].get("packed"):
                raise RuntimeError(f"a warm start packed weights: {start['blobs']}")
        yield _row("cold", [cold], cold, task)
        yield _row("warm", warm, cold, task)


def _start(task: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "switchgear_bench.startup_worker"]
    line = json.dumps(task | {"start_s": time.monotonic()}) + "\n"
    done = subprocess.run(command, input=line, stdout=subprocess.PIPE, text=True, timeout=START_TIMEOUT_S, check=True)
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def _row(state: str, starts: list[dict[str, Any]], cold: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    used = starts[-1]["pss_bytes_used"]
    num_processes = len(used["driver"]) + len(used["ranks"])
    weight_bytes, kv_bytes = _bytes_of(task)
    allowed = SLACK * (weight_bytes + kv_bytes) + PROCESS_BYTES * num_processes
    num_bytes = sum(used["driver"]) + sum(used["ranks"])
    first_token_s = median(start["first_token_s"] for start in starts)
    return {
        "num_ranks": task["settings"]["ranks"],
        "launcher": task["settings"].get("launcher", "ray"),
        "weight_cache": state if starts[-1]["blobs"].get("mapped") or starts[-1]["blobs"].get("packed") else "unused",
        **{name: round(median(start[name] for start in starts), 3) for name in _TIMES},
        "first_token_ratio_to_cold": round(first_token_s / cold["first_token_s"], 3),
        "first_token_s_all": [round(start["first_token_s"], 3) for start in starts],
        "pss_bytes": num_bytes,
        "pss_bytes_by_process": used,
        "weight_bytes": weight_bytes,
        "kv_cache_bytes": kv_bytes,
        "num_processes": num_processes,
        "pss_bytes_allowed": int(allowed),
        "pss_fraction_of_allowed": round(num_bytes / allowed, 3),
        "blobs": starts[-1]["blobs"],
        "num_repeats": len(starts),
    }


def _bytes_of(task: dict[str, Any]) -> tuple[int, int]:
    """Weights once, whoever holds them, and the KV caches of all ranks."""
    serve, engine = split_settings({"model": task["model"], **task["settings"]})
    spec = load_spec(engine.model)
    dtype = run_dtype(spec, engine.dtype)
    dense = dense_bytes(spec, dtype, num_positions=engine.max_model_len or spec.max_position_embeddings)
    weights = dense.total + slot_bytes(spec, dtype) * spec.num_experts * spec.num_moe_layers
    return weights, serve.ranks * (engine.kv_cache_memory_bytes or KV_CACHE_BYTES)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="", help="checkpoint directory (default: bundled)")
    parser.add_argument("--ranks", default="1,2", help="rank counts, comma-separated (default: 1,2)")
    parser.add_argument("--launcher", default="local", choices=("local", "ray"), help="default: local")
    parser.add_argument("--num-repeats", type=int, default=5, help="warm starts (default: 5)")
    parser.add_argument("--output", type=Path, help="write header and rows as JSON to this file")
    arguments = parser.parse_args()
    rows = []
    for row in run(
        arguments.model,
        [int(part) for part in arguments.ranks.split(",")],
        num_repeats=arguments.num_repeats,
        settings={"launcher": arguments.launcher},
    ):
        rows.append(row)
        print(json.dumps(row), flush=True)
    if arguments.output:
        text = json.dumps({"header": machine.describe(), "rows": rows}, indent=1)
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
