"""Rows of `bench serve`: from rates to JSON with bounds and ratios, and the Markdown tables made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from switchgear_bench.serve import pair_ratios, spread
from switchgear_bench.serve_bound import Model
from switchgear_bench.serve_cases import Case
from switchgear_bench.serve_runners import OURS


def rows(
    case: Case,
    precision: str,
    rates: Mapping[str, Sequence[float]],
    *,
    model: Model,
    tensor_bytes: Mapping[str, Mapping[str, float]],
    distinct_experts: float | None,
    bandwidth: float,
    peak: float,
    descriptions: Mapping[str, Mapping[str, Any]],
) -> Iterator[dict[str, Any]]:
    """One a runtime; ratios are ours to theirs."""
    for name, samples in rates.items():
        work = model.work(case, tensor_bytes[name], distinct_experts)
        bound = work.bound_tokens_per_s(case, bandwidth, peak)
        middle = spread(samples)
        yield {
            "runtime": name,
            "version": descriptions[name]["version"],
            "case": case.name,
            "precision": precision,
            "batch_size": case.batch_size,
            "prompt_tokens": case.prompt_tokens,
            "new_tokens": case.new_tokens,
            "tokens_per_s": middle["median"],
            "spread": middle,
            "samples": list(samples),
            "bytes_touched": work.bytes_touched,
            "flops": work.flops,
            "distinct_experts": work.distinct_experts,
            "bandwidth_gb_per_s": bandwidth / 1e9,
            "peak_gflops_per_s": peak / 1e9,
            "bound_tokens_per_s": bound,
            "fraction_of_bound": middle["median"] / bound,
            "ours_to_this": pair_ratios(rates[OURS], samples) if OURS in rates and name != OURS else None,
        }


def _cell(row: Mapping[str, Any]) -> str:
    return f"{row['tokens_per_s']:.0f}" if row["tokens_per_s"] >= 200 else f"{row['tokens_per_s']:.1f}"


def _machine(row: Mapping[str, Any]) -> str:
    return f"{row['bandwidth_gb_per_s']:.0f}, {row['peak_gflops_per_s']:.0f}" if "peak_gflops_per_s" in row else ""


def markdown(result: Mapping[str, Any]) -> str:
    """Tokens per second by runtime and case, then our ratio to the best peer and the fraction of the bound."""
    all_rows: list[dict[str, Any]] = result["rows"]
    lines = []
    for precision in dict.fromkeys(row["precision"] for row in all_rows):
        chosen = [row for row in all_rows if row["precision"] == precision]
        cases = list(dict.fromkeys(row["case"] for row in chosen))
        runtimes = list(dict.fromkeys(row["runtime"] for row in chosen))
        at = {(row["runtime"], row["case"]): row for row in chosen}
        lines += [f"| {precision}, tokens/s | " + " | ".join(cases) + " |", "|---" * (1 + len(cases)) + "|"]
        for name in runtimes:
            version = next(row["version"] for row in chosen if row["runtime"] == name)
            cells = [_cell(at[name, case]) if (name, case) in at else "" for case in cases]
            lines.append(f"| {name} {version} | " + " | ".join(cells) + " |")
        bound_of = OURS if OURS in runtimes else runtimes[0]
        if all((bound_of, case) in at for case in cases):
            bounds = [f"{at[bound_of, case]['bound_tokens_per_s']:.0f}" for case in cases]
            machines = [at[bound_of, case] for case in cases]
            lines.append(f"| bound ({bound_of}'s bytes) | " + " | ".join(bounds) + " |")
            lines.append("| memory GB/s, bf16 GFLOP/s, beside | " + " | ".join(map(_machine, machines)) + " |")
        if OURS in runtimes:
            fractions = [f"{at[OURS, case]['fraction_of_bound']:.2f}" for case in cases]
            lines.append("| ours / bound | " + " | ".join(fractions) + " |")
            for name in runtimes:
                if name == OURS:
                    continue
                ratios = [at[name, case]["ours_to_this"] for case in cases]
                cells = [f"{r['median']:.2f} ({r['quartile_1']:.2f}-{r['quartile_3']:.2f})" for r in ratios]
                lines.append(f"| ours / {name}, median of pairs (quartiles) | " + " | ".join(cells) + " |")
        lines.append("")
    header = result["header"]
    return "\n".join([*lines, f"{header['hardware']}, {header['num_threads']} threads, commit {header['commit']}."])
