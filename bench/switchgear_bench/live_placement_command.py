"""`switchgear bench live-placement`: throughput under skewed prompts, experts placed by their load against staying put."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def alternating_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """One table."""
    lines = [
        "| model | ranks | window s | windows | loads apart | static tokens/s | placed tokens/s | placed / static (quartiles) | "
        "static again / static (quartiles) | plans | migrations | MB moved | MB granted |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        rates = row["tokens_per_s"]
        lines.append(
            f"| {row['model']} | {row['num_ranks']} | {row['window_s']:g} | {row['num_windows']} | {row['apart']:.2f} | "
            f"{rates['static']['median']:.0f} | {rates['placed']['median']:.0f} | {_ratio(row['ratio_placed'])} | "
            f"{_ratio(row['ratio_static_again'])} | {row['plans']} | {row['migrations']} | "
            f"{row['moved_bytes'] / 1e6:.1f} | {row['budget_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of each part that was measured."""
    steady = [row for row in rows if row["part"] == "steady"]
    alternating = [row for row in rows if row["part"] == "alternating"]
    return "\n\n".join(
        [
            *([markdown(steady)] if steady else []),
            *(
                [f"Hot sets that change places at every window:\n\n{alternating_markdown(alternating)}"]
                if alternating
                else []
            ),
        ]
    )


def _ratio(values: Mapping[str, float]) -> str:
    return f"{values['median']:.2f} ({values['quartile_1']:.2f}-{values['quartile_3']:.2f})"


class LivePlacementCommand:
    """Three rows a model: two of prompts that keep to their hot set, one of prompts that alternate between two."""

    help = "compare placement by load with experts that stay put, under skewed prompts"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("models", nargs="*", metavar="MODEL", help="checkpoint directories (default: bundled)")
        parser.add_argument(
            "--parts",
            nargs="+",
            choices=PARTS,
            default=PARTS,
            help="steady: prompts of one hot set; alternating: of two in turn, at the controller's window (default: both)",
        )
        parser.add_argument("--ranks", type=int, default=2, help="of each cluster (default: 2)")
        parser.add_argument("--threads", type=int, default=1, help="of each rank (default: 1)")
        parser.add_argument("--num-repeats", type=int, default=7, help="medians are over this many runs (default: 7)")
        parser.add_argument("--launcher", choices=("local", "ray"), default="local", help="default: local")
        parser.add_argument(
            "--output", type=Path, help="write the rows as JSON to this file; other models' and parts' stay"
        )

    def run(self, arguments: argparse.Namespace) -> int:
        from switchgear.config import bundled_model
        from switchgear_bench import machine

        rows: list[dict[str, Any]] = []
        header = machine.describe() | {"when": datetime.now(UTC).isoformat(timespec="seconds")}
        for model in arguments.models or [str(bundled_model())]:
            for part in arguments.parts:
                for row in _PART_ROWS[part](model, arguments):
                    rows.append({"part": part, "model": Path(model).name, "commit": header["commit"], **row})
                    print(tables(rows[-1:]).splitlines()[-1], flush=True)
        print(tables(rows))
        if arguments.output:
            measured = {(row["model"], row["part"]) for row in rows}
            kept: list[dict[str, Any]] = []
            if arguments.output.is_file():
                kept = json.loads(arguments.output.read_text(encoding="utf-8"))["rows"]
            rows = [row for row in kept if (row["model"], row["part"]) not in measured] + rows
            text = json.dumps({"header": header, "rows": rows}, indent=1)
            arguments.output.write_text(text + "\n", encoding="utf-8")
            print(f"Wrote {arguments.output}.")
        return 0


def _steady(model: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from switchgear_bench import live_placement
    from switchgear_runtime.model.spec import load_spec

    yield from live_placement.run(
        model,
        num_ranks=arguments.ranks,
        num_threads=arguments.threads,
        num_repeats=arguments.num_repeats,
        vocab_size=load_spec(model).vocab_size,
        launcher=arguments.launcher,
    )


def _alternating(model: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from switchgear_bench import alternating

    yield alternating.run(
        model,
        num_ranks=arguments.ranks,
        num_threads=arguments.threads,
        num_repeats=arguments.num_repeats,
        launcher=arguments.launcher,
    )


_PART_ROWS: dict[str, Callable[[str, argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "steady": _steady,
    "alternating": _alternating,
}
PARTS = tuple(_PART_ROWS)
LIVE_PLACEMENT = LivePlacementCommand()
