"""`switchgear bench live-placement`: throughput under skewed prompts, experts placed by their load against staying put."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """One table."""
    lines = [
        "| model | traffic | ranks | static tokens/s | placed tokens/s | placed / static (quartiles) | static again / static "
        "(quartiles) | max/mean rows, static | placed | epochs |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        rates, load = row["tokens_per_s"], row["max_over_mean"]
        lines.append(
            f"| {row['model']} | {row['traffic']} | {row['num_ranks']} | {rates['static']['median']:.0f} | "
            f"{rates['placed']['median']:.0f} | {_ratio(row['ratio_placed'])} | {_ratio(row['ratio_static_again'])} | "
            f"{load['static']:.2f} | {load['placed']:.2f} | {row['epochs']} |"
        )
    return "\n".join(lines)


def _ratio(values: Mapping[str, float]) -> str:
    return f"{values['median']:.2f} ({values['quartile_1']:.2f}-{values['quartile_3']:.2f})"


class LivePlacementCommand:
    """Two rows a model."""

    help = "compare placement by load with experts that stay put, under skewed prompts"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("models", nargs="*", metavar="MODEL", help="checkpoint directories (default: bundled)")
        parser.add_argument("--ranks", type=int, default=2, help="of each cluster (default: 2)")
        parser.add_argument("--threads", type=int, default=1, help="of each rank (default: 1)")
        parser.add_argument("--num-repeats", type=int, default=7, help="medians are over this many runs (default: 7)")
        parser.add_argument("--launcher", choices=("local", "ray"), default="local", help="default: local")
        parser.add_argument("--output", type=Path, help="write the rows as JSON to this file")

    def run(self, arguments: argparse.Namespace) -> int:
        from switchgear.config import bundled_model
        from switchgear_bench import live_placement, machine
        from switchgear_runtime.model.spec import load_spec

        rows: list[dict[str, Any]] = []
        for model in arguments.models or [str(bundled_model())]:
            name = Path(model).name
            for row in live_placement.run(
                model,
                num_ranks=arguments.ranks,
                num_threads=arguments.threads,
                num_repeats=arguments.num_repeats,
                vocab_size=load_spec(model).vocab_size,
                launcher=arguments.launcher,
            ):
                rows.append({"model": name, **row})
                print(markdown(rows[-1:]).splitlines()[-1], flush=True)
        print(markdown(rows))
        if arguments.output:
            header = machine.describe() | {"when": datetime.now(UTC).isoformat(timespec="seconds")}
            text = json.dumps({"header": header, "rows": rows}, indent=1)
            arguments.output.write_text(text + "\n", encoding="utf-8")
            print(f"Wrote {arguments.output}.")
        return 0


LIVE_PLACEMENT = LivePlacementCommand()
