"""docs/PERFORMANCE.md is what the generator writes from the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from switchgear.cli import main
from switchgear_bench.report import NOT_MEASURED, NOTHING, SECTIONS, render
from switchgear_bench.report_plots import PLOTS, digest, draw, have_matplotlib, is_current
from switchgear_runtime.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
RESULTS, DOCUMENT, DRAWN = ROOT / "bench" / "results", ROOT / "docs" / "PERFORMANCE.md", ROOT / "docs" / "performance"


def test_performance_docs_are_current() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    assert document == render(document, RESULTS, DRAWN), "run `make docs`"


def test_plots_are_of_the_committed_rows() -> None:
    for name in PLOTS:
        plot, result = DRAWN / f"{name}.svg", RESULTS / SECTIONS[name][0]
        if plot.is_file():
            rows = json.loads(result.read_text(encoding="utf-8"))["rows"]
            assert is_current(plot, rows), f"run `make docs` where matplotlib is installed, for {plot}"


def test_sections_without_results_say_so(tmp_path: Path) -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    empty = render(document, tmp_path, tmp_path)
    assert empty.count(NOT_MEASURED) == sum(
        f"<!-- begin {name} -->" in document for name in SECTIONS if name not in NOTHING
    )
    assert render(empty, RESULTS, DRAWN) == document
    with pytest.raises(ConfigError, match="markers"):
        render(document.replace("<!-- end serve -->", ""), tmp_path, tmp_path)


def test_report_writes_the_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "PERFORMANCE.md"
    document.write_text(DOCUMENT.read_text(encoding="utf-8"), encoding="utf-8")
    stale = tmp_path / "performance" / "transport.svg"
    stale.parent.mkdir()
    stale.write_text("of other rows", encoding="utf-8")
    assert main(["bench", "report", "--results", str(RESULTS), "--document", str(document)]) == 0
    assert "Wrote" in capsys.readouterr().out
    assert document.read_text(encoding="utf-8").count("| ") > 10
    assert not stale.is_file() or have_matplotlib()


def test_plot_says_what_it_was_drawn_from(tmp_path: Path) -> None:
    rows = [{"a": 1}]
    assert digest(rows) == digest([{"a": 1}]) != digest([{"a": 2}])
    plot = tmp_path / "transport.svg"
    assert not is_current(plot, rows)
    if have_matplotlib():
        measured = json.loads((RESULTS / "transport.json").read_text())["rows"]
        draw("transport", measured, plot)
        assert is_current(plot, measured) and not is_current(plot, rows)
