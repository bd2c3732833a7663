"""`switchgear bench balance`: how even replica choice and lending make a step, simulated from counts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROWS_BALANCED = 4096  # from so many rows a rank on, the split must be even
MAX_OVER_MEAN = 1.03
BATCH = 32  # whose step must hardly notice
RECORDING_STEPS = 48
FRACTION_MAX = 0.01  # of that step, for recording the load and choosing replicas


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a case: how uneven each arm is, and what ours takes of its baseline's predicted time."""
    cases: dict[tuple[int, str, int], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["num_ranks"], row["traffic"], row["rows_per_rank"]), {})[row["arm"]] = row
    lines = [
        "| ranks | traffic | rows a rank | static | ours | EPLB | ours on EPLB | time: ours of static | ours of EPLB | added us |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (num_ranks, traffic, rows_per_rank), arms in cases.items():
        uneven = [f"{arms[a]['max_over_mean_rows']:.3f}" for a in ("static", "ours on static", "eplb", "ours on eplb")]
        ratios = [f"{arms[arm]['time_ratio_to_base']:.3f}" for arm in ("ours on static", "ours on eplb")]
        added = f"{arms['ours on eplb']['added_us']:.0f}"
        lines.append("| " + " | ".join([str(num_ranks), traffic, str(rows_per_rank), *uneven, *ratios, added]) + " |")
    return "\n".join(lines)


def step_line(step: Mapping[str, Any]) -> str:
    return (
        f"Two ranks, batch {step['batch']}, 12 layers of 64 experts: {step['plan_us']:.1f} us a layer for quotas and slots "
        f"(static slots {step['static_us']:.1f} us), {step['added_step_us']:.0f} us a step with the exchanges."
    ) + "".join(
        line(step[name]) for name, line in (("served", served_line), ("recording", recording_line)) if name in step
    )


def served_line(served: Mapping[str, Any]) -> str:
    rates, ratios = served["tokens_per_s"], served["ratio_to_static"]
    return (
        f" A step of the bench checkpoint takes {served['step_us'] / 1e3:.1f} ms there: {100 * served['added_fraction']:.2f} % "
        f"of it. Decoding, {rates['static']:.0f} tokens/s with static slots, {ratios['balanced']:.3f} of that balanced; an A/A "
        f"arm {ratios['static again']:.3f}."
    )


def recording_line(recording: Mapping[str, Any]) -> str:
    return (
        f" Recording the load of that batch takes {recording['recording_us']:.1f} us of a step of "
        f"{recording['step_us'] / 1e3:.1f} ms (one rank, {recording['num_threads']} threads): "
        f"{100 * recording['fraction']:.2f} %."
    )


def step_misses(step: Mapping[str, Any]) -> list[str]:
    """Whether recording and choosing take more of the step than they may."""
    if "served" not in step or "recording" not in step:
        return []
    fraction = step["served"]["added_fraction"] + step["recording"]["fraction"]
    return [f"recording and choosing take {fraction:.2%} of a step"] if fraction > FRACTION_MAX else []


def misses(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What falls short: an uneven large batch, or a step predicted to take longer than static's or EPLB's."""
    found = []
    for row in rows:
        if not row["arm"].startswith("ours"):
            continue
        case = f"{row['num_ranks']} ranks, {row['traffic']}, {row['rows_per_rank']} rows, {row['arm']}"
        if row["rows_per_rank"] >= ROWS_BALANCED and row["max_over_mean_rows_worst"] > MAX_OVER_MEAN:
            found.append(f"{case}: max/mean {row['max_over_mean_rows_worst']:.4f} over {MAX_OVER_MEAN}")
        if row["time_ratio_to_base_worst"] > 1.0:
            found.append(f"{case}: {row['time_ratio_to_base_worst']:.4f} of its baseline's predicted time")
        if row["arm"] == "ours on eplb" and row["time_ratio_to_static"] > 1.0:
            found.append(f"{case}: {row['time_ratio_to_static']:.4f} of static's predicted time")
    return found


class BalanceCommand:
    """Draws traffic, splits it, and says where the split falls short."""

    help = "simulate how evenly replica choice and lending load the ranks, against static slots and EPLB"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 64], help="default: 8 32 64")
        parser.add_argument(
            "--rows-per-rank", type=int, nargs="+", default=[64, 256, 1024, 4096, 16384], help="default: 64 to 16384"
        )
        parser.add_argument("--num-draws", type=int, default=10, help="batches a case (default: 10)")
        parser.add_argument("--seed", type=int, default=1, help="default: 1")
        parser.add_argument(
            "--model",
            help="also decode a batch of it on two ranks, balanced and not, and time how its load is recorded",
        )
        parser.add_argument("--num-repeats", type=int, default=5, help="turns of each arm with --model (default: 5)")
        parser.add_argument("--output", type=Path, help="write the rows as JSON to this file")

    def run(self, arguments: argparse.Namespace) -> int:
        from switchgear_bench import machine
        from switchgear_bench.balance import TRAFFIC, simulate, step_cost

        rows = [
            row
            for num_ranks in arguments.ranks
            for traffic in TRAFFIC
            for rows_per_rank in arguments.rows_per_rank
            for row in simulate(num_ranks, traffic, rows_per_rank, num_draws=arguments.num_draws, seed=arguments.seed)
        ]
        step = step_cost(BATCH)
        if arguments.model:
            from switchgear_bench import balance_step, load_recording

            step["served"] = balance_step.measure(
                arguments.model, BATCH, num_repeats=arguments.num_repeats, added_step_us=step["added_step_us"]
            )
            step["recording"] = load_recording.measure(
                arguments.model,
                BATCH,
                num_threads=machine.num_cores(),
                num_steps=RECORDING_STEPS,
                num_repeats=arguments.num_repeats,
            )
        print(markdown(rows))
        print(f"\n{step_line(step)}")
        short = misses(rows) + step_misses(step)
        print("\n".join(["", *short]) if short else "\nEvery large batch is even, and no step is predicted slower.")
        if arguments.output:
            header = machine.describe() | {"when": datetime.now(UTC).isoformat(timespec="seconds")}
            arguments.output.write_text(
                json.dumps({"header": header, "rows": rows, "step": step}, indent=1) + "\n", encoding="utf-8"
            )
            print(f"Wrote {arguments.output}.")
        return 1 if short else 0


BALANCE = BalanceCommand()
