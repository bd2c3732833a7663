"""Which runtimes `bench serve` starts, and with which settings: for each peer those of its reasonable ones that are fastest here."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from switchgear_bench.serve_worker import Runner
from switchgear_runtime.errors import ConfigError

PRECISIONS = ("bf16", "int8", "int4")
GGUF_FILES = {"bf16": "bf16.gguf", "int8": "q8_0.gguf", "int4": "q4_k_m.gguf"}
OURS = "switchgear"
PEERS_OF_PRECISION: dict[str, tuple[str, ...]] = {
    "bf16": ("llama.cpp", "vllm", "transformers"),
    "int8": ("llama.cpp",),
    "int4": ("llama.cpp",),
}
_MAX_BATCHED_TOKENS = (
    4096  # a whole batch's prompts in one step: all first tokens come together, then it is decode alone
)


def our_runner(model: str, precision: str, num_threads: int, overrides: dict[str, Any]) -> Runner:
    settings: dict[str, Any] = {
        "launcher": "local",
        "ranks": 1,
        "num_threads": num_threads,
        "dtype": "bfloat16",
        "max_num_batched_tokens": _MAX_BATCHED_TOKENS,
        "enable_prefix_caching": False,
    }
    if precision != "bf16":
        settings["quantization"] = precision
    return Runner(
        name=OURS, adapter="switchgear_itself", python=sys.executable, model=model, settings={**settings, **overrides}
    )


def _llama_cpp(folder: Path, precision: str, num_threads: int) -> Runner:
    # Flash attention is ahead of plain attention in every case; a micro-batch as long as the prompt is ahead up to
    # about 512 tokens and behind at 2048.
    return Runner(
        name="llama.cpp",
        adapter="llama_cpp",
        python=sys.executable,
        model=str(folder / GGUF_FILES[precision]),
        settings={
            "binaries": str(folder / "bin"),
            "version": json.loads((folder / "version.json").read_text(encoding="utf-8"))["version"],
            "num_threads": num_threads,
            "prefill_flags": ["-fa", "1", "-ub", "512"],
            "decode_flags": ["-fa", "on", "-ub", "512"],
        },
    )


def _preloaded(folder: Path) -> list[Path]:
    """As vLLM's documentation advises: Intel's OpenMP, which its environment has, and tcmalloc, where the system has it."""
    return [*sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4")), folder / "lib" / "libiomp5.so"]


def _vllm(folder: Path, model: str, num_threads: int) -> Runner:
    return Runner(
        name="vllm",
        adapter="vllm_cpu",
        python=str(folder / "bin" / "python"),
        model=model,
        settings={
            "dtype": "bfloat16",
            "max_model_len": 4096,
            "max_num_seqs": 64,
            "max_num_batched_tokens": _MAX_BATCHED_TOKENS,
        },
        environment={
            "LD_PRELOAD": str(
                folder / "lib" / "libiomp5.so"
            ),  # as vLLM's documentation advises; it is in the environment
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{num_threads - 1}",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        },
    )


def _transformers(folder: Path, model: str, num_threads: int) -> Runner:
    return Runner(
        name="transformers",
        adapter="transformers_peer",
        python=str(folder / "bin" / "python"),
        model=model,
        settings={
            "num_threads": num_threads,
            "dtype": "bfloat16",
            "prefill_experts": "grouped_mm",
            "decode_experts": {"default": "grouped_mm"},
        },
        environment={"HF_HUB_OFFLINE": "1"},
    )


def peer_runners(peers: Path, names: Sequence[str], model: str, precision: str, num_threads: int) -> list[Runner]:
    """Those of `names` that have this precision. One that `make peers` has not set up is a mistake, not a silent gap."""
    runners = []
    for name in names:
        if name not in PEERS_OF_PRECISION[precision]:
            continue
        folder = peers / {"llama.cpp": "llama_cpp", "vllm": "vllm_cpu"}.get(name, name)
        if not folder.is_dir():
            raise ConfigError(f"peer {name!r} is not in {folder}; run `make peers`, or leave it out of --peers")
        if name == "llama.cpp":
            runners.append(_llama_cpp(folder, precision, num_threads))
        elif name == "vllm":
            runners.append(_vllm(folder, model, num_threads))
        else:
            runners.append(_transformers(folder, model, num_threads))
    return runners
