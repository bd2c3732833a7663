"""Writes the tables of docs/PERFORMANCE.md, between its markers, from bench/results/*.json: no number there is typed by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from switchgear_bench import (
    balance_command,
    expert_parallel_command,
    gpu_report,
    kernels_command,
    live_placement_command,
    migration_command,
    placement_command,
    serve_rows,
    step_profile_command,
    transport_command,
)
from switchgear_runtime.errors import ConfigError

NOT_MEASURED = "Not measured yet."
_MARKERS = re.compile(r"(<!-- begin ([a-z-]+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)
Result = Mapping[str, Any]


def machine_line(header: Result) -> str:
    """Where and when.

    >>> machine_line({"hardware": "X", "cores": 2, "torch": "2", "commit": "abc", "when": "2026-01-02T03:04:05+00:00"})
    'Measured on X, 2 cores, torch 2, at commit abc, 2026-01-02.'
    """
    threads = f", {header['num_threads']} threads" if "num_threads" in header else ""
    when = f", {header['when'][:10]}" if "when" in header else ""
    return (
        f"Measured on {header['hardware']}, {header['cores']} cores{threads}, torch {header['torch']}, "
        f"at commit {header['commit']}{when}."
    )


def _serve(result: Result) -> str:
    return serve_rows.markdown(result)


def _expert_parallel(result: Result) -> str:
    return f"{expert_parallel_command.markdown(result['rows'])}\n\n{machine_line(result['header'])}"


def _kernels(result: Result) -> str:
    header, rows = result["header"], result["rows"]
    parts = [
        f"### {kernel}\n\n" + kernels_command.markdown([row for row in rows if row["kernel"] == kernel])
        for kernel in dict.fromkeys(row["kernel"] for row in rows)
    ]
    peaks = ", ".join(f"{peak:.0f} GFLOP/s {name}" for name, peak in header["peak_gflops_per_s"].items())
    memory = [row["bandwidth_gb_per_s"] for row in rows if row["operands_from"] == "memory"]
    seen = f"{min(memory):.1f} to {max(memory):.1f} GB/s from memory, " if memory else ""
    parts.append(
        f"{machine_line(header)} Instruction set {header['instruction_set']}. The machine gave {peaks}; "
        f"{seen}{header['cache_gb_per_s']:.0f} GB/s from the L2 caches."
    )
    return "\n\n".join(parts)


def _profile(result: Result) -> str:
    return f"{step_profile_command.markdown(result['rows'])}\n\n{machine_line(result['header'])}"


def _balance(result: Result) -> str:
    step = balance_command.step_line(result["step"])
    return f"{balance_command.markdown(result['rows'])}\n\n{step} {machine_line(result['header'])}"


def _transport(result: Result) -> str:
    versions = "; ".join(f"{name}: {version.split(',')[0]}" for name, version in result["header"]["versions"].items())
    return f"{transport_command.markdown(result['rows'])}\n\n{machine_line(result['header'])} {versions}."


def _placement(result: Result) -> str:
    header = result["header"]
    trace = f" Recorded: {header['trace']}." if header["trace"] else ""
    return f"{placement_command.markdown(result['rows'])}\n\n{machine_line(header)}{trace}"


def _migration(result: Result) -> str:
    return f"{migration_command.markdown(result['rows'])}\n\n{machine_line(result['header'])}"


def _live_placement(result: Result) -> str:
    return f"{live_placement_command.tables(result['rows'])}\n\n{machine_line(result['header'])}"


def _startup(result: Result) -> str:
    lines = [
        "| launcher | ranks | weight cache | first token s | ready s | loading a rank s | PSS MB | allowed MB | of allowed |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        cells = [
            row["launcher"],
            str(row["num_ranks"]),
            row["weight_cache"],
            f"{row['first_token_s']:.2f}",
            f"{row['ready_s']:.2f}",
            f"{row['rank_load_s']:.2f}",
            f"{row['pss_bytes'] / 1e6:.0f}",
            f"{row['pss_bytes_allowed'] / 1e6:.0f}",
            f"{row['pss_fraction_of_allowed']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\n{machine_line(result['header'])}"


def _perplexity(result: Result) -> str:
    header, rows = result["header"], result["rows"]
    texts = list(rows[0]["over_plain_by_text"])
    title = ["weights", "perplexity", "over unquantised", *texts, "weight bytes"]
    lines = ["| " + " | ".join(title) + " |", "|---" + "|---:" * (len(title) - 1) + "|"]
    for row in rows:
        cells = [
            row["quantization"],
            f"{row['perplexity']:.4f}",
            f"{100 * row['over_plain']:+.2f} %",
            *(f"{100 * row['over_plain_by_text'][text]:+.2f} %" for text in texts),
            f"{100 * row['weight_bytes_of_plain']:.0f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    about = f"{header['model']}, {rows[0]['num_tokens']} held-out tokens. {machine_line(header)}"
    return "\n".join(lines) + f"\n\n{about}"


SECTIONS: dict[str, tuple[str, Callable[[Result], str]]] = {
    "serve": ("serve.json", _serve),
    "expert-parallel": ("expert-parallel.json", _expert_parallel),
    "profile": ("profile.json", _profile),
    "balance": ("balance.json", _balance),
    "kernels": ("kernels.json", _kernels),
    "transport": ("transport.json", _transport),
    "placement": ("placement.json", _placement),
    "migration": ("migration.json", _migration),
    "live-placement": ("live-placement.json", _live_placement),
    "startup": ("startup.json", _startup),
    "perplexity": ("perplexity-tiny-moe.json", _perplexity),
    "gpu": ("gpu.json", gpu_report.kernels),
    "gpu-steps": ("gpu.json", gpu_report.steps),
}
NOTHING = {"gpu": gpu_report.NOT_MEASURED, "gpu-steps": gpu_report.NOT_MEASURED}  # where not NOT_MEASURED


def section(name: str, results: Path, plots: Path) -> str:
    """What stands between the markers of a section: its table, and its plot if that was drawn."""
    file, write = SECTIONS[name]
    path = results / file
    if not path.is_file():
        return NOTHING.get(name, NOT_MEASURED)
    text = write(json.loads(path.read_text(encoding="utf-8"))).strip()
    plot = plots / f"{name}.svg"
    return f"![{name}]({plots.name}/{plot.name})\n\n{text}" if plot.is_file() else text


def render(document: str, results: Path, plots: Path) -> str:
    """The document with all sections written anew. A marker that nobody writes, or a missing one, is a ConfigError; those of
    what needs a machine of its own may be missing until there are results."""
    found = [match.group(2) for match in _MARKERS.finditer(document)]
    needed = [
        name
        for name, (file, _) in SECTIONS.items()
        if name in found or name not in NOTHING or (results / file).is_file()
    ]
    if sorted(found) != sorted(needed):
        raise ConfigError(f"the document has the markers {found}; it needs one pair each of {', '.join(needed)}")
    return _MARKERS.sub(
        lambda match: f"{match.group(1)}{section(match.group(2), results, plots)}\n{match.group(3)}", document
    )
