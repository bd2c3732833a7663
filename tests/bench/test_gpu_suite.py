"""The GPU suite's own machinery, where there is no GPU: what is missing, what is kept, what cannot hang, in which order."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from switchgear_bench.gpu_command import section_names
from switchgear_bench.suite import build as build_module
from switchgear_bench.suite.budget import Budget
from switchgear_bench.suite.build import LEFT_OUT, Build, architecture
from switchgear_bench.suite.log import Log
from switchgear_bench.suite.processes import ROOT, End, Job, run, run_all
from switchgear_bench.suite.sections import Sections
from switchgear_bench.suite.steps import Outcome, Results, Status, Step
from switchgear_bench.suite.surroundings import commit_of_files, missing, versions

PATH = ROOT / "bench" / "gpu_suite.py"


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("gpu_suite", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "gpu.log")


@pytest.fixture
def results(tmp_path: Path, log: Log) -> Results:
    return Results(tmp_path / "out" / "gpu.json", {"GPUs": "none"}, Budget(None), log)


def good() -> Outcome:
    return Outcome(Status.PASSED, "fine")


def texts(results: Results) -> list[str]:
    return [step.outcome.text for step in results.steps]


def test_what_is_missing_is_named_with_its_fix() -> None:
    assert missing(["json", "pytest"]) is None
    text = missing(["json", "no_such_module"])
    assert text is not None
    assert "has no no-such-module." in text
    assert "where there is no network, on another machine" in text
    assert "PYTHONPATH=gpu-packages" in text


def test_it_needs_no_package_to_say_what_is_missing() -> None:
    done = subprocess.run([sys.executable, "-S", str(PATH)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert "pip install --target gpu-packages" in done.stderr
    assert "msgspec" in done.stderr


def test_a_failure_loses_nothing(results: Results) -> None:
    def read() -> dict[str, Any]:
        whole: dict[str, Any] = json.loads(results.path.read_text())
        return whole

    def fails() -> Outcome:
        results.add([{"kernel": "dispatch"}])
        kept = read()
        assert kept["rows"] == [{"kernel": "dispatch"}]
        assert [step["outcome"] for step in kept["steps"]] == ["fine", "not finished", "not run"]
        raise RuntimeError("an illegal memory access")

    results.steps += [Step("build", good), Step("bench", fails), Step("after", good)]
    results.run_steps()
    kept = read()
    assert kept["rows"] == [{"kernel": "dispatch"}]
    assert [step["outcome"] for step in kept["steps"]] == [
        "fine",
        "failed: RuntimeError: an illegal memory access",
        "fine",
    ]
    assert "in fails" in "".join(kept["steps"][1]["log"])
    assert "===== bench" in results.log.path.read_text()


def test_nothing_runs_without_a_build(results: Results) -> None:
    results.steps += [
        Step("build", lambda: Outcome(Status.FAILED, "no nvcc"), is_vital=True),
        Step("after", good),
    ]
    results.run_steps()
    assert texts(results) == ["no nvcc", "not run"]


def test_what_does_not_fit_is_not_begun_and_has_not_failed(tmp_path: Path, log: Log) -> None:
    budget = Budget(100.0)
    assert budget.limit(5.0) == 5.0
    assert budget.limit(500.0) <= 100.0
    assert budget.cuts(500.0)
    results = Results(tmp_path / "gpu.json", {}, budget, log)

    def slow() -> Outcome:
        assert budget._end_s is not None
        budget._end_s -= 50.0
        return good()

    results.steps += [Step("first", slow), Step("long", good, 60.0), Step("short", good, 20.0)]
    results.run_steps()
    assert texts(results) == ["fine", "not run: it needs 60 s of the budget of 100 s", "fine"]
    assert results.steps[1].outcome.status is Status.LEFT_OUT
    assert [line.split()[1] for line in results.table().splitlines()] == ["ok", "-", "ok"]


def test_a_command_past_its_limit_ends(log: Log) -> None:
    job = run(["sleep", "60"], timeout_s=0.2, log=log, budget=Budget(None))
    assert (job.end, job.status) == (End.LATE, None)
    jobs = [Job(["sleep", "60"], 50.0) for _ in range(3)]
    run_all(jobs, num_at_once=2, log=log, budget=Budget(10.5))  # of which 5 are kept, and 5 are too few to begin
    assert [job.end for job in jobs] == [End.CUT, End.CUT, End.NONE_YET]
    assert all(job.is_cut for job in jobs)


def test_no_process_is_left_behind(log: Log) -> None:
    """Not even of a command that ended well; and they belong to this session, so that who ends it ends them."""
    code = "import os, subprocess; print(os.getsid(0), subprocess.Popen(['sleep', '60'], stdout=2).pid)"
    job = run([sys.executable, "-c", code], timeout_s=30.0, log=log, budget=Budget(None))
    assert job.status == 0
    session, child = map(int, job.said()[0].split())
    assert session == os.getsid(0)
    deadline_s = time.monotonic() + 10.0
    while Path(f"/proc/{child}").exists() and "(sleep) Z" not in Path(f"/proc/{child}/stat").read_text():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_all_that_is_printed_is_kept_within_bounds(tmp_path: Path) -> None:
    log = Log(tmp_path / "log", 1000)
    commands = [["sh", "-c", f"for i in $(seq 50); do echo {name} $i; done"] for name in ("one", "two")]
    jobs = [Job(command, 30.0, command[2][-30:]) for command in commands]
    run_all(jobs, num_at_once=2, log=log, budget=Budget(None))
    assert [job.said(1) for job in jobs] == [["one 50"], ["two 50"]]
    assert log.path.read_text().count("\n") > 100
    log.write(bytes(2000))
    assert log.path.stat().st_size < 1100
    assert log.path.read_text().endswith("[the log is full]\n")


def test_a_section_runs_in_a_process_of_its_own(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    sections = Sections(results, results.path.with_suffix(".jsonl"), device="twin")
    outcome = sections.run("moving rows", timeout_s=120.0)
    assert outcome.status is Status.PASSED, outcome
    assert {row["kernel"] for row in results.rows} == {"dispatch", "combine", "pack fp8", "unpack fp8"}
    assert json.loads(results.path.read_text())["rows"] == results.rows
    outcome = sections.run("no such", timeout_s=120.0)
    assert outcome.status is Status.FAILED
    assert "ended with status 1" in outcome.text
    assert any("names none of the sections" in line for line in outcome.log)
    outcome = sections.run("moving rows", timeout_s=0.1)
    assert outcome.status is Status.FAILED
    assert results.rows[-1]["left_out"] == ["what is left of moving rows"]


def arguments_of(suite: ModuleType, *words: str) -> argparse.Namespace:
    parsed: argparse.Namespace = suite.parse(list(words))
    return parsed


def names_of(suite: ModuleType, results: Results, *words: str) -> list[str]:
    arguments = arguments_of(suite, "--output", str(results.path), *words)
    names = [name for name in section_names("cuda") if arguments.only in name]
    build = Build((9, 0), Path(), results.log, results.budget)
    results.steps.clear()
    suite.Suite(arguments, results, build, [] if arguments.no_bench else names)
    return [step.name for step in results.steps]


def test_what_tells_most_comes_first(suite: ModuleType, results: Results) -> None:
    names = names_of(suite, results)
    assert names[:7] == [
        "build",
        "build of torch's binding",
        "test_gpu_kernels",
        "bench moving rows",
        "bench moe layer Qwen3-30B-A3B uniform",
        "bench engine steps",
        "test_device_engine",
    ]
    assert {f"bench {name}" for name in section_names("cuda")} < set(names)
    assert {"test_nccl", "test_fp8", "test_small_steps_processes"} < set(names)
    assert len(names) == len(set(names))
    assert all(step.needs_s >= 60.0 for step in results.steps if step.name in ("test_nccl", "test_device_engine"))
    chosen = names_of(suite, results, "--no-build", "--only", "DeepSeek", "--checks", "engine", "--sanitize")
    assert chosen[0] == "test_device_engine"
    assert chosen[1:3] == ["bench moe layer DeepSeek-V3 uniform", "bench moe layer DeepSeek-V3 with router, skewed"]
    assert chosen[3:] == ["memcheck", "racecheck", "synccheck"]
    assert names_of(suite, results, "--no-build", "--no-checks", "--only", "moving") == ["bench moving rows"]


def test_words_that_choose_nothing_are_said_before_the_build(suite: ModuleType) -> None:
    names = section_names("cuda")
    assert suite.refused(arguments_of(suite), names) is None
    assert "names none of the sections: moving rows" in suite.refused(arguments_of(suite, "--only", "x y"), names)
    text = suite.refused(arguments_of(suite, "--checks", "x y"), names)
    assert "names none of the files: test_gpu_kernels, test_device_engine" in text


def test_without_the_binding_what_needs_it_is_left_out(suite: ModuleType, results: Results) -> None:
    names_of(suite, results, "--no-bench", "--checks", "engine")
    build_step, binding, engine = results.steps
    results.steps[:] = [engine]
    arguments = arguments_of(suite, "--output", str(results.path))
    build = Build((9, 0), Path(), results.log, results.budget)
    build.binding = lambda: Outcome(Status.FAILED, "failed")  # type: ignore[method-assign]
    results.steps.clear()
    suite.Suite(arguments, results, build, [])
    chosen = {step.name: step for step in results.steps}
    chosen[binding.name].run(results.log)
    chosen[engine.name].run(results.log)
    assert chosen[engine.name].outcome.status is Status.LEFT_OUT
    assert "it needs torch's binding" in chosen[engine.name].outcome.text
    assert build_step.is_vital
    assert not binding.is_vital


def test_it_builds_for_the_gpu_that_is_there() -> None:
    assert [architecture(pair) for pair in ((9, 0), (10, 0), (8, 0), (12, 0))] == ["90a-real", "100-real", "80", "80"]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Sequence[str]]]:
    """What Build runs; all of it succeeds, and a library is there."""
    ran: list[Sequence[str]] = []

    def note(command: Sequence[str], **_: Any) -> Job:
        ran.append(command)
        return Job(command, 1.0, end=End.BY_ITSELF, status=0)

    monkeypatch.setattr(build_module, "run", note)
    monkeypatch.setattr(build_module, "NATIVE", tmp_path)
    (tmp_path / "libswitchgear_cuda.so").touch()
    return ran


def test_the_build_uses_all_cores_and_the_binding_comes_after(
    commands: list[Sequence[str]], log: Log, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    programs = {"cmake": "/opt/cmake", "ninja": "/opt/ninja"}
    monkeypatch.setattr(build_module, "tool", programs.get)
    monkeypatch.setattr(build_module, "FOLDER", tmp_path / "build")
    build = Build((9, 0), Path("/opt/torch"), log, Budget(None))
    assert build.libraries().status is Status.PASSED
    configure, make, install = commands
    assert configure[0] == "/opt/cmake"
    assert configure[-3:] == ["-G", "Ninja", "-DCMAKE_MAKE_PROGRAM=/opt/ninja"]
    assert make[make.index("--parallel") + 1] == str(len(os.sched_getaffinity(0)))
    assert "switchgear_cuda" in make
    assert "switchgear_torch" not in make
    assert install[-1] == "Unspecified"
    assert build.binding().status is Status.PASSED
    assert "switchgear_torch" in commands[3]
    assert commands[4][-1] == "torch"
    programs["make"] = "/usr/bin/make"
    assert "-G" not in build.configure()


def test_without_nvcc_the_build_says_what_to_do(
    commands: list[Sequence[str]], log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    def says(command: Sequence[str], **_: Any) -> Job:
        job = Job(command, 1.0, end=End.BY_ITSELF, status=0)
        job.lines.append(f"-- {LEFT_OUT}, no nvcc found; set CUDACXX to one, or install the CUDA toolkit")
        return job

    monkeypatch.setattr(build_module, "run", says)
    monkeypatch.setattr(build_module, "tool", lambda name: name)
    outcome = Build((9, 0), Path(), log, Budget(None)).libraries()
    assert outcome.status is Status.FAILED
    assert "set CUDACXX" in outcome.text
    assert not commands


def test_cmake_says_what_the_build_looks_for() -> None:
    text = (ROOT / "CMakeLists.txt").read_text()
    assert LEFT_OUT in text
    for target in (*build_module.TARGETS[:2], build_module.BINDING, "switchgear_bench"):
        assert f"add_library({target} SHARED" in text


def test_what_is_measured_says_on_what(tmp_path: Path) -> None:
    found = versions("abc", tmp_path)
    assert {"python", "torch", "when"} <= set(found)
    assert found["commit"] == "abc"
    assert "commit" not in versions(None, tmp_path)
    (tmp_path / "refs").mkdir()
    (tmp_path / "HEAD").write_text("ref: refs/main\n")
    (tmp_path / "packed-refs").write_text("# pack-refs\n0123456789abcdef refs/main\n")
    assert commit_of_files(tmp_path) == "012345678"
    (tmp_path / "refs" / "main").write_text("fedcba9876543210\n")
    assert commit_of_files(tmp_path) == "fedcba987"
    (tmp_path / "HEAD").write_text("a1b2c3d4e5f6a7b8\n")
    assert commit_of_files(tmp_path) == "a1b2c3d4e"
