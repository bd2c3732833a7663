"""`switchgear bench throughput`: tokens per second of an embedded cluster."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path

from switchgear.config import resolve_model
from switchgear_runtime.config import EngineConfig


def _numbers(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of integers, such as 1,2,4") from None
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has a number below 1")
    return values


class ThroughputCommand:
    """Throughput of an embedded cluster, against one rank and the bandwidth bound; one JSON file with all rows."""

    help = "measure tokens per second against one rank and the machine's bound"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "model", nargs="?", default="", metavar="MODEL", help="checkpoint directory (default: bundled)"
        )
        parser.add_argument(
            "--ranks", type=_numbers, default=[1, 2, 4], help="rank counts, comma-separated (default: 1,2,4)"
        )
        parser.add_argument(
            "--batch-sizes", type=_numbers, default=[1, 8, 32], help="prompts at once (default: 1,8,32)"
        )
        parser.add_argument("--input-len", type=int, default=128, help="prompt tokens (default: 128)")
        parser.add_argument("--output-len", type=int, default=32, help="new tokens (default: 32)")
        parser.add_argument("--num-repeats", type=int, default=3, help="medians are over this many runs (default: 3)")
        parser.add_argument("--launcher", default="local", choices=("local", "ray"), help="default: local")
        parser.add_argument("--dtype", default="auto", help="default: auto")
        parser.add_argument("--output", type=Path, help="write the rows as JSON to this file")

    def run(self, arguments: argparse.Namespace) -> int:
        from rich.console import Console
        from rich.table import Table

        from switchgear_bench import machine
        from switchgear_bench.throughput import Workload, run

        console = Console(width=None if sys.stdout.isatty() else 140)
        bandwidth = machine.read_bandwidth_bytes_per_s
        header = machine.describe() | {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "read_bandwidth_gb_per_s": [round(bandwidth(n) / 1e9, 2) for n in (1, machine.num_cores())],
            "model": Path(arguments.model).name or "tiny-moe (bundled)",
            "launcher": arguments.launcher,
            "dtype": arguments.dtype,
        }
        table = Table(
            title=f"{header['model']}, {header['hardware']}, {header['read_bandwidth_gb_per_s']} GB/s read by 1 and all cores",
            title_justify="left",
        )
        for name in (
            "ranks",
            "batch",
            "prefill tok/s",
            "decode tok/s",
            "TTFT ms",
            "ITL ms",
            "x one rank",
            "bound tok/s",
            "of bound",
        ):
            table.add_column(name, justify="right")
        workloads = [
            Workload(batch_size=size, input_tokens=arguments.input_len, output_tokens=arguments.output_len)
            for size in arguments.batch_sizes
        ]
        model = resolve_model(EngineConfig(model=arguments.model)).model
        settings = {"launcher": arguments.launcher, "dtype": arguments.dtype}
        rows = []
        for row in run(
            model, arguments.ranks, workloads, num_repeats=arguments.num_repeats, bandwidth=bandwidth, settings=settings
        ):
            rows.append(row)
            table.add_row(
                str(row["num_ranks"]),
                str(row["batch_size"]),
                f"{row['prefill_tokens_per_s']:.0f}",
                f"{row['decode_tokens_per_s']:.0f}",
                f"{row['time_to_first_token_ms']:.1f}",
                f"{row['inter_token_latency_ms']:.2f}",
                f"{row['decode_ratio_to_one_rank']:.2f}",
                f"{row['decode_bound_tokens_per_s']:.0f}",
                f"{row['decode_fraction_of_bound']:.2f}",
            )
        console.print(table)
        console.print("Every cell's tokens equal one rank's, bit for bit; every rank computed expert rows.")
        if arguments.output:
            arguments.output.write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n", encoding="utf-8")
            console.print(f"Wrote {arguments.output}.")
        return 0


THROUGHPUT = ThroughputCommand()
