"""Tables and plots of GPU rows, from rows that are made up: no result of them is ever committed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from switchgear.cli import main
from switchgear_bench.gpu_goals import LAYER, LAYER_MEAN, judged, summary
from switchgear_bench.report import render
from switchgear_bench.report_plots import have_matplotlib
from switchgear_runtime.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
MARKERS = "".join(f"<!-- begin {name} -->\n<!-- end {name} -->\n" for name in ("gpu", "gpu-steps"))
MACHINE = {"GPUs": "a made-up GPU", "driver": "1.2", "torch's CUDA": "13.0"}
RATES = {"device": "cuda", "copy_gb_per_s": 4300.0, "product_tflops_per_s": 780.0}


def document() -> str:
    """The real one, with GPU sections if it has none yet."""
    text = (ROOT / "docs" / "PERFORMANCE.md").read_text(encoding="utf-8")
    return text if "<!-- begin gpu -->" in text else text + MARKERS


def layer(num_tokens: int, ratio: float, *, variant: str = "uniform") -> dict[str, Any]:
    peers = {
        "triton fused moe": {"time_us": 10.0 * ratio, "ratio": ratio, "graph": True},
        "transformers grouped_mm": {"time_us": 99.0, "ratio": 9.9, "graph": False},
    }
    bound = {"time_us": 10.0, "bound_us": 6.0, "bound_by": "bytes", "fraction_of_bound": 0.6, "graph": True}
    return {
        "kernel": LAYER,
        "shape": "Made-Up-30B",
        "variant": variant,
        "num_tokens": num_tokens,
        "errors": {},
        "peers": peers,
        "baseline": "triton fused moe",
        "baseline_us": 10.0 * ratio,
        "ratio_to_baseline": ratio,
        **bound,
        **RATES,
    }


def moved(kernel: str, fraction: float) -> dict[str, Any]:
    row = {"kernel": kernel, "shape": "Made-Up-30B", "variant": "", "num_tokens": 4096, "fraction_of_bound": fraction}
    return {**row, "time_us": 140.0, "bound_us": 130.0, "baseline": "torch", "ratio_to_baseline": 3.0, **RATES}


def step(kernel: str, num_tokens: int) -> dict[str, Any]:
    row = {"kernel": kernel, "shape": "Made-Up-30B", "num_tokens": num_tokens, "context": 512, "tokens_per_s": 123.4}
    return {**row, "time_us": 8e3, "bound_us": 4e3, "bound_by": "bytes", "fraction_of_bound": 0.5, **RATES}


def all_rows() -> list[dict[str, Any]]:
    rows = [layer(1, 2.0), layer(4096, 0.5), layer(1, 1.5, variant="zipf, router")]
    rows += [moved("dispatch", 0.9), moved("combine", 0.8), step("decode", 32), step("prefill", 4096)]
    rows += [{**moved("attention prefill", 0.4), "bound_by": "flops"}]
    rows += [{"kernel": "exchanges", "shape": "", "variant": "", "num_tokens": 0, "error": "no CuPy", **RATES}]
    rows = [judged(row) for row in rows]
    rows += [judged({**row, **RATES}) for row in summary(rows)]
    return [*rows, {"kernel": "left out", "left_out": ["DeepSeek"], "budget_s": 1.0, "device": "cuda"}]


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "gpu.json").write_text(json.dumps({"machine": MACHINE, "rows": rows}), encoding="utf-8")


def test_goals_are_judged() -> None:
    rows = all_rows()
    passed = {(row["kernel"], row.get("variant"), row["num_tokens"]): row["passed"] for row in rows if "goal" in row}
    assert passed == {
        (LAYER, "uniform", 1): True,
        (LAYER, "uniform", 4096): False,
        (LAYER, "zipf, router", 1): True,
        ("dispatch", "", 4096): True,
        ("combine", "", 4096): False,
        (LAYER_MEAN, "uniform", 2): False,
        (LAYER_MEAN, "zipf, router", 1): True,
    }
    mean = next(row for row in rows if row["kernel"] == LAYER_MEAN)
    assert mean["ratio_to_baseline"] == pytest.approx(1.0)
    assert (mean["worst_tokens"], mean["worst_ratio"]) == (4096, 0.5)
    assert judged({"kernel": LAYER, "error": "broke"})["passed"] is False
    alone = judged({**layer(1, 1.0), "ratio_to_baseline": None})
    assert alone["passed"] is None


def test_tables_say_what_was_measured_and_what_was_not(tmp_path: Path) -> None:
    write(tmp_path, all_rows())
    text = render(document(), tmp_path, tmp_path / "none")
    for line in (
        "| goal of | is | met by rows | the furthest from it |",
        "| moe layer | ratio >= 1.0 | 2 of 3 | 0.50 (Made-Up-30B, uniform, 4096 tokens) |",
        "| combine | of bound >= 0.85 | 0 of 1 | 0.80 (Made-Up-30B, 4096 tokens) |",
        "| Made-Up-30B, uniform: us | 1 | 4096 |",
        "| transformers grouped_mm | 99.0* | 99.0* |",
        "| ratio to the fastest peer | 2.00 | 0.50 |",
        "| decode | 32 | 512 | 8.00 | 123 | 4.00 | bytes | 0.50 |",
        "| attention prefill | 4096 | 140.0 | 0.40 | flops | 3.00 (torch) |",
        "- exchanges: no CuPy",
        "- left out for time: DeepSeek",
    ):
        assert line in text, line
    assert text.count("Measured on a made-up GPU, driver 1.2") == 2
    assert "A copy moved 4300 GB/s" in text


def test_without_results_the_document_says_so_plainly(tmp_path: Path) -> None:
    text = render(document(), tmp_path, tmp_path)
    assert text.count("Nothing has been measured on a GPU yet.") == 2
    without = re.sub(r"<!-- begin (gpu|gpu-steps) -->.*?<!-- end \1 -->\n", "", document(), flags=re.DOTALL)
    assert "begin gpu" not in render(without, tmp_path, tmp_path)
    write(tmp_path, all_rows())
    with pytest.raises(ConfigError, match="gpu-steps"):
        render(without, tmp_path, tmp_path)


def test_rows_of_the_twin_are_no_measurement(tmp_path: Path) -> None:
    write(tmp_path, [{**layer(1, 2.0), "device": "twin"}])
    with pytest.raises(ConfigError, match="measure nothing"):
        render(document(), tmp_path, tmp_path)


def test_plots_are_drawn_only_of_results(tmp_path: Path) -> None:
    path, plots = tmp_path / "PERFORMANCE.md", tmp_path / "performance"
    path.write_text(document(), encoding="utf-8")
    report = ["bench", "report", "--results", str(tmp_path), "--document", str(path)]
    assert main(report) == 0
    assert not list(plots.glob("*.svg"))
    write(tmp_path, all_rows())
    assert main(report) == 0
    names = {"gpu", "gpu-steps"} if have_matplotlib() else set()
    assert {plot.stem for plot in plots.glob("*.svg")} == names
    for name in names:
        ElementTree.parse(plots / f"{name}.svg")
        assert f"![{name}](performance/{name}.svg)" in path.read_text(encoding="utf-8")
