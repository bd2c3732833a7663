"""Builds, checks and times everything that runs on a GPU, in one call: `make test-gpu`, or `python3 bench/gpu_suite.py`.

Needs no virtual environment, no Ray and no network: any Python from 3.11 on with torch for CUDA, pytest, pytest-timeout,
hypothesis, msgspec, msgpack, safetensors, tokenizers and transformers, beside nvcc and CMake. Prints each step's outcome
as a table last, and writes it with the hardware's name. On a machine without a usable GPU it says what is missing, and
ends with status 2.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "runtime" / "switchgear_runtime" / "_native"
SOURCES = [str(ROOT / folder) for folder in ("runtime", "cluster", "bench")]
TESTS = "tests/runtime/cuda"
SANITIZED = "tests/runtime/cuda/test_gpu_kernels.py"
SANITIZERS = ("memcheck", "racecheck")
SANITIZER_FOUND = 86  # its exit status, where it found something

sys.path[:0] = SOURCES


class Step:
    """A row of the table."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.outcome = "not run"
        self.seconds = 0.0
        self.is_good = False

    def run(self, what: Any) -> bool:
        start_s = time.monotonic()
        try:
            self.outcome, self.is_good = what()
        except (OSError, subprocess.SubprocessError) as error:
            self.outcome = f"failed: {error}"
        self.seconds = time.monotonic() - start_s
        print(f"== {self.name}: {self.outcome} ({self.seconds:.0f} s)", flush=True)
        return self.is_good

    def row(self) -> dict[str, Any]:
        return {"step": self.name, "outcome": self.outcome, "passed": self.is_good, "seconds": round(self.seconds, 1)}


def run(command: Sequence[str], *, timeout_s: float) -> int:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*SOURCES, os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, cwd=ROOT, env=environment, timeout=timeout_s, check=False).returncode


def build() -> tuple[str, bool]:
    """All native libraries, into the tree."""
    import torch

    folder = str(ROOT / "build" / "gpu")
    configure = [
        *("cmake", "-S", str(ROOT), "-B", folder, "-DCMAKE_BUILD_TYPE=Release"),
        f"-DTORCH_ROOT={Path(torch.__file__).parent}",
        f"-DCMAKE_INSTALL_PREFIX={NATIVE}",
    ]
    NATIVE.mkdir(parents=True, exist_ok=True)
    for command in (configure, ["cmake", "--build", folder, "--parallel"], ["cmake", "--install", folder]):
        if run(command, timeout_s=900):
            return f"failed: {' '.join(command[:3])}", False
    is_there = (NATIVE / "libswitchgear_cuda.so").is_file()
    return "built" if is_there else "failed: CMake found no nvcc; set CUDACXX to one", is_there


def check(tests: str, *, prefix: Sequence[str] = (), timeout_s: float = 1800) -> tuple[str, bool]:
    """pytest's own counts. A suite in which nothing ran has not passed."""
    report = ROOT / "build" / "gpu-tests.xml"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        f"--junitxml={report}",
        "-p",
        "no:cacheprovider",
        tests,
    ]
    status = run([*prefix, *pytest], timeout_s=timeout_s)
    if not report.is_file():
        return f"failed: pytest ended with status {status}", False
    suite = next(ElementTree.parse(report).iter("testsuite"))
    total, skipped, bad = (int(suite.get(name, 0)) for name in ("tests", "skipped", "failures"))
    bad += int(suite.get("errors", 0))
    found = ", the sanitizer found errors" if status == SANITIZER_FOUND else ""
    outcome = f"{total - skipped - bad} passed, {bad} failed, {skipped} skipped{found}"
    return outcome, status == 0 and bad == 0 and total > skipped


def sanitize(tool: str) -> tuple[str, bool]:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).is_file():
        return "not run: there is no compute-sanitizer", False
    prefix = [program, "--tool", tool, "--error-exitcode", str(SANITIZER_FOUND), "--target-processes", "all"]
    return check(SANITIZED, prefix=prefix, timeout_s=3000)


def table(steps: Sequence[Step]) -> str:
    width = max(len(step.name) for step in steps)
    return "\n".join(
        f"{step.name:<{width}}  {'ok ' if step.is_good else 'BAD'}  {step.seconds:7.0f} s  {step.outcome}"
        for step in steps
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu.json", help="where the JSON goes")
    parser.add_argument("--no-build", action="store_true", help="take the libraries that are there")
    parser.add_argument("--no-bench", action="store_true", help="time nothing")
    parser.add_argument("--sanitize", action="store_true", help="the kernels' checks under memcheck and racecheck, too")
    arguments = parser.parse_args()

    from switchgear_runtime.cuda.facts import gather_facts
    from switchgear_runtime.cuda.preflight import obstacles
    from switchgear_runtime.cuda.report import gpu_report

    facts = gather_facts()
    report = gpu_report(facts)
    print("\n".join(f"{name:<14}{value}" for name, value in report.items()), flush=True)
    found = [
        obstacle for obstacle in obstacles(facts, nccl=False) if arguments.no_build or "kernels" not in obstacle.what
    ]
    if found:
        print("\n".join(["The GPU suite cannot run here:", *(f"  {obstacle}" for obstacle in found)]), file=sys.stderr)
        return 2

    steps = [Step("build")] if not arguments.no_build else []
    steps += [Step("checks")]
    steps += [Step(tool) for tool in SANITIZERS if arguments.sanitize]
    rows: list[dict[str, Any]] = []

    def bench() -> tuple[str, bool]:
        from switchgear_bench.gpu_command import run_all
        from switchgear_bench.gpu_command import table as bench_table

        rows.extend(run_all("cuda"))
        print(bench_table(rows), flush=True)
        return f"{len(rows)} rows", bool(rows)

    whats: dict[str, Any] = {"build": build, "checks": lambda: check(TESTS), "bench": bench}
    whats |= {tool: lambda tool=tool: sanitize(tool) for tool in SANITIZERS}
    steps += [Step("bench")] if not arguments.no_bench else []
    for step in steps:
        if not step.run(whats[step.name]) and step.name == "build":
            break
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": {"python": sys.version.split()[0], **report}, "steps": [s.row() for s in steps], "rows": rows}
    arguments.output.write_text(json.dumps(result, indent=1))
    print(table(steps))
    return 0 if all(step.is_good for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
