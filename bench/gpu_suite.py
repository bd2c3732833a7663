"""Builds, checks and times everything that runs on a GPU, in one call: `make test-gpu`, or `python3 bench/gpu_suite.py`.

Needs no virtual environment, no Ray and no network: any Python from 3.11 on with torch for CUDA, pytest, pytest-timeout,
hypothesis, msgspec, msgpack, safetensors, tokenizers and transformers, beside nvcc and CMake; with Triton and CuPy it
measures more. Prints each step's outcome as a table last, and writes it with the hardware's name, anew after every step
and every row: whatever ends it loses nothing. On a machine without a usable GPU, or without a package, it says what is
missing, and ends with status 2.

The steps that tell most come first: the build (for this machine's GPU alone), the kernels' checks, the benchmark, then
every other file of checks, then the sanitizers. `--budget-s` ends it in time: the benchmark gets a part of what is left,
and what does not fit is named as not run.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "runtime" / "switchgear_runtime" / "_native"
SOURCES = [str(ROOT / folder) for folder in ("runtime", "cluster", "bench")]
TESTS = "tests/runtime/cuda"
SANITIZED = "tests/runtime/cuda/test_gpu_kernels.py"
SANITIZERS = ("memcheck", "racecheck", "synccheck")
SANITIZER_FOUND = 86  # its exit status, where it found something
MODULES = (
    "numpy",
    "pytest",
    "pytest_timeout",
    "hypothesis",
    "msgspec",
    "msgpack",
    "safetensors",
    "tokenizers",
    "transformers",
)
BUILD_S = 900.0
CHECK_S = 240.0  # of one file of checks
SANITIZE_S = 1800.0
SANITIZE_SEEDS = 6  # of each check at most
STEP_S_MIN = 20.0  # with less left, nothing more begins
BENCH_PART = 0.7  # of what is left when it begins
LOG = ROOT / "build" / "gpu-step.log"  # what the step's last command wrote
LOG_LINES = 60  # of it, in the result of a step that failed
REPORT = ROOT / "build" / "gpu-tests.xml"
What = Callable[[], tuple[str, bool]]

sys.path[:0] = SOURCES


class Step:
    """A row of the table."""

    def __init__(self, name: str, what: What) -> None:
        self.name = name
        self.what = what
        self.log: list[str] = []
        self.outcome = "not run"
        self.seconds = 0.0
        self.is_good = False

    def run(self) -> bool:
        start_s = time.monotonic()
        LOG.parent.mkdir(exist_ok=True)
        LOG.write_text("")
        try:
            self.outcome, self.is_good = self.what()
        except Exception as error:  # noqa: BLE001 - the bench runs in this process; the other steps' results stay
            self.outcome = f"failed: {type(error).__name__}: {error}"
            with LOG.open("a") as log:
                traceback.print_exc(file=log)
        self.seconds = time.monotonic() - start_s
        if not self.is_good:
            self.log = LOG.read_text(errors="replace").splitlines()[-LOG_LINES:]
            print("\n".join(self.log))
        print(f"== {self.name}: {self.outcome} ({self.seconds:.0f} s)", flush=True)
        return self.is_good

    def row(self) -> dict[str, Any]:
        row = {"step": self.name, "outcome": self.outcome, "passed": self.is_good, "seconds": round(self.seconds, 1)}
        return {**row, "log": self.log} if self.log else row


class Budget:
    """What is left of the suite's time."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._end_s = None if seconds is None else time.monotonic() + seconds

    def left_s(self) -> float | None:
        return None if self._end_s is None else self._end_s - time.monotonic()

    def is_spent(self) -> bool:
        left_s = self.left_s()
        return left_s is not None and left_s < STEP_S_MIN

    def limit(self, timeout_s: float) -> float:
        left_s = self.left_s()
        return timeout_s if left_s is None else min(timeout_s, left_s)


class Results:
    """The file, written anew whenever something is known."""

    def __init__(self, path: Path, machine: dict[str, Any], budget: Budget) -> None:
        self.path = path
        self.machine = machine
        self.budget = budget
        self.steps: list[Step] = []
        self.rows: list[dict[str, Any]] = []

    def write(self) -> None:
        whole = {"machine": self.machine, "steps": [step.row() for step in self.steps], "rows": self.rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps(whole, indent=1))
        beside.replace(self.path)

    def run_steps(self) -> None:
        """In order; without a build there is nothing else to run."""
        for step in self.steps:
            if self.budget.is_spent():
                step.outcome = f"not run: the budget of {self.budget.seconds:.0f} s is spent"
                self.write()
                continue
            step.outcome = "not finished"
            self.write()
            is_good = step.run()
            self.write()
            if step.name == "build" and not is_good:
                return

    def take(self, rows: Iterable[dict[str, Any]]) -> tuple[str, bool]:
        for row in rows:
            self.rows.append(row)
            self.write()
        failed = [row for row in self.rows if "error" in row]
        missed = [row for row in self.rows if row.get("passed") is False]
        outcome = f"{len(self.rows)} rows, {len(failed)} of them failed, {len(missed)} short of their goal"
        return outcome, bool(self.rows) and not failed


def missing(modules: Sequence[str]) -> str | None:
    """Which packages this Python lacks, and how to bring them."""
    names = " ".join(module.replace("_", "-") for module in modules if find_spec(module) is None)
    if not names:
        return None
    python, folder = f"{sys.version_info.major}.{sys.version_info.minor}", "build/gpu-packages"
    return (
        f"{sys.executable} has no {names}; `pip install --target {folder} {names}` and PYTHONPATH={folder} (where there is "
        f"no index: `pip download -d wheels --only-binary :all: --python-version {python} {names}` where there is one, and "
        f"`pip install --no-index --find-links wheels --target {folder} {names}` here)"
    )


def run(command: Sequence[str], *, timeout_s: float) -> int:
    """Its status. Past the limit, it ends with its children: a rank left behind would hold the GPU."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*SOURCES, os.environ.get("PYTHONPATH", "")])}
    with LOG.open("a") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{Path(command[0]).name} took more than {timeout_s:.0f} s") from None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def architecture(capability: tuple[int, int]) -> str:
    """CMake's name of the code that a GPU runs best: its own, where csrc/cuda has some, else PTX of the oldest."""
    return {(9, 0): "90a-real", (10, 0): "100-real"}.get(capability, "80")


def build(capability: tuple[int, int], budget: Budget) -> tuple[str, bool]:
    """All native libraries, into the tree."""
    import torch

    folder = str(ROOT / "build" / "gpu")
    configure = [
        *("cmake", "-S", str(ROOT), "-B", folder, "-DCMAKE_BUILD_TYPE=Release"),
        f"-DTORCH_ROOT={Path(torch.__file__).parent}",
        f"-DCMAKE_INSTALL_PREFIX={NATIVE}",
        f"-DSWITCHGEAR_CUDA_ARCHITECTURES={architecture(capability)}",
    ]
    NATIVE.mkdir(parents=True, exist_ok=True)
    for command in (configure, ["cmake", "--build", folder, "--parallel"], ["cmake", "--install", folder]):
        if run(command, timeout_s=budget.limit(BUILD_S)):
            return f"failed: {' '.join(command[:3])}", False
    is_there = (NATIVE / "libswitchgear_cuda.so").is_file()
    return "built" if is_there else "failed: CMake found no nvcc; set CUDACXX to one", is_there


def gpu_files() -> list[str]:
    """A process of its own for each, since an illegal access ends every later call of its process. Kernels first."""
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / TESTS).glob("test_*.py"))
    return sorted((file for file in files if "pytest.mark.gpu" in (ROOT / file).read_text()), key=SANITIZED.__ne__)


def check(
    tests: str, *, prefix: Sequence[str] = (), options: Sequence[str] = (), timeout_s: float = CHECK_S
) -> tuple[str, bool]:
    """pytest's own counts. A suite in which nothing ran has not passed."""
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.unlink(missing_ok=True)
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        f"--junitxml={REPORT}",
        "-p",
        "no:cacheprovider",
        *("-o", "timeout_method=thread", f"--timeout={0.75 * timeout_s:g}"),  # a signal does not end a wait for the GPU
        *("-o", "filterwarnings=default"),  # of whatever versions are here
        *options,
        tests,
    ]
    status = run([*prefix, *pytest], timeout_s=timeout_s)
    if not REPORT.is_file():
        return f"failed: pytest ended with status {status}", False
    suite = next(ElementTree.parse(REPORT).iter("testsuite"))
    total, skipped, bad = (int(suite.get(name, 0)) for name in ("tests", "skipped", "failures"))
    bad += int(suite.get("errors", 0))
    found = ", the sanitizer found errors" if status == SANITIZER_FOUND else ""
    outcome = f"{total - skipped - bad} passed, {bad} failed, {skipped} skipped{found}"
    return outcome, status == 0 and bad == 0 and total > skipped


def sanitize(tool: str, budget: Budget) -> tuple[str, bool]:
    """The kernels' checks, of fewer seeds: each launch takes many times as long."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).is_file():
        return "not run: there is no compute-sanitizer", False
    prefix = [program, "--tool", tool, "--error-exitcode", str(SANITIZER_FOUND), "--target-processes", "all"]
    options = [f"--most-seeds={SANITIZE_SEEDS}"]
    return check(SANITIZED, prefix=prefix, options=options, timeout_s=budget.limit(SANITIZE_S))


def versions() -> dict[str, str]:
    """Of what the numbers hang on, where it is installed."""
    found = {"python": sys.version.split()[0], "when": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())}
    for name in ("torch", "triton", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    git = shutil.which("git")
    if git is not None and (ROOT / ".git").exists():
        done = subprocess.run(
            [git, "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, timeout=30
        )
        found |= {"commit": done.stdout.strip()} if done.returncode == 0 else {}
    return found


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
    parser.add_argument("--sanitize", action="store_true", help="the kernels' checks under each sanitizer, too")
    parser.add_argument("--only", default="", metavar="WORDS", help="time only the sections whose name has these words")
    parser.add_argument("--gemm-family", default="auto", help="auto, mma or wgmma: what the benchmark's products go by")
    parser.add_argument("--budget-s", type=float, help="end within so many seconds, and name what did not fit")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs ends, too

    lacks = missing(MODULES)
    if lacks:
        print(f"The GPU suite cannot run here:\n  {lacks}", file=sys.stderr)
        return 2

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

    budget = Budget(arguments.budget_s)
    results = Results(arguments.output, {**versions(), **report}, budget)

    def bench() -> tuple[str, bool]:
        from switchgear_bench.gpu_command import run_all

        left_s = budget.left_s()
        budget_s = None if left_s is None else BENCH_PART * left_s
        return results.take(run_all("cuda", budget_s=budget_s, only=arguments.only, gemm_family=arguments.gemm_family))

    def check_file(file: str) -> tuple[str, bool]:
        return check(file, timeout_s=budget.limit(CHECK_S))

    steps = results.steps
    capability = facts.gpus[0].capability
    steps += [Step("build", lambda: build(capability, budget))] if not arguments.no_build else []
    first, *others = (Step(Path(file).stem, functools.partial(check_file, file)) for file in gpu_files())
    steps += [first, *([Step("bench", bench)] if not arguments.no_bench else []), *others]
    steps += [Step(tool, functools.partial(sanitize, tool, budget)) for tool in SANITIZERS if arguments.sanitize]
    results.run_steps()
    if results.rows:
        from switchgear_bench.gpu_command import table as bench_table

        print(bench_table(results.rows))
    print(table(steps))
    return 0 if all(step.is_good for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
