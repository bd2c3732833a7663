"""A pytest plugin that writes what became of each test as soon as it is known, line by line: a hang or a crash loses none.

`-p switchgear_bench.suite.outcomes --outcomes FILE`. The first line has the ids of all tests that were chosen, each further
one {"id", "outcome", "seconds", "text"}; of several lines of an id (its set-up, call and end) the worst counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

_TEXT_CHARACTERS = 20_000


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="file for what became of each test")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--outcomes")
    if path is not None:
        config.pluginmanager.register(Outcomes(path), "outcomes-of-tests")


class Outcomes:
    def __init__(self, path: Path) -> None:
        self._path = path

    def _write(self, line: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._write({"ids": [item.nodeid for item in session.items]})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        longrepr: Any = report.longrepr
        text = str(longrepr[2]) if isinstance(longrepr, tuple) else report.longreprtext
        line = {"id": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
        self._write({**line, "text": text[-_TEXT_CHARACTERS:]})
