"""The plots of docs/PERFORMANCE.md as SVG, by matplotlib where it is installed; each says which rows it was drawn from."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

Row = Mapping[str, Any]
_DIGEST = "<!-- drawn from rows {} -->\n"
_INCHES = (8.0, 3.6)


def have_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def digest(rows: Sequence[Row]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def is_current(plot: Path, rows: Sequence[Row]) -> bool:
    return plot.is_file() and plot.read_text(encoding="utf-8").endswith(_DIGEST.format(digest(rows)))


def _serve(figure: Any, rows: Sequence[Row]) -> None:
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    for place, precision in enumerate(precisions):
        chosen = [row for row in rows if row["precision"] == precision]
        cases, runtimes = (list(dict.fromkeys(row[name] for row in chosen)) for name in ("case", "runtime"))
        rates = {(row["runtime"], row["case"]): row["tokens_per_s"] for row in chosen}
        axes = figure.add_subplot(1, len(precisions), place + 1)
        best = {case: max(rates.get((name, case), 0.0) for name in runtimes) for case in cases}
        width = 0.8 / len(runtimes)
        for i, name in enumerate(runtimes):
            heights = [rates.get((name, case), 0.0) / best[case] for case in cases]
            axes.bar([x + i * width for x in range(len(cases))], heights, width, label=name)
        axes.set_xticks([x + 0.4 - width / 2 for x in range(len(cases))], cases, rotation=30, ha="right")
        axes.set_title(precision)
        axes.set_ylabel("tokens/s, the best is 1" if place == 0 else "")
        axes.legend(fontsize="small", loc="lower left")


def _kernels(figure: Any, rows: Sequence[Row]) -> None:
    for place, kernel in enumerate(("linear", "experts")):
        chosen = [row for row in rows if row["kernel"] == kernel]
        formats, sizes = (list(dict.fromkeys(row[name] for row in chosen)) for name in ("format", "num_tokens"))
        axes = figure.add_subplot(1, 2, place + 1)
        for i, format in enumerate(formats):
            heights = [
                median(r["fraction_of_bound"] for r in chosen if r["format"] == format and r["num_tokens"] == size)
                for size in sizes
            ]
            width = 0.8 / len(formats)
            axes.bar([x + i * width for x in range(len(sizes))], heights, width, label=format)
        axes.axhline(1.0, color="black", linewidth=0.5)
        axes.set_xticks([x + 0.3 for x in range(len(sizes))], sizes)
        axes.set_xlabel("tokens")
        axes.set_title(f"{kernel}, median of shapes")
        axes.set_ylabel("fraction of the bound" if place == 0 else "")
        axes.legend(fontsize="small", loc="lower left")


def _transport(figure: Any, rows: Sequence[Row]) -> None:
    axes = figure.add_subplot(1, 1, 1)
    for name in ("memcpy", "shm", "shm in place", "mpich", "openmpi"):
        cells = [row for row in rows if row["call"] == "all_to_all_v" and row["contender"] == name]
        axes.plot([row["num_bytes"] for row in cells], [row["time_us"] for row in cells], label=name, marker=".")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("bytes to the peer")
    axes.set_ylabel("us an exchange")
    axes.legend(fontsize="small")


def _gpu(figure: Any, rows: Sequence[Row]) -> None:
    """The layer of experts by number of tokens, uniform routing without the router: a panel per shape."""
    cells = [row for row in rows if row["kernel"] == "moe layer" and row["variant"] == "uniform" and "time_us" in row]
    shapes = list(dict.fromkeys(row["shape"] for row in cells))
    for place, shape in enumerate(shapes):
        chosen = [row for row in cells if row["shape"] == shape]
        sizes = [row["num_tokens"] for row in chosen]
        axes = figure.add_subplot(1, len(shapes), place + 1)
        axes.plot(sizes, [row["time_us"] for row in chosen], label="switchgear", marker=".", color="black")
        for name in dict.fromkeys(name for row in chosen for name in row["peers"]):
            of_peer = [(row["num_tokens"], row["peers"][name]["time_us"]) for row in chosen if name in row["peers"]]
            axes.plot(*zip(*of_peer, strict=True), label=name, marker=".")
        axes.plot(sizes, [row["bound_us"] for row in chosen], label="bound", linestyle="dotted", color="gray")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens")
        axes.set_ylabel("us" if place == 0 else "")
        axes.set_title(shape)
        axes.legend(fontsize="small")


def _gpu_steps(figure: Any, rows: Sequence[Row]) -> None:
    """Fractions of the bound: of the layer by number of tokens, and of the engine's steps."""
    layers = [row for row in rows if row["kernel"] == "moe layer" and "fraction_of_bound" in row]
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    for shape, variant in dict.fromkeys((row["shape"], row["variant"]) for row in layers):
        chosen = [row for row in layers if (row["shape"], row["variant"]) == (shape, variant)]
        sizes, heights = ([row[name] for row in chosen] for name in ("num_tokens", "fraction_of_bound"))
        left.plot(sizes, heights, label=f"{shape}, {variant}", marker=".")
    left.set_xscale("log", base=2)
    left.set_xlabel("tokens")
    left.set_ylabel("fraction of the bound")
    left.set_title("layer of experts")
    if layers:
        left.legend(fontsize="x-small")
    steps = [row for row in rows if row["kernel"] in ("decode", "prefill") and "fraction_of_bound" in row]
    right.bar([f"{row['kernel']} {row['num_tokens']}" for row in steps], [row["fraction_of_bound"] for row in steps])
    right.set_title("steps of the engine")
    for axes in (left, right):
        axes.axhline(1.0, color="black", linewidth=0.5)
        axes.set_ylim(bottom=0.0)


PLOTS: dict[str, Callable[[Any, Sequence[Row]], None]] = {
    "serve": _serve,
    "kernels": _kernels,
    "transport": _transport,
    "gpu": _gpu,
    "gpu-steps": _gpu_steps,
}


def draw(name: str, rows: Sequence[Row], plot: Path) -> None:
    """Writes the SVG. The same rows give the same file, by one version of matplotlib."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    plot.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure = Figure(figsize=_INCHES, layout="constrained")
        PLOTS[name](figure, rows)
        figure.savefig(plot, format="svg", metadata={"Date": None})
    with plot.open("a", encoding="utf-8") as file:
        file.write(_DIGEST.format(digest(rows)))
