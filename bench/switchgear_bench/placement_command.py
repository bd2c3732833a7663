"""`switchgear bench placement`: our placement policies against EPLB, by predicted step time and bytes moved."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def _table(title: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(title) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (title, rule, *lines))


def _next_window(rows: Sequence[Row]) -> list[str]:
    parts = []
    for case in dict.fromkeys(row["case"] for row in rows):
        title = [
            "policy",
            "mean ms",
            "p99 ms",
            "equal shares: mean ms",
            "p99 ms",
            "max/mean",
            "GB moved",
            "of EPLB's",
            "plan ms",
        ]
        lines = []
        for row in (row for row in rows if row["case"] == case):
            of_eplb = row["bytes_over_eplb"]
            lines.append(
                [
                    row["policy"],
                    f"{row['mean_s'] * 1e3:.4g} ({row['mean_s_over_eplb']:.3f})",
                    f"{row['p99_s'] * 1e3:.4g} ({row['p99_s_over_eplb']:.3f})",
                    f"{row['equal_shares_mean_s'] * 1e3:.4g}",
                    f"{row['equal_shares_p99_s'] * 1e3:.4g}",
                    f"{row['max_over_mean']:.3f}",
                    f"{row['bytes'] / 1e9:.4g}",
                    "-" if of_eplb is None else f"{of_eplb:.3f}",
                    f"{row['plan_s_median'] * 1e3:.3g}",
                ]
            )
        num_windows = next(row["num_windows"] for row in rows if row["case"] == case)
        parts.append(f"**{case}**, {num_windows} windows:\n\n{_table(title, lines)}")
    return parts


def markdown(rows: Sequence[Row]) -> str:
    """The tables of all parts."""
    parts = []
    given = [row for row in rows if row["part"] == "given window"]
    if given:
        names = list(given[0]["max_over_mean"])
        lines = [
            [row["case"], *(f"{row['max_over_mean'][name]:.4f} ({row['worst'][name]:.4f})" for name in names)]
            for row in given
        ]
        seeds = given[0]["num_seeds"]
        about = f"Without a budget, on the window given: rows of the busiest rank over the mean, {seeds} seeds (worst):"
        parts.append(f"{about}\n\n{_table(['load', *names], lines)}")
    parts += _next_window([row for row in rows if row["part"] == "next window"])
    plans = [row for row in rows if row["part"] == "plan time"]
    if plans:
        lines = [
            [row["policy"], *(f"{row[name] * 1e3:.0f}" for name in ("first_s", "median_s", "max_s"))] for row in plans
        ]
        title = ["64 ranks, 61 layers, 256 experts", "first plan ms", "later, median ms", "most ms"]
        parts.append(_table(title, lines))
    return "\n\n".join(parts)


class PlacementCommand:
    """Plans only; nothing is served. What is timed is the planning."""

    help = "measure placement policies against EPLB on recorded and synthetic drifting traffic"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--trace",
            type=Path,
            default=Path("bench/results/tiny-moe-drift.npz"),
            help="windows that `switchgear record` wrote (default: bench/results/tiny-moe-drift.npz)",
        )
        parser.add_argument("--windows", type=int, default=240, help="of synthetic drift (default: 240)")
        parser.add_argument("--seeds", type=int, default=10, help="of single windows (default: 10)")
        parser.add_argument("--plans", type=int, default=12, help="timed ones, after eight others (default: 12)")
        parser.add_argument("--output", type=Path, help="write the rows as JSON to this file")

    def run(self, arguments: argparse.Namespace) -> int:
        from switchgear_bench import machine
        from switchgear_bench.placement import (
            check,
            drift_cases,
            given_window_rows,
            next_window_rows,
            plan_time_rows,
        )
        from switchgear_runtime.moe.routing_trace import RoutingTrace

        trace = RoutingTrace.load(arguments.trace) if arguments.trace.is_file() else None
        if trace is None:
            print(f"{arguments.trace} is not there: no recorded windows; `switchgear record` writes them.")
        rows = plan_time_rows(arguments.plans) if arguments.plans else []
        rows += given_window_rows(arguments.seeds)
        for case in drift_cases(trace, arguments.windows):
            rows += next_window_rows(case)
        print(markdown(rows))
        broken = check(rows)
        for line in broken:
            print(f"FALLS SHORT: {line}")
        if arguments.output:
            header = machine.describe() | {
                "when": datetime.now(UTC).isoformat(timespec="seconds"),
                "trace": None if trace is None else f"{trace.header.model}: {trace.header.description}",
            }
            arguments.output.write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n", encoding="utf-8")
            print(f"Wrote {arguments.output}.")
        return 1 if broken else 0


PLACEMENT = PlacementCommand()
