"""`switchgear bench migration`: step times while experts migrate, against the same steps while none do."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

CLOCKS = ("wall", "cpu", "layers")


class MigrationCommand:
    """One JSON file with a header and one row."""

    help = "step times (p50, p99, p99.9) while experts migrate back to back, against the same without"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("model", nargs="?", default="", help="checkpoint (default: the bundled model)")
        parser.add_argument("--ranks", type=int, default=2, help="an even number (default: 2)")
        parser.add_argument("--steps", type=int, default=10_000, help="of each arm (default: 10000)")
        parser.add_argument("--block-steps", type=int, default=500, help="of one arm at a time (default: 500)")
        parser.add_argument("--batch-size", type=int, default=8, help="sequences a rank (default: 8)")
        parser.add_argument(
            "--experts-per-s", type=int, default=300, help="bound of the pace, over all ranks (default: 300)"
        )
        parser.add_argument("--moves-per-map", type=int, default=16, help="to each rank (default: 16)")
        parser.add_argument(
            "--source", default="auto", choices=("auto", "peer", "checkpoint"), help="of the experts (default: auto)"
        )
        parser.add_argument("--seed", type=int, default=1)
        parser.add_argument(
            "--lock", type=Path, help="advisory lock file, held while steps are timed and let go of every minute"
        )
        parser.add_argument(
            "--output", type=Path, help="write the row as JSON to this file; rows of other models and ranks stay"
        )

    def run(self, arguments: argparse.Namespace) -> int:
        from switchgear.config import bundled_model
        from switchgear_bench import machine, migration
        from switchgear_runtime.model.footprint import run_dtype, slot_bytes
        from switchgear_runtime.model.spec import load_spec

        model = arguments.model or str(bundled_model())
        spec = load_spec(model)
        if arguments.ranks < 2 or arguments.ranks % 2:
            raise SystemExit(f"--ranks {arguments.ranks} must be an even number: ranks swap experts in pairs")
        row = migration.run(
            migration.Setup(
                model=model,
                ranks=arguments.ranks,
                steps=arguments.steps,
                block_steps=arguments.block_steps,
                batch_size=arguments.batch_size,
                experts_per_s=arguments.experts_per_s,
                moves_per_map=arguments.moves_per_map,
                source=arguments.source,
                seed=arguments.seed,
                lock=arguments.lock,
                expert_bytes=slot_bytes(spec, run_dtype(spec, "auto")),
            )
        )
        row["model"] = Path(model).name
        if arguments.output is not None:
            header = machine.describe() | {"when": datetime.now(UTC).isoformat(timespec="seconds")}
            rows = [*_kept(arguments.output, row), row]
            text = json.dumps({"header": header, "rows": rows}, indent=1)
            arguments.output.write_text(text + "\n", encoding="utf-8")
        sys.stdout.write(_table(row))
        return 0


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table a row."""
    return "\n\n".join(_table(row).strip() for row in rows)


def _kept(path: Path, measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if (row["model"], row["ranks"]) != (measured["model"], measured["ranks"])]


def _table(row: Mapping[str, Any]) -> str:
    lines = [
        f"{row['model']}, {row['ranks']} ranks, {row['batch_size']} sequences each, {row['rounds']} rounds, "
        f"{row['steps_per_arm']} steps an arm, {row['num_flips']} flips, {row['experts_per_s']:.0f} experts/s "
        f"({row['moved_bytes_per_s'] / 1e6:.0f} MB/s) from {row['source']}",
        "",
        "| clock | percentile | none, us | none again | migrating | ratio (95 %) | equal arms | 95 % of equal arms |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for clock in CLOCKS:
        for name, cell in row[clock].items():
            if name != "mean_us":
                low, high = cell["ratio_95"]
                lines.append(
                    f"| {clock} | {name} | {cell['none_us']:.0f} | {cell['none_again_us']:.0f} | "
                    f"{cell['migrating_us']:.0f} | {cell['ratio']:.3f} ({low:.3f}-{high:.3f}) | "
                    f"{cell['equal_arms_ratio']:.3f} | {cell['equal_arms_bound']:.3f} |"
                )
    flip = row["flip_step_us"]
    lines.append(
        f"\nSteps that flipped: median {flip['p50']:.0f} us, longest {flip['max']:.0f} us. Threads beside the steps: "
        f"{row['other_threads_us_per_expert']:.0f} us of CPU an expert."
    )
    return "\n".join(lines) + "\n"


MIGRATION = MigrationCommand()
