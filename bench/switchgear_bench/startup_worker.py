"""One start of an embedded cluster, timed from outside: `python -m switchgear_bench.startup_worker`, a process a start.

Reads {"model", "settings", "prompts", "start_s"} from stdin, `start_s` being the monotonic clock before this process was
started. Prints one line of JSON: seconds by phase, bytes of memory by process, the tokens, what the ranks logged.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psutil

    from switchgear import LLM

_PSS = re.compile(r"^Pss:\s+(\d+) kB", re.MULTILINE)
_RANK = re.compile(r"switchgear_runtime\.(rank|mpi)_worker|ray::RankActor")
_TIMES = re.compile(r"imported torch in ([\d.]+) s, loaded weights in ([\d.]+) s")
_WEIGHTS = re.compile(r"weights: (\d+) mapped, (\d+) packed, (\d+) private")
_LOG_TIMEOUT_S = 20.0


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """The phases follow one another: import, ready, first token; what a rank does lies within ready."""
    from switchgear import LLM, SamplingParams

    import_s = time.monotonic() - task["start_s"]
    with LLM(task["model"], **task["settings"]) as llm:
        ready_s = time.monotonic() - task["start_s"]
        params = SamplingParams(max_tokens=1, temperature=0.0)
        first = llm.generate(task["prompts"][0], params, use_tqdm=False)
        first_token_s = time.monotonic() - task["start_s"]
        pss_bytes = memory()
        # A start is over when every expert and most of the KV cache have been touched.
        rest = llm.generate(task["prompts"][1:], params, use_tqdm=False) if len(task["prompts"]) > 1 else []
        return {
            "import_s": import_s,
            "ready_s": ready_s,
            "first_token_s": first_token_s,
            "pss_bytes": pss_bytes,
            "pss_bytes_used": memory(),
            "tokens": [output.outputs[0].token_ids for output in [*first, *rest]],
            **rank_report(logs(llm)),
        }


def memory() -> dict[str, list[int]]:
    """Proportional set size of every process of the cluster, this one included; pages that n processes map count 1/n each."""
    import psutil

    driver = psutil.Process()
    found: dict[str, list[int]] = {"driver": [_pss_bytes(driver)], "ranks": [], "launcher": []}
    for process in driver.children(recursive=True):
        kind = "ranks" if _RANK.search(" ".join(process.cmdline())) else "launcher"
        found[kind].append(_pss_bytes(process))
    return found


def _pss_bytes(process: psutil.Process) -> int:
    match = _PSS.search(Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii"))
    assert match, f"no Pss in smaps_rollup of {process}"
    return int(match[1]) << 10


def logs(llm: LLM) -> list[str]:
    cluster, loop = llm._cluster, llm._loop
    return [loop.call(cluster.launcher.log_tail(rank), _LOG_TIMEOUT_S) for rank in range(cluster.config.ranks)]


def rank_report(texts: list[str]) -> dict[str, Any]:
    """The slowest rank's times; how many blobs of weights all ranks mapped, packed and kept in private memory."""
    times = [match for text in texts if (match := _TIMES.search(text))]
    if len(times) != len(texts):
        raise RuntimeError(f"only {len(times)} of {len(texts)} ranks logged how long they took to load")
    counts = [list(map(int, match.groups())) for text in texts if (match := _WEIGHTS.search(text))]
    return {
        "rank_import_s": max(float(match[1]) for match in times),
        "rank_load_s": max(float(match[2]) for match in times),
        "blobs": dict(zip(("mapped", "packed", "private"), map(sum, zip(*counts, strict=True)), strict=False)),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(json.loads(sys.stdin.readline()))) + "\n")
