"""`switchgear bench kernels`: every kernel against the machine's bound and against torch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_DISTURBED_CORES = 0.1
_TITLE = (
    ("kernel", "---"),
    ("weights", "---"),
    ("shape", "---"),
    ("tokens", "---:"),
    ("us", "---:"),
    ("GB/s", "---:"),
    ("GFLOP/s", "---:"),
    ("bound us", "---:"),
    ("bound by", "---"),
    ("of bound", "---:"),
    ("torch us", "---:"),
    ("x torch", "---:"),
)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """One table. `bytes` in parentheses: operands come from the cache."""
    lines = [_line([name for name, _ in _TITLE]), "|" + "|".join(rule for _, rule in _TITLE) + "|"]
    lines += [_line(_cells(row)) for row in rows]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(row: Mapping[str, Any]) -> list[str]:
    by = row["bound_by"]
    return [
        row["kernel"],
        row["format"],
        row["shape"],
        str(row["num_tokens"]),
        _number(row["time_us"]),
        f"{row['gigabytes_per_s']:.1f}",
        f"{row['gigaflops_per_s']:.0f}",
        _number(row["bound_us"]),
        "cache" if by == "bytes" and row["operands_from"] == "cache" else {"bytes": "memory"}.get(by, by),
        f"{row['fraction_of_bound']:.2f}",
        "" if row["baseline_us"] is None else _number(row["baseline_us"]),
        "" if row["ratio_to_baseline"] is None else f"{row['ratio_to_baseline']:.2f}",
    ]


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


class KernelsCommand:
    """A row a kernel, format and size; one JSON file with all rows."""

    help = "measure each kernel against the machine's bound and against torch"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--only", type=_names, default=[], help="kernels, comma-separated (default: all), such as linear,attention"
        )
        parser.add_argument("--threads", type=int, help="of ours and of torch (default: as many as cores)")
        parser.add_argument("--num-repeats", type=int, default=7, help="medians are over this many runs (default: 7)")
        parser.add_argument("--lock", type=Path, help="hold this file's advisory lock while timing")
        parser.add_argument(
            "--output", type=Path, help="write the rows as JSON to this file; rows of other kernels stay"
        )

    def run(self, arguments: argparse.Namespace) -> int:
        from switchgear_bench import machine
        from switchgear_bench.kernels import KERNELS, Bounds, measure, subjects
        from switchgear_bench.quiet import quietly
        from switchgear_runtime import ops
        from switchgear_runtime.errors import ConfigError

        unknown = [name for name in arguments.only if name not in KERNELS]
        if unknown:
            raise ConfigError(f"--only {unknown[0]!r} is unknown; choose of {', '.join(KERNELS)}")
        num_threads = arguments.threads or machine.num_cores()
        bounds: Bounds | None = None
        rows: list[dict[str, Any]] = []
        for subject in quietly(subjects(arguments.only), arguments.lock):
            bounds = bounds or Bounds.of(num_threads)
            rows.append(measure(subject, bounds, arguments.num_repeats))
            print(_line(_cells(rows[-1])), file=sys.stderr, flush=True)
        assert bounds is not None, "every kernel has subjects"
        header = machine.describe() | {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "num_threads": num_threads,
            "instruction_set": ops.instruction_set(),
            "cache_gb_per_s": bounds.cache_bytes_per_s / 1e9,
            "peak_gflops_per_s": {name: peak / 1e9 for name, peak in bounds.peak_flops_per_s.items()},
        }
        print(markdown(rows))
        disturbed = [row for row in rows if row["others_used_cores"] > _DISTURBED_CORES]
        if disturbed:
            print(f"{len(disturbed)} rows were measured while other processes used the machine; see others_used_cores.")
        print("Every kernel's result was held to its reference, before and after its timing.")
        if arguments.output:
            kept = _kept(arguments.output, {row["kernel"] for row in rows})
            text = json.dumps({"header": header, "rows": kept + rows}, indent=1)
            arguments.output.write_text(text + "\n", encoding="utf-8")
            print(f"Wrote {arguments.output}.")
        return 0


def _kept(path: Path, measured: set[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if row["kernel"] not in measured]


KERNELS_BENCH = KernelsCommand()
