"""`switchgear bench report`: writes docs/PERFORMANCE.md from the results."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


class ReportCommand:
    """Measures nothing."""

    help = "write docs/PERFORMANCE.md and its plots from bench/results"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--results", type=Path, default=Path("bench/results"), help="default: bench/results")
        parser.add_argument(
            "--document", type=Path, default=Path("docs/PERFORMANCE.md"), help="default: docs/PERFORMANCE.md"
        )

    def run(self, arguments: argparse.Namespace) -> int:
        from switchgear_bench.report import SECTIONS, render
        from switchgear_bench.report_plots import PLOTS, draw, have_matplotlib, is_current

        plots = arguments.document.parent / "performance"
        for name in PLOTS:
            result, plot = arguments.results / SECTIONS[name][0], plots / f"{name}.svg"
            rows = json.loads(result.read_text(encoding="utf-8"))["rows"] if result.is_file() else []
            if not rows:
                plot.unlink(missing_ok=True)
            elif not is_current(plot, rows):
                plot.unlink(missing_ok=True)  # a plot of other rows is worse than none
                if have_matplotlib():
                    draw(name, rows, plot)
                else:
                    print(f"{plot} is not drawn: matplotlib is missing; `pip install switchgear[bench]`")
        document = arguments.document.read_text(encoding="utf-8")
        arguments.document.write_text(render(document, arguments.results, plots), encoding="utf-8")
        print(f"Wrote {arguments.document}.")
        return 0


REPORT = ReportCommand()
