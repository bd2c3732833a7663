"""The benchmark's sections, each in a process of its own: `Sections`. A hang or an illegal access costs one of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from switchgear_bench.suite.processes import run
from switchgear_bench.suite.steps import Outcome, Results, Status

SECTION_S = 600.0
SECTION_S_MIN = 45.0
_ROWS_PART = 0.85  # of a section's time: past it no further row begins


class Sections:
    """Rows go to `path`, a line each, as they come, and from there into the results."""

    def __init__(self, results: Results, path: Path, *, device: str = "cuda", gemm_family: str = "auto") -> None:
        self._results = results
        self._path = path
        self._device = device
        self._gemm_family = gemm_family
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def run(self, name: str, *, timeout_s: float = SECTION_S) -> Outcome:
        begin, results = self._path.stat().st_size, self._results
        timeout_s, is_cut = results.budget.limit(timeout_s), results.budget.cuts(timeout_s)
        options = {"--device": self._device, "--section": name, "--rows": str(self._path)}
        options["--gemm-family"] = self._gemm_family
        options["--budget-s"] = f"{_ROWS_PART * timeout_s:.1f}"
        words = [word for pair in options.items() for word in pair]
        rows: list[dict[str, Any]] = []

        def take() -> None:
            fresh = self._rows(begin)[len(rows) :]
            rows.extend(fresh)
            results.add(fresh)

        job = run(
            [sys.executable, "-u", "-m", "switchgear_bench.gpu_section", *words],
            timeout_s=timeout_s,
            log=results.log,
            budget=results.budget,
            while_it_runs=take,
        )
        take()
        failed = [row for row in rows if "error" in row]
        missed = [row for row in rows if row.get("passed") is False]
        left_out = [what for row in rows for what in row.get("left_out", ())]
        measured = sum("left_out" not in row for row in rows)
        text = f"{measured} rows, {len(failed)} of them failed, {len(missed)} short of their goal"
        text += f"; left out: {', '.join(left_out)}" if left_out else ""
        if job.status is None:
            return self._killed(name, f"{text}; killed after {job.seconds:.0f} s", is_cut or job.is_cut, job.said())
        if job.status or failed or not measured:
            text += f"; ended with status {job.status}" if job.status else ""
            return Outcome(Status.FAILED, text, job.said())
        return Outcome(Status.CUT if left_out and is_cut else Status.PASSED, text)

    def _killed(self, name: str, text: str, is_cut: bool, lines: list[str]) -> Outcome:
        """A row says it, too: a report that is silent of what did not finish would be of other rows."""
        row = {"device": self._device, "kernel": "left out", "left_out": [f"what is left of {name}"]}
        self._results.add([row])
        if is_cut:
            return Outcome(Status.CUT, f"{text}, cut by the budget", lines)
        return Outcome(Status.FAILED, text, lines)

    def _rows(self, begin: int) -> list[dict[str, Any]]:
        """Of whole lines."""
        with self._path.open("rb") as file:
            file.seek(begin)
            lines = file.read().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith(b"\n")]
