"""What `bench gpu`'s rows are held to: `judged` marks each row that has a goal, `summary` adds the layer's mean over sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import exp, log
from typing import Any

Row = Mapping[str, Any]
LAYER, LAYER_MEAN = "moe layer", "moe layer, mean"  # rows' kernels
EVERY_RATIO, MEAN_RATIO = 1.0, 1.1  # to the fastest peer
COPY_FRACTION = 0.85  # of the copy bandwidth
_COPY_TOKENS = 4096
_COPIES = ("dispatch", "combine")


def goal(row: Row) -> str | None:
    """In words; None: the row has none."""
    if row["kernel"] == LAYER:
        return f"ratio >= {EVERY_RATIO}"
    if row["kernel"] == LAYER_MEAN:
        return f"ratio >= {MEAN_RATIO}"
    if row["kernel"] in _COPIES and row["num_tokens"] == _COPY_TOKENS:
        return f"of bound >= {COPY_FRACTION}"
    return None


def judged(row: Row) -> dict[str, Any]:
    """With `goal` and `passed`, where it has one and what it needs was measured."""
    words = goal(row)
    if words is None:
        return dict(row)
    if "error" in row:
        return {**row, "goal": words, "passed": False}
    if row["kernel"] in _COPIES:
        return {**row, "goal": words, "passed": row["fraction_of_bound"] >= COPY_FRACTION}
    if row["ratio_to_baseline"] is None:
        return {**row, "goal": words, "passed": None}
    least = MEAN_RATIO if row["kernel"] == LAYER_MEAN else EVERY_RATIO
    return {**row, "goal": words, "passed": row["ratio_to_baseline"] >= least}


def summary(rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
    """Of each shape and variant of the layer: the geometric means of the ratio and of the fraction, over its sizes."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["kernel"] == LAYER and row.get("ratio_to_baseline"):
            groups.setdefault((row["shape"], row["variant"]), []).append(row)
    for (shape, variant), cells in groups.items():
        worst = min(cells, key=lambda row: row["ratio_to_baseline"])
        yield {
            "kernel": LAYER_MEAN,
            "shape": shape,
            "variant": variant,
            "num_tokens": len(cells),
            "sizes": [row["num_tokens"] for row in cells],
            "ratio_to_baseline": _mean(row["ratio_to_baseline"] for row in cells),
            "fraction_of_bound": _mean(row["fraction_of_bound"] for row in cells),
            "worst_tokens": worst["num_tokens"],
            "worst_ratio": worst["ratio_to_baseline"],
            "baseline": "the fastest peer of each size",
        }


def _mean(values: Iterable[float]) -> float:
    logs = [log(value) for value in values]
    return exp(sum(logs) / len(logs))
