"""What docs/PERFORMANCE.md says of `bench gpu`'s rows: tables of the kernels (`kernels`) and of the engine's steps (`steps`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from switchgear_bench.gpu_goals import LAYER, LAYER_MEAN
from switchgear_runtime.errors import ConfigError

Row = Mapping[str, Any]
Result = Mapping[str, Any]
NOT_MEASURED = "Nothing has been measured on a GPU yet."
_MOVING = ("dispatch", "combine", "pack fp8", "unpack fp8")
_DENSE = ("attention decode", "attention prefill", "qkv", "norm", "router", "draw")
_STEPS = ("decode", "prefill")


def kernels(result: Result) -> str:
    rows = _measured(result)
    parts = [_goals(rows), *_layers(rows), _moving(rows), _dense(rows), _exchanges(rows), _failures(rows)]
    return "\n\n".join([*filter(None, parts), _machine(result)])


def steps(result: Result) -> str:
    rows = [row for row in _measured(result) if row["kernel"] in _STEPS and "error" not in row]
    if not rows:
        return f"No steps of the engine are among the rows.\n\n{_machine(result)}"
    cells = [
        [
            row["kernel"],
            str(row["num_tokens"]),
            str(row["context"]),
            f"{row['time_us'] / 1e3:.2f}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['bound_us'] / 1e3:.2f}",
            row["bound_by"],
            f"{row['fraction_of_bound']:.2f}",
        ]
        for row in rows
    ]
    title = ["step", "tokens", "positions each", "ms", "tokens/s", "bound ms", "by", "of bound"]
    return f"{rows[0]['shape']}, random weights.\n\n{_table(title, cells)}\n\n{_machine(result)}"


def _measured(result: Result) -> Sequence[Row]:
    rows: Sequence[Row] = result["rows"]
    if any(row["device"] != "cuda" for row in rows):
        raise ConfigError("rows of `bench gpu --device twin` measure nothing; the report takes those of a GPU")
    return rows


def _goals(rows: Sequence[Row]) -> str:
    """What was to be reached: each goal once, with the cell that is furthest from it."""
    cells = []
    for goal in dict.fromkeys((row["kernel"], row["goal"]) for row in rows if row.get("goal")):
        held = [row for row in rows if (row["kernel"], row.get("goal")) == goal]
        judged = [row for row in held if row["passed"] is not None]
        worst = min(judged, key=_reached, default=None)
        cells.append(
            [
                goal[0],
                goal[1],
                f"{sum(bool(row['passed']) for row in judged)} of {len(held)}",
                "" if worst is None else f"{_reached(worst):.2f} ({_where(worst)})",
            ]
        )
    return _table(["goal of", "is", "met by rows", "the furthest from it"], cells) if cells else ""


def _reached(row: Row) -> float:
    if "error" in row:
        return 0.0
    return float(row["fraction_of_bound"] if row["goal"].startswith("of bound") else row["ratio_to_baseline"])


def _where(row: Row) -> str:
    size = f"{row['num_tokens']} tokens" if row["num_tokens"] and row["kernel"] != LAYER_MEAN else ""
    return ", ".join(filter(None, (row["shape"], row.get("variant", ""), size)))


def _layers(rows: Sequence[Row]) -> Iterable[str]:
    """A table for each shape and variant, a column for each number of tokens."""
    cells = [row for row in rows if row["kernel"] == LAYER and "error" not in row]
    for shape, variant in dict.fromkeys((row["shape"], row["variant"]) for row in cells):
        chosen = [row for row in cells if (row["shape"], row["variant"]) == (shape, variant)]
        peers = dict.fromkeys(name for row in chosen for name in row["peers"])
        lines = [
            ["switchgear", *(_us(row["time_us"], row["graph"]) for row in chosen)],
            *([name, *(_peer(row, name) for row in chosen)] for name in peers),
            ["ratio to the fastest peer", *(_ratio(row) for row in chosen)],
            ["bound", *(f"{row['bound_us']:.1f}" for row in chosen)],
            ["of bound", *(f"{row['fraction_of_bound']:.2f}" for row in chosen)],
        ]
        title = [f"{shape}, {variant}: us", *(str(row["num_tokens"]) for row in chosen)]
        yield _table(title, lines)
    means = [row for row in rows if row["kernel"] == LAYER_MEAN]
    if means:
        lines = [
            [
                row["shape"],
                row["variant"],
                str(len(row["sizes"])),
                f"{row['ratio_to_baseline']:.2f}",
                f"{row['worst_ratio']:.2f} at {row['worst_tokens']}",
                f"{row['fraction_of_bound']:.2f}",
            ]
            for row in means
        ]
        yield _table(["geometric means", "routing", "sizes", "ratio to the fastest peer", "lowest", "of bound"], lines)


def _moving(rows: Sequence[Row]) -> str:
    lines = [
        [
            row["kernel"],
            row["shape"],
            str(row["num_tokens"]),
            f"{row['time_us']:.1f}",
            f"{row['fraction_of_bound']:.2f}",
            f"{row['ratio_to_baseline']:.2f} ({row['baseline']}{'' if row.get('baseline_graph', True) else ', no graph'})",
        ]
        for row in rows
        if row["kernel"] in _MOVING and "error" not in row
    ]
    return _table(["rows that move", "shape", "tokens", "us", "of copy bandwidth", "ratio to"], lines) if lines else ""


def _dense(rows: Sequence[Row]) -> str:
    lines = [
        [
            row["kernel"],
            str(row["num_tokens"]),
            f"{row['time_us']:.1f}",
            f"{row['fraction_of_bound']:.2f}",
            row["bound_by"],
            f"{row['ratio_to_baseline']:.2f} ({row['baseline']}{'' if row.get('baseline_graph', True) else ', no graph'})",
        ]
        for row in rows
        if row["kernel"] in _DENSE and "error" not in row
    ]
    return _table(["beside products", "tokens", "us", "of bound", "by", "ratio to"], lines) if lines else ""


def _exchanges(rows: Sequence[Row]) -> str:
    lines = [
        [
            row["shape"],
            row["variant"],
            str(row["num_tokens"]),
            f"{row['time_us']:.1f}",
            f"{row['fraction_of_bound']:.2f}",
        ]
        for row in rows
        if row["kernel"] == "exchange" and "error" not in row
    ]
    return _table(["exchange between", "over", "rows to each", "us", "of copy bandwidth"], lines) if lines else ""


def _failures(rows: Sequence[Row]) -> str:
    """What failed, and what a budget left out: a report that is silent of them would be of other rows."""
    lines = [
        f"- {' '.join(filter(None, (row['kernel'], _where(row))))}: {row['error']}" for row in rows if "error" in row
    ]
    lines += [
        f"- {LAYER} {_where(row)}: {name} failed: {error}"
        for row in rows
        for name, error in row.get("errors", {}).items()
    ]
    lines += [f"- left out for time: {', '.join(row['left_out'])}" for row in rows if "left_out" in row]
    return "\n".join(["Not measured:", "", *lines]) if lines else ""


def _machine(result: Result) -> str:
    machine, rates = result["machine"], next((row for row in result["rows"] if "copy_gb_per_s" in row), None)
    found = [
        f"Measured on {machine['GPUs']}",
        f"driver {machine['driver']}",
        "torch's CUDA {torch's CUDA}".format_map(machine),
        *(
            f"{name} {machine[name]}"
            for name in ("torch", "triton", "transformers", "commit", "when")
            if name in machine
        ),
    ]
    reached = (
        f" A copy moved {rates['copy_gb_per_s']:.0f} GB/s, read and written, and a large bf16 product "
        f"{rates['product_tflops_per_s']:.0f} TFLOP/s."
        if rates
        else ""
    )
    return f"{', '.join(found)}.{reached} Times are of a captured graph; those marked * could not be captured."


def _us(time_us: float, is_graph: bool) -> str:
    return f"{time_us:.1f}" if is_graph else f"{time_us:.1f}*"


def _peer(row: Row, name: str) -> str:
    peer = row["peers"].get(name)
    return "failed" if peer is None else _us(peer["time_us"], peer["graph"])


def _ratio(row: Row) -> str:
    return "" if row["ratio_to_baseline"] is None else f"{row['ratio_to_baseline']:.2f}"


def _table(title: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = ["| " + " | ".join(title) + " |", "|---" + "|---:" * (len(title) - 1) + "|"]
    return "\n".join([*head, *("| " + " | ".join(line) + " |" for line in lines)])
