"""The GPU suite's own machinery, where there is no GPU: what is missing, what is kept, what cannot hang."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PATH = Path(__file__).parents[2] / "bench" / "gpu_suite.py"
CHECKS = """
import ctypes
import warnings

import pytest

pytestmark = pytest.mark.gpu


def test_good():
    warnings.warn("of a foreign version")


@pytest.mark.timeout(1)
def test_hangs():
    mutex = ctypes.create_string_buffer(64)
    libc = ctypes.CDLL(None)
    for _ in range(2):  # the second waits for ever, and no signal ends it
        libc.pthread_mutex_lock(mutex)
"""


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("gpu_suite", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LOG", tmp_path / "step.log")
    monkeypatch.setattr(module, "REPORT", tmp_path / "tests.xml")
    return module


def test_what_is_missing_is_named_with_its_fix(suite: ModuleType) -> None:
    assert suite.missing(["json", "pytest"]) is None
    text = suite.missing(["json", "no_such_module"])
    assert "has no no-such-module; `pip install --target" in text


def test_a_failure_loses_nothing(suite: ModuleType, tmp_path: Path) -> None:
    results = suite.Results(tmp_path / "out" / "gpu.json", {"GPUs": "none"}, suite.Budget(None))

    def read() -> dict[str, Any]:
        whole: dict[str, Any] = json.loads(results.path.read_text())
        return whole

    def rows() -> Iterator[dict[str, Any]]:
        yield {"kernel": "dispatch"}
        kept = read()
        assert kept["rows"] == [{"kernel": "dispatch"}]
        assert [step["outcome"] for step in kept["steps"]] == ["fine", "not finished", "not run"]
        raise RuntimeError("an illegal memory access")

    results.steps += [
        suite.Step("build", lambda: ("fine", True)),
        suite.Step("bench", lambda: results.take(rows())),
        suite.Step("after", lambda: ("fine", True)),
    ]
    results.run_steps()
    kept = read()
    assert kept["rows"] == [{"kernel": "dispatch"}]
    assert [step["outcome"] for step in kept["steps"]] == [
        "fine",
        "failed: RuntimeError: an illegal memory access",
        "fine",
    ]
    assert "in rows" in "".join(kept["steps"][1]["log"])


def test_nothing_runs_without_a_build(suite: ModuleType, tmp_path: Path) -> None:
    results = suite.Results(tmp_path / "gpu.json", {}, suite.Budget(None))
    results.steps += [suite.Step("build", lambda: ("no nvcc", False)), suite.Step("after", lambda: ("fine", True))]
    results.run_steps()
    assert [step.outcome for step in results.steps] == ["no nvcc", "not run"]


def test_checks_that_hang_end_and_are_named(suite: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\nfilterwarnings = error\n")
    file = tmp_path / "test_made_up.py"
    file.write_text(CHECKS.partition("@pytest.mark.timeout")[0])
    assert suite.check(str(file)) == ("1 passed, 0 failed, 0 skipped", True)
    file.write_text(CHECKS)
    step = suite.Step("made_up", lambda: suite.check(str(file), timeout_s=60.0))
    assert not step.run()
    assert step.outcome == "failed: pytest ended with status 1", step.log
    assert any("in test_hangs" in line for line in step.log)


def test_a_command_past_its_limit_ends(suite: ModuleType) -> None:
    step = suite.Step("sleep", lambda: suite.run(["sleep", "60"], timeout_s=0.2))
    assert not step.run()
    assert step.outcome == "failed: TimeoutError: sleep took more than 0 s"


def test_each_file_of_checks_is_a_step(suite: ModuleType) -> None:
    names = [Path(file).stem for file in suite.gpu_files()]
    assert names[0] == "test_gpu_kernels"
    assert {"test_device_engine", "test_nccl"} < set(names)


def test_past_its_budget_nothing_begins_and_that_is_said(suite: ModuleType, tmp_path: Path) -> None:
    budget = suite.Budget(100.0)
    assert 20.0 < budget.left_s() <= 100.0
    assert budget.limit(5.0) == 5.0
    assert budget.limit(500.0) <= 100.0
    results = suite.Results(tmp_path / "gpu.json", {}, budget)

    def slow() -> tuple[str, bool]:
        budget._end_s -= 90.0
        return "fine", True

    results.steps += [suite.Step("first", slow), suite.Step("after", lambda: ("fine", True))]
    results.run_steps()
    assert [step.outcome for step in results.steps] == ["fine", "not run: the budget of 100 s is spent"]
    assert not results.steps[1].is_good


def test_rows_that_failed_are_no_success(suite: ModuleType, tmp_path: Path) -> None:
    results = suite.Results(tmp_path / "gpu.json", {}, suite.Budget(None))
    assert results.take([{"kernel": "a", "passed": False}, {"kernel": "b"}]) == (
        "2 rows, 0 of them failed, 1 short of their goal",
        True,
    )
    assert not results.take([{"kernel": "c", "error": "an illegal memory access"}])[1]


def test_it_builds_for_the_gpu_that_is_there(suite: ModuleType) -> None:
    assert [suite.architecture(pair) for pair in ((9, 0), (10, 0), (8, 0), (12, 0))] == [
        "90a-real",
        "100-real",
        "80",
        "80",
    ]


def test_what_is_measured_says_on_what(suite: ModuleType) -> None:
    found = suite.versions()
    assert {"python", "torch", "when"} <= set(found)
