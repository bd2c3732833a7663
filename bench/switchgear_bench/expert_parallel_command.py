"""`switchgear bench expert-parallel`: two ranks against one, with the same threads and with half of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_TITLE = (
    "case",
    "weights",
    "against",
    "its tokens/s",
    "2 ranks x 1 thread",
    "ratio (quartiles)",
    "a rank's work",
    "one rank's",
    "bound ratio",
    "measured / bound",
)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join([_line(_TITLE), _line(["---"] * 3 + ["---:"] * 7), *(_line(_cells(row)) for row in rows)])


def _cells(row: Mapping[str, Any]) -> list[str]:
    ratio = row["ratio"]
    unit, factor = ("MB", 1e6) if row["bound_by"] == "bytes" else ("GFLOP", 1e9)
    return [
        row["case"],
        row["precision"],
        row["baseline"],
        f"{row['baseline_tokens_per_s']:.0f}",
        f"{row['two_ranks_tokens_per_s']:.0f}",
        f"{ratio['median']:.2f} ({ratio['quartile_1']:.2f}-{ratio['quartile_3']:.2f})",
        ", ".join(f"{work / factor:.0f}" for work in row["work_by_rank"]) + f" {unit}",
        f"{row['baseline_work'] / factor:.0f} {unit}",
        f"{row['bound_ratio']:.2f}",
        f"{row['fraction_of_bound']:.2f}",
    ]


class ExpertParallelBench:
    help = "measure two ranks against one, and the ratio that bytes and load allow"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "model", nargs="?", type=Path, metavar="MODEL", help="default: build/peers/bench-model, from `make peers`"
        )
        parser.add_argument(
            "--precision", default="bf16", choices=("bf16", "int8", "int4"), help="of weights (default: bf16)"
        )
        parser.add_argument("--num-repeats", type=int, help="of each case (default: 5 and more)")
        parser.add_argument("--launcher", default="local", choices=("local", "ray"), help="default: local")
        parser.add_argument("--lock", type=Path, help="hold this file's advisory lock while timing")
        parser.add_argument("--output", type=Path, help="write the rows as JSON to this file; other precisions' stay")

    def run(self, arguments: argparse.Namespace) -> int:
        from switchgear_bench import machine
        from switchgear_bench.expert_parallel import run

        model = str(arguments.model or Path("build/peers/bench-model"))
        rows: list[dict[str, Any]] = []
        for row in run(
            model,
            arguments.precision,
            num_repeats=arguments.num_repeats,
            settings={"launcher": arguments.launcher},
            lock=arguments.lock,
        ):
            rows.append(row)
            print(_line(_cells(row)), flush=True)
        print("\n" + markdown(rows))
        print("Two ranks gave the tokens of one, bit for bit; each computed the rows of its experts.")
        if arguments.output:
            header = machine.describe() | {
                "when": datetime.now(UTC).isoformat(timespec="seconds"),
                "model": Path(model).name,
                "launcher": arguments.launcher,
            }
            kept = _kept(arguments.output, arguments.precision)
            text = json.dumps({"header": header, "rows": kept + rows}, indent=1)
            arguments.output.write_text(text + "\n", encoding="utf-8")
            print(f"Wrote {arguments.output}.")
        return 0


def _kept(path: Path, precision: str) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if row["precision"] != precision]


EXPERT_PARALLEL = ExpertParallelBench()
