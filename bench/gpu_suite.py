"""Builds, checks and times everything that runs on a GPU, in one call: `make test-gpu`, or `python3 bench/gpu_suite.py`.

Needs no virtual environment, no installation of this repository, no Ray and no network: any Python from 3.11 on with torch
for CUDA, pytest, pytest-timeout, hypothesis, msgspec, msgpack, safetensors, tokenizers and transformers, beside nvcc and
CMake; with Triton and CuPy it measures more. On a machine without a usable GPU, or without a package, it says what is
missing, and ends with status 2; 1 says that a step failed or did not run.

Everything it finds lies beside `--output`, and is written as soon as it is known: NAME.json (steps, rows, the hardware's
name), NAME.log (all that was printed), NAME-tests.xml (JUnit) and NAME-rows.jsonl. Whatever ends the suite loses nothing.

The steps that tell most come first: the build for this machine's GPU, the kernels' checks, the benchmark's most telling
sections, the device engine's checks, then the rest, then the sanitizers. `--budget-s` ends it in time; what was cut or did
not fit is named so, and has not failed.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [str(ROOT / folder) for folder in ("runtime", "cluster", "bench")]
sys.path[:0] = SOURCES

from switchgear_bench.suite.budget import Budget  # noqa: E402 - from the checkout, which need not be installed
from switchgear_bench.suite.build import Build  # noqa: E402
from switchgear_bench.suite.checks import FILE_S, FILE_S_MIN, Checks  # noqa: E402
from switchgear_bench.suite.log import Log  # noqa: E402
from switchgear_bench.suite.sections import SECTION_S, SECTION_S_MIN, Sections  # noqa: E402
from switchgear_bench.suite.steps import Outcome, Results, Status, Step  # noqa: E402
from switchgear_bench.suite.surroundings import MODULES, missing, versions  # noqa: E402

TESTS = "tests/runtime/cuda"
KERNELS = "tests/runtime/cuda/test_gpu_kernels.py"
ENGINE = "tests/runtime/cuda/test_device_engine.py"
NEED_BINDING = (
    ENGINE,
    "tests/runtime/cuda/test_small_steps_processes.py",
)  # compare with the CPU engine, or sample there
FIRST_SECTIONS = ("moving rows", "moe layer Qwen3-30B-A3B uniform", "engine steps")
SECOND_SECTIONS = ("moe layer DeepSeek-V3 uniform",)
SANITIZERS = ("memcheck", "racecheck", "synccheck")
KERNELS_S_MIN = 45.0
PART_MAX = 0.3  # of a budget, for one section or file: a hang leaves time for others


def gpu_files(words: str = "") -> list[str]:
    """Those with checks for a GPU whose names have these words: kernels, the engine, the rest."""
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / TESTS).glob("test_*.py"))
    found = [file for file in files if "pytest.mark.gpu" in (ROOT / file).read_text() and words in Path(file).stem]
    return sorted(found, key=lambda file: (file != KERNELS, file != ENGINE))


class Suite:
    """Its steps, by what is asked for."""

    def __init__(self, arguments: argparse.Namespace, results: Results, build: Build, sections: Sequence[str]) -> None:
        output: Path = arguments.output
        self._results = results
        self._build = build
        self._checks = Checks(results.log, results.budget, output.with_name(f"{output.stem}-tests.xml"))
        self._sections = Sections(
            results, output.with_name(f"{output.stem}-rows.jsonl"), gemm_family=arguments.gemm_family
        )
        self._has_binding = True
        self._section_names = list(sections)
        self._files = [] if arguments.no_checks else gpu_files(arguments.checks)
        built = [] if arguments.no_build else self._builds(arguments)
        results.steps += [*built, *self._tells_most(), *self._rest()]
        results.steps += [
            Step(tool, functools.partial(self._sanitize, tool)) for tool in SANITIZERS if arguments.sanitize
        ]

    def _builds(self, arguments: argparse.Namespace) -> list[Step]:
        def libraries() -> Outcome:
            outcome = self._build.libraries()
            self._results.machine.update(machine(arguments.commit))
            return outcome

        def binding() -> Outcome:
            outcome = self._build.binding()
            self._has_binding = outcome.status is Status.PASSED
            return outcome

        return [Step("build", libraries, is_vital=True), Step("build of torch's binding", binding)]

    def _tells_most(self) -> list[Step]:
        return [*self._steps_of(KERNELS), *self._timed(FIRST_SECTIONS), *self._steps_of(ENGINE)]

    def _rest(self) -> list[Step]:
        second = self._timed(SECOND_SECTIONS)
        files = [step for file in self._files if file not in (KERNELS, ENGINE) for step in self._steps_of(file)]
        known = (*FIRST_SECTIONS, *SECOND_SECTIONS)
        return [*second, *files, *self._timed([name for name in self._section_names if name not in known])]

    def _timed(self, names: Sequence[str]) -> list[Step]:
        return [
            Step(f"bench {name}", functools.partial(self._bench, name), SECTION_S_MIN)
            for name in names
            if name in self._section_names
        ]

    def _steps_of(self, file: str) -> list[Step]:
        if file not in self._files:
            return []
        needs_s = KERNELS_S_MIN if file == KERNELS else FILE_S_MIN
        return [Step(Path(file).stem, functools.partial(self._check, file), needs_s)]

    def _bench(self, name: str) -> Outcome:
        return self._sections.run(name, timeout_s=self._part(SECTION_S, SECTION_S_MIN))

    def _check(self, file: str) -> Outcome:
        if file == KERNELS:
            return self._checks.kernels(file)
        if file in NEED_BINDING and not self._has_binding:
            return Outcome(Status.LEFT_OUT, "not run: it needs torch's binding, which was not built")
        return self._checks.file(file, timeout_s=self._part(FILE_S, FILE_S_MIN))

    def _part(self, timeout_s: float, least_s: float) -> float:
        seconds = self._results.budget.seconds
        return timeout_s if seconds is None else min(timeout_s, max(least_s, PART_MAX * seconds))

    def _sanitize(self, tool: str) -> Outcome:
        program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not Path(program).is_file():
            return Outcome(Status.LEFT_OUT, "not run: there is no compute-sanitizer")
        return self._checks.sanitize(KERNELS, program, tool)


def machine(commit: str | None) -> dict[str, Any]:
    from switchgear_runtime.cuda.facts import gather_facts
    from switchgear_runtime.cuda.report import gpu_report

    return {**versions(commit), **gpu_report(gather_facts())}


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    output = ROOT / "build" / "gpu.json"
    parser.add_argument("--output", type=Path, default=output, help="the JSON; log, JUnit file and rows go beside it")
    parser.add_argument("--no-build", action="store_true", help="take the libraries that are there")
    parser.add_argument("--no-bench", action="store_true", help="time nothing")
    parser.add_argument(
        "--no-checks", action="store_true", help="check nothing but what sanitizers and the benchmark do"
    )
    parser.add_argument("--sanitize", action="store_true", help="the kernels' checks under each sanitizer, too")
    parser.add_argument("--gemm-family", default="auto", help="auto, mma or wgmma: what the benchmark's products go by")
    parser.add_argument("--only", default="", metavar="WORDS", help="time only the sections whose name has these words")
    parser.add_argument(
        "--checks", default="", metavar="WORDS", help="only the files of checks with these words in the name"
    )
    parser.add_argument("--budget-s", type=float, help="end within so many seconds, and name what did not fit")
    parser.add_argument("--commit", help="what the results are of, where there is no .git to tell it")
    arguments = parser.parse_args(given)
    arguments.output = arguments.output.resolve()
    return arguments


def refused(arguments: argparse.Namespace, names: Sequence[str]) -> str | None:
    """Words that choose nothing: said before the build."""
    if not any(arguments.only in name for name in names):
        return f"--only {arguments.only!r} names none of the sections: {', '.join(names)}"
    if not gpu_files(arguments.checks):
        return f"--checks {arguments.checks!r} names none of the files: {', '.join(Path(file).stem for file in gpu_files())}"
    return None


def unusable(arguments: argparse.Namespace) -> str | None:
    """Why nothing can run here; what stands in the way of some checks alone is printed."""
    lacks = missing(MODULES)
    if lacks:
        return lacks
    from switchgear_bench.gpu_command import section_names
    from switchgear_runtime.cuda.facts import gather_facts
    from switchgear_runtime.cuda.preflight import device_obstacles, obstacles

    words = refused(arguments, section_names("cuda"))
    if words:
        return words
    facts = gather_facts()
    print("\n".join(f"{name:<14}{value}" for name, value in machine(arguments.commit).items()), flush=True)
    found = device_obstacles(facts, built=arguments.no_build)
    if found:
        return "\n  ".join(map(str, found))
    others = [obstacle for obstacle in obstacles(facts, nccl=True) if obstacle not in device_obstacles(facts)]
    for obstacle in others:
        print(f"Some checks will be left out: {obstacle}", flush=True)
    return None


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse(given)
    budget = Budget(arguments.budget_s)
    os.environ["PYTHONPATH"] = os.pathsep.join([*SOURCES, os.environ.get("PYTHONPATH", "")])  # for all that it starts
    stop: Callable[..., None] = lambda number, _: sys.exit(128 + number)  # noqa: E731 - so that what runs ends, too
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    why = unusable(arguments)
    if why is not None:
        print(f"The GPU suite cannot run here:\n  {why}", file=sys.stderr)
        return 2

    from switchgear_bench.gpu_command import section_names, table
    from switchgear_runtime.cuda.facts import gather_facts

    log = Log(arguments.output.with_suffix(".log"))
    results = Results(arguments.output, machine(arguments.commit), budget, log)
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    build = Build(gather_facts().gpus[0].capability, Path(spec.origin).parent, log, budget)
    sections = [] if arguments.no_bench else [name for name in section_names("cuda") if arguments.only in name]
    Suite(arguments, results, build, sections)
    try:
        results.run_steps()
    finally:
        results.write()
        if results.rows:
            print(table(results.rows))
        print(results.table(), flush=True)
    return 0 if all(step.is_good for step in results.steps) else 1


if __name__ == "__main__":
    sys.exit(main())
