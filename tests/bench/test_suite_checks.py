"""The GPU suite's checks over made-up files: each test has an outcome, however the process of pytest ends."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from switchgear_bench.suite import checks as checks_module
from switchgear_bench.suite.budget import Budget
from switchgear_bench.suite.checks import PROBE, Checks
from switchgear_bench.suite.log import Log
from switchgear_bench.suite.steps import Status

HEAD = """
import ctypes
import os
import signal
import warnings

import pytest

pytestmark = pytest.mark.gpu


def test_good():
    warnings.warn("of a foreign version")


def test_skipped():
    pytest.skip("no CuPy")
"""
HANGS = """
@pytest.mark.timeout(1)
def test_hangs():
    mutex = ctypes.create_string_buffer(64)
    libc = ctypes.CDLL(None)
    for _ in range(2):  # the second waits for ever, and no signal ends it
        libc.pthread_mutex_lock(mutex)
"""
CRASHES = """
def test_crashes():
    os.kill(os.getpid(), signal.SIGKILL)
"""
FAILS = """
def test_fails():
    print("said before")
    assert 1 == 2
"""
LATER = """
def test_later():
    pass
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\nfilterwarnings = error\n")
    return tmp_path / "test_made_up.py"


def checks_of(tmp_path: Path, budget: Budget | None = None) -> Checks:
    return Checks(Log(tmp_path / "log"), budget or Budget(None), tmp_path / "tests.xml", num_cores=2)


def reported(tmp_path: Path) -> dict[str, list[str]]:
    """What the JUnit file says of each test."""
    cases = ElementTree.parse(tmp_path / "tests.xml").getroot().iter("testcase")
    return {str(case.get("name")): [child.tag for child in case] for case in cases}


def test_a_file_that_is_well(file: Path, tmp_path: Path) -> None:
    file.write_text(HEAD)
    outcome = checks_of(tmp_path).file(str(file))
    assert (outcome.status, outcome.text) == (Status.PASSED, "1 passed, 0 failed, 1 skipped")
    assert reported(tmp_path) == {"test_good": [], "test_skipped": ["skipped"]}


def test_a_hang_or_a_crash_hides_no_other_test(file: Path, tmp_path: Path) -> None:
    file.write_text(HEAD + HANGS + LATER)
    outcome = checks_of(tmp_path).file(str(file), timeout_s=60.0)
    assert outcome.status is Status.FAILED
    assert outcome.text == "2 passed, 1 failed, 1 skipped (test_hangs); passed only alone: test_later"
    assert any("in test_hangs" in line for line in outcome.log)
    assert reported(tmp_path)["test_hangs"] == ["error"]


def test_kernel_checks_end_alone(file: Path, tmp_path: Path) -> None:
    file.write_text(HEAD + CRASHES + FAILS + LATER)
    outcome = checks_of(tmp_path).kernels(str(file))
    assert outcome.status is Status.FAILED
    assert outcome.text == "2 passed, 2 failed, 1 skipped (test_crashes, test_fails)"
    assert any("pytest ended with status -9" in line for line in outcome.log)
    assert any("assert 1 == 2" in line for line in outcome.log)
    assert reported(tmp_path)["test_fails"] == ["failure"]
    assert "said before" in (tmp_path / "log").read_text()


def test_arrays_lie_where_a_kernel_finds_them(file: Path, tmp_path: Path) -> None:
    option = 'parser.addoption("--arrays", default="managed")'
    (tmp_path / "conftest.py").write_text(f"def pytest_addoption(parser):\n    {option}\n")
    file.write_text(f"{HEAD}def test_{PROBE}(request):\n    assert request.config.getoption('--arrays') == 'mapped'\n")
    outcome = checks_of(tmp_path).kernels(str(file))
    assert outcome.status is Status.PASSED
    assert outcome.text == "2 passed, 0 failed, 1 skipped, arrays in mapped host memory"


def test_what_the_budget_cuts_has_not_failed(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(HEAD + "\ndef test_slow():\n    import time\n    time.sleep(60)\n")
    monkeypatch.setattr(checks_module, "TEST_S", 200.0)
    budget = Budget(None)
    checks = checks_of(tmp_path, budget)
    budget.seconds = 12.0
    budget._end_s = Budget(12.0)._end_s
    outcome = checks.file(str(file), timeout_s=200.0)
    assert outcome.status is Status.CUT
    assert outcome.text == "1 passed, 0 failed, 1 skipped, 1 cut by the budget"


def test_a_file_in_which_nothing_ran_has_not_passed(file: Path, tmp_path: Path) -> None:
    file.write_text(HEAD.replace("def test_good", "def good"))
    outcome = checks_of(tmp_path).file(str(file))
    assert outcome.status is Status.LEFT_OUT
    assert "no CuPy" in outcome.text
    file.write_text("import no_such_module\n")
    outcome = checks_of(tmp_path).file(str(file))
    assert outcome.status is Status.FAILED
    assert any("no_such_module" in line for line in outcome.log)
