"""The suite's checks, test by test, however pytest's process ends: `Checks`.

Kernel checks run each in a process of its own, since an illegal access ends every later call of its process. A file of
other checks runs as one, and what failed there or was never reached runs again alone: so a failure that only followed
from another is told from one of its own.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from switchgear_bench.suite.budget import Budget
from switchgear_bench.suite.log import Log
from switchgear_bench.suite.processes import LINES, Job, run, run_all
from switchgear_bench.suite.steps import Outcome, Status

FILE_S = 240.0  # of one file of checks
FILE_S_MIN = 60.0
TEST_S = 90.0  # of a test, where its file runs as one
KERNEL_S = 40.0  # of a kernel check, alone
ALONE_S = 60.0  # of another test, alone
COLLECT_S = 60.0
KERNELS_AT_ONCE, ALONE_AT_ONCE = 8, 4
PROBE = "check_counters"  # a kernel check that is short and tells whether arrays work as they lie
SANITIZE_S = 1800.0
SANITIZE_SEEDS = 6  # of each check at most
SANITIZER_FOUND = 86  # its exit status, where it found something
_NAMED = 6  # of the tests that failed, in the table
_CONTROL = re.compile(r"[^\t\n\r -\ud7ff\ue000-\ufffd]")  # what XML cannot hold
_WORST = ("passed", "skipped", "late", "cut", "crashed", "failed")


@dataclass(slots=True)
class Test:
    """One id, and what became of it."""

    name: str
    outcome: str = "cut"
    seconds: float = 0.0
    text: str = ""
    only_alone: bool = False  # it passed, but not beside the others

    def take(self, line: dict[str, str | float]) -> None:
        outcome = str(line["outcome"])
        if self.outcome == "cut" or _WORST.index(outcome) > _WORST.index(self.outcome):
            self.outcome, self.text = outcome, str(line["text"])
        self.seconds += float(line["seconds"])


class Checks:
    """Runs files of them; `report` is the JUnit file of all that has run."""

    def __init__(self, log: Log, budget: Budget, report: Path, *, num_cores: int | None = None) -> None:
        self._log = log
        self._budget = budget
        self._report = report
        self._num_cores = num_cores or len(os.sched_getaffinity(0))
        self._files: dict[str, list[Test]] = {}
        self.arrays: list[str] = []  # the option that says where kernel checks' arrays lie

    def kernels(self, file: str) -> Outcome:
        """Each alone, several at once; the arrays where one of them works."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "ids")
            job = run(
                self._command(file, path, COLLECT_S, ["--collect-only"]),
                timeout_s=COLLECT_S,
                log=self._log,
                budget=self._budget,
            )
            names = _read(path)[0]
        if not names:
            return self._no_tests(job)
        probe = next((name for name in names if PROBE in name), names[0] if names else "")
        if probe and self._alone(file, [probe], KERNEL_S, 1)[0].outcome not in ("passed", "cut"):
            self.arrays = ["--arrays=mapped"]
            if self._alone(file, [probe], KERNEL_S, 1)[0].outcome != "passed":
                self.arrays = []
        tests = self._alone(file, names, KERNEL_S, min(self._num_cores, KERNELS_AT_ONCE))
        outcome = self._outcome(file, tests)
        where = ", arrays in mapped host memory" if self.arrays else ""
        return Outcome(outcome.status, outcome.text + where, outcome.log)

    def file(self, file: str, *, timeout_s: float = FILE_S) -> Outcome:
        """Whole, then what is wrong or missing alone."""
        job, names, tests = self._whole(file, timeout_s)
        if not names:
            return self._no_tests(job)
        again = [test.name for test in tests if test.outcome in ("failed", "crashed", "late")]
        at_once = max(1, min(self._num_cores // 4, ALONE_AT_ONCE))
        found = {test.name: test for test in self._alone(file, again, ALONE_S, at_once)}
        for place, test in enumerate(tests):
            alone = found.get(test.name)
            if alone is not None and alone.outcome != "cut":
                alone.only_alone = alone.outcome == "passed"
                tests[place] = alone
        return self._outcome(file, tests)

    def sanitize(self, file: str, program: str, tool: str) -> Outcome:
        """Whole, of fewer seeds: each launch takes many times as long."""
        prefix = [program, "--tool", tool, "--error-exitcode", str(SANITIZER_FOUND), "--target-processes", "all"]
        options = [f"--most-seeds={SANITIZE_SEEDS}", *self.arrays]
        job, names, tests = self._whole(file, SANITIZE_S, prefix=prefix, options=options, test_s=SANITIZE_S)
        if not names:
            return self._no_tests(job)
        outcome = self._outcome(f"{tool} {file}", tests)
        if job.status != SANITIZER_FOUND:
            return outcome
        return Outcome(Status.FAILED, f"{outcome.text}, the sanitizer found errors", job.said())

    def _whole(
        self,
        file: str,
        timeout_s: float,
        *,
        prefix: Sequence[str] = (),
        options: Sequence[str] = (),
        test_s: float = TEST_S,
    ) -> tuple[Job, list[str] | None, list[Test]]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "outcomes")
            command = [*prefix, *self._command(file, path, min(test_s, 0.75 * timeout_s), options)]
            job = run(command, timeout_s=timeout_s, log=self._log, budget=self._budget)
            names, lines = _read(path)
        tests = {name: Test(name) for name in names or ()}
        for line in lines:
            tests[str(line["id"])].take(line)
        missing = [test for test in tests.values() if test.outcome == "cut"]
        for test in missing if not job.is_cut else ():
            test.outcome, test.text = "late" if job.is_late else "crashed", _how(job)
        return job, names, list(tests.values())

    def _alone(self, file: str, names: Sequence[str], timeout_s: float, at_once: int) -> list[Test]:
        """Each in a process of its own."""
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder, str(number)) for number in range(len(names))]
            threads = max(1, self._num_cores // max(1, at_once))  # of numpy: all at once would be too many
            prefix = ["env", f"OMP_NUM_THREADS={threads}", f"OPENBLAS_NUM_THREADS={threads}"]
            jobs = [
                Job(
                    [
                        *prefix,
                        *self._command(f"{file}::{name.partition('::')[2]}", path, 0.85 * timeout_s, self.arrays),
                    ],
                    timeout_s,
                    name,
                )
                for name, path in zip(names, paths, strict=True)
            ]
            run_all(jobs, num_at_once=at_once, log=self._log, budget=self._budget)
            tests = []
            for job, path in zip(jobs, paths, strict=True):
                test = Test(job.name)
                for line in _read(path)[1]:
                    test.take(line)
                if test.outcome == "cut" and not job.is_cut:
                    test.outcome, test.text, test.seconds = "late" if job.is_late else "crashed", _how(job), job.seconds
                tests.append(test)
        return tests

    @staticmethod
    def _command(tests: str, outcomes: Path, test_s: float, options: Sequence[str]) -> list[str]:
        return [
            *(sys.executable, "-m", "pytest", "-q", "-m", "gpu"),
            *("-p", "no:cacheprovider", "-p", "switchgear_bench.suite.outcomes", "--outcomes", str(outcomes)),
            *("-o", "timeout_method=thread", f"--timeout={test_s:g}"),  # a signal does not end a wait for the GPU
            *("-o", "filterwarnings=default"),  # of whatever versions are here
            *options,
            tests,
        ]

    @staticmethod
    def _no_tests(job: Job) -> Outcome:
        if job.is_cut:
            return Outcome(Status.CUT, "cut by the budget before it ran")
        return Outcome(Status.FAILED, f"failed: no test was found ({_how(job).splitlines()[0]})", job.said())

    def _outcome(self, file: str, tests: Sequence[Test]) -> Outcome:
        """pytest's counts, with the names of what is wrong. A file in which nothing ran has not passed."""
        self._files[file] = list(tests)
        self._write_report()
        wrong = [test for test in tests if test.outcome in ("failed", "late", "crashed")]
        only_alone = [test for test in tests if test.only_alone]
        num_cut, num_skipped = (sum(test.outcome == what for test in tests) for what in ("cut", "skipped"))
        num_passed = len(tests) - len(wrong) - num_cut - num_skipped
        text = f"{num_passed} passed, {len(wrong)} failed, {num_skipped} skipped"
        text += f", {num_cut} cut by the budget" if num_cut else ""
        text += f" ({_names(wrong)})" if wrong else ""
        text += f"; passed only alone: {_names(only_alone)}" if only_alone else ""
        if wrong or only_alone:
            return Outcome(Status.FAILED, text, _told(wrong))
        if num_cut:
            return Outcome(Status.CUT, text)
        if num_passed:
            return Outcome(Status.PASSED, text)
        why = next((test.text for test in tests if test.text), "")
        return Outcome(Status.LEFT_OUT, f"{text}: {why}" if why else text)

    def _write_report(self) -> None:
        whole = ElementTree.Element("testsuites")
        for file, tests in self._files.items():
            suite = ElementTree.SubElement(whole, "testsuite", name=file, tests=str(len(tests)))
            suite.set("failures", str(sum(test.outcome == "failed" for test in tests)))
            suite.set("errors", str(sum(test.outcome in ("late", "crashed") for test in tests)))
            suite.set("skipped", str(sum(test.outcome in ("skipped", "cut") for test in tests)))
            for test in tests:
                file_name, _, name = test.name.partition("::")
                case = ElementTree.SubElement(suite, "testcase", classname=Path(file_name).stem, name=name)
                case.set("time", f"{test.seconds:.3f}")
                kind = {"failed": "failure", "late": "error", "crashed": "error", "skipped": "skipped"}
                kind |= {"cut": "skipped"}
                if test.outcome in kind:
                    text = _CONTROL.sub("?", test.text or test.outcome)
                    told = ElementTree.SubElement(case, kind[test.outcome], message=text.splitlines()[-1][:200])
                    told.text = text
        ElementTree.ElementTree(whole).write(self._report, encoding="utf-8", xml_declaration=True)


def _read(path: Path) -> tuple[list[str] | None, list[dict[str, str | float]]]:
    """(ids, a line for each outcome); None: pytest did not come so far. A line that is cut off does not count."""
    if not path.is_file():
        return None, []
    lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return (lines[0]["ids"], lines[1:]) if lines else (None, [])


def _how(job: Job) -> str:
    """How a process ended that left a test without an outcome, and what it said."""
    how = f"killed after {job.seconds:.0f} s" if job.status is None else f"pytest ended with status {job.status}"
    return "\n".join([how, *job.said()])


def _names(tests: Sequence[Test]) -> str:
    names = [test.name.partition("::")[2] for test in tests]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _told(tests: Sequence[Test]) -> list[str]:
    """The end of what each says, in as many lines as a result keeps."""
    each = max(10, LINES // max(1, len(tests)) - 1)
    lines: Iterable[str] = (
        line for test in tests for line in (f"--- {test.name}: {test.outcome}", *(test.text.splitlines()[-each:]))
    )
    return list(lines)[:LINES]
