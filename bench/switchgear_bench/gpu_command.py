"""`switchgear bench gpu`: the device kernels against what the GPU can do and against torch on it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class GpuCommand:
    help = "device kernels against copy bandwidth, bf16 products and torch, on a GPU"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--device",
            choices=("cuda", "twin"),
            default="cuda",
            help="twin: the same code on the host with small shapes; tests this benchmark and measures nothing",
        )
        parser.add_argument("--output", type=Path, help="JSON file for the rows (default: none)")

    def run(self, arguments: argparse.Namespace) -> int:
        rows = list(run_all(arguments.device))
        if arguments.output is not None:
            arguments.output.write_text(json.dumps({"machine": describe(arguments.device), "rows": rows}, indent=1))
        print(table(rows))
        return 0


def run_all(device: str) -> Iterator[dict[str, Any]]:
    """Row after row. Raises DeviceUnavailable, with each reason and its fix, where there is no usable GPU."""
    from switchgear_runtime.cuda.preflight import require_gpu

    if device == "cuda":
        require_gpu(num_ranks=1, transport="auto")
    from itertools import chain

    from switchgear_bench.gpu import Bounds, Clock, measure, subjects
    from switchgear_bench.gpu_decode import measure_decode
    from switchgear_runtime.cuda.backend import kernels_of

    kernels = kernels_of(device, 0)
    bounds, clock = Bounds.of(kernels.device), Clock(kernels.device)
    is_small = device != "cuda"
    for row in chain(
        (measure(subject, bounds, clock) for subject in subjects(kernels, is_small=is_small)),
        measure_decode(device, bounds.copy_bytes_per_s, is_small=is_small),
    ):
        whole = {"device": device, **row, **_rates(bounds)}
        print(_line(whole), flush=True)
        yield whole


def describe(device: str) -> dict[str, Any]:
    """The header: machine.py's, and the GPU."""
    from switchgear_bench import machine
    from switchgear_runtime.cuda.facts import gather_facts
    from switchgear_runtime.cuda.report import gpu_report

    return {**machine.describe(), "device": device, **gpu_report(gather_facts())}


def _rates(bounds: Any) -> dict[str, float]:
    return {
        "copy_gb_per_s": bounds.copy_bytes_per_s / 1e9,
        "product_tflops_per_s": bounds.product_flops_per_s / 1e12,
    }


def _line(row: dict[str, Any]) -> str:
    baseline = f"{row['ratio_to_baseline']:>8.2f}x {row['baseline']}" if row["baseline"] else ""
    return (
        f"{row['kernel']:<10}{row['shape']:<24}{row['num_tokens']:>6}{row['time_us']:>12.1f}{row['bound_us']:>12.1f}"
        f"{row['fraction_of_bound']:>8.2f} {row['bound_by']:<6}{baseline}"
    )


def table(rows: list[dict[str, Any]]) -> str:
    head = f"{'kernel':<10}{'shape':<24}{'tokens':>6}{'us':>12}{'bound us':>12}{'of it':>8} {'by':<6}{'ratio':>9} to"
    return "\n".join([head, *map(_line, rows)])


GPU = GpuCommand()
