"""`switchgear bench profile`: where a decode step's time goes, part by part, against the memory's bandwidth."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table a batch size."""
    tables = []
    for row in rows:
        lines = [
            f"### {row['case']}, {row['precision']}: {row['step_us'] / 1e3:.2f} ms a step; "
            f"{row['num_bytes'] / 1e6:.0f} MB at {row['bandwidth_gb_per_s']:.1f} GB/s would take "
            f"{row['fraction_of_bandwidth']:.2f} of it, its parts' bounds {row['fraction_of_parts_bound']:.2f}",
            "",
            "| part | ms | share | MB read | GFLOP | bound ms | ms over it |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {part['part']} | {part['time_us'] / 1e3:.3f} | {100 * part['share']:.1f} % | {part['num_bytes'] / 1e6:.1f} | "
            f"{part['flops'] / 1e9:.2f} | {part['bound_us'] / 1e3:.3f} | {part['over_bound_us'] / 1e3:.3f} |"
            for part in row["parts"]
        ]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


class ProfileCommand:
    """A row a batch size."""

    help = "show where a decode step's time goes, part by part"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "model",
            nargs="?",
            metavar="MODEL",
            default="build/peers/bench-model",
            help="default: build/peers/bench-model, from `make peers`",
        )
        parser.add_argument(
            "--precision", choices=("bf16", "int8", "int4"), default="bf16", help="of weights (default: bf16)"
        )
        parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32], help="default: 1 8 32")
        parser.add_argument("--threads", type=int, help="default: as many as cores")
        parser.add_argument("--num-repeats", type=int, default=5, help="medians are over this many runs (default: 5)")
        parser.add_argument("--output", type=Path, help="write the rows as JSON to this file; other precisions' stay")

    def run(self, arguments: argparse.Namespace) -> int:
        from switchgear_bench import machine
        from switchgear_bench.step_profile import profile

        num_threads = arguments.threads or machine.num_cores()
        rows = list(
            profile(
                arguments.model,
                tuple(arguments.batch_sizes),
                precision=arguments.precision,
                num_threads=num_threads,
                num_repeats=arguments.num_repeats,
            )
        )
        print(markdown(rows))
        if arguments.output:
            kept: list[dict[str, Any]] = []
            if arguments.output.is_file():
                kept = json.loads(arguments.output.read_text(encoding="utf-8"))["rows"]
            header = machine.describe() | {
                "when": datetime.now(UTC).isoformat(timespec="seconds"),
                "model": Path(arguments.model).name,
                "num_threads": num_threads,
            }
            rows = [row for row in kept if row["precision"] != arguments.precision] + rows
            text = json.dumps({"header": header, "rows": rows}, indent=1)
            arguments.output.write_text(text + "\n", encoding="utf-8")
            print(f"\nWrote {arguments.output}.")
        return 0


PROFILE = ProfileCommand()
