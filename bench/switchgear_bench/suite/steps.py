"""Rows of the suite's table, in order and within its budget: `Step`, `Results`."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from switchgear_bench.suite.budget import Budget
from switchgear_bench.suite.log import Log
from switchgear_bench.suite.processes import LINES


class Status(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    CUT = "cut by the budget"  # what there was time for is well
    LEFT_OUT = "not run"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step found; `log` is what a reader of a failure needs."""

    status: Status
    text: str
    log: Sequence[str] = ()


@dataclass(slots=True)
class Step:
    """`needs_s`: with less left it does not begin. `is_vital`: without it nothing else runs."""

    name: str
    what: Callable[[], Outcome]
    needs_s: float = 20.0
    is_vital: bool = False
    outcome: Outcome = field(default_factory=lambda: Outcome(Status.LEFT_OUT, "not run"))
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        return self.outcome.status is Status.PASSED

    def run(self, log: Log) -> None:
        start_s = time.monotonic()
        log.title(self.name)
        try:
            self.outcome = self.what()
        except Exception as error:  # noqa: BLE001 - the other steps' results stay
            lines = traceback.format_exc().splitlines()
            log.write("\n".join(lines).encode())
            self.outcome = Outcome(Status.FAILED, f"failed: {type(error).__name__}: {error}", lines)
        self.seconds = time.monotonic() - start_s
        if self.outcome.log:
            print("\n".join(self.outcome.log))
        print(f"== {self.name}: {self.outcome.text} ({self.seconds:.0f} s)", flush=True)

    def row(self) -> dict[str, Any]:
        row = {
            "step": self.name,
            "outcome": self.outcome.text,
            "status": str(self.outcome.status),
            "passed": self.is_good,
            "seconds": round(self.seconds, 1),
        }
        return {**row, "log": list(self.outcome.log)[-LINES:]} if self.outcome.log else row


class Results:
    """The file, written anew whenever something is known."""

    def __init__(self, path: Path, machine: dict[str, Any], budget: Budget, log: Log) -> None:
        self.path = path
        self.machine = machine
        self.budget = budget
        self.log = log
        self.steps: list[Step] = []
        self.rows: list[dict[str, Any]] = []

    def write(self) -> None:
        whole = {"machine": self.machine, "steps": [step.row() for step in self.steps], "rows": self.rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps(whole, indent=1))
        beside.replace(self.path)

    def run_steps(self) -> None:
        for step in self.steps:
            if not self.budget.has(step.needs_s):
                text = f"not run: it needs {step.needs_s:.0f} s of the budget of {self.budget.seconds:.0f} s"
                step.outcome = Outcome(Status.LEFT_OUT, text)
                self.write()
                continue
            step.outcome = Outcome(Status.LEFT_OUT, "not finished")
            self.write()
            step.run(self.log)
            self.write()
            if step.is_vital and not step.is_good:
                return

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        if rows:
            self.rows += rows
            self.write()

    def table(self) -> str:
        width = max(len(step.name) for step in self.steps)
        marks = {Status.PASSED: "ok", Status.FAILED: "BAD", Status.CUT: "cut", Status.LEFT_OUT: "-"}
        return "\n".join(
            f"{step.name:<{width}}  {marks[step.outcome.status]:<3}  {step.seconds:7.0f} s  {step.outcome.text}"
            for step in self.steps
        )
