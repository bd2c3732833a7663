"""`switchgear bench gpu`: the device kernels and the device engine against what the GPU can do and against their peers on it."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Rows = Iterator[dict[str, Any]]


class GpuCommand:
    help = "device kernels against copy bandwidth, bf16 products, grouped_mm and Triton, on a GPU"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--device",
            choices=("cuda", "twin"),
            default="cuda",
            help="twin: the same code on the host with small shapes; tests this benchmark and measures nothing",
        )
        parser.add_argument(
            "--output", type=Path, help="JSON file for the rows, written anew after each (default: none)"
        )
        parser.add_argument(
            "--only", default="", metavar="WORDS", help="only the sections whose name has these words (default: all)"
        )
        parser.add_argument(
            "--gemm-family",
            choices=("auto", "mma", "wgmma"),
            default="auto",
            help="as `switchgear serve` has it: which instructions products go by",
        )
        parser.add_argument(
            "--budget-s", type=float, help="begin no more rows after so many seconds, and say which are left out"
        )

    def run(self, arguments: argparse.Namespace) -> int:
        machine = describe(arguments.device)
        rows: list[dict[str, Any]] = []
        settings = {"budget_s": arguments.budget_s, "only": arguments.only, "gemm_family": arguments.gemm_family}
        for row in run_all(arguments.device, **settings):
            rows.append(row)
            if arguments.output is not None:
                arguments.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
        print(table(rows))
        return 0


def run_all(device: str, *, budget_s: float | None = None, only: str = "", gemm_family: str = "auto") -> Rows:
    """Row after row, the most telling first. Raises DeviceUnavailable, with each reason and its fix, where there is no
    usable GPU. Past the budget, one row names what was left out. `only`: of sections whose name has these words."""
    start_s = time.monotonic()
    from switchgear_runtime.cuda.facts import gather_facts
    from switchgear_runtime.cuda.preflight import DeviceUnavailable, device_obstacles

    found = device_obstacles(gather_facts()) if device == "cuda" else []
    if found:
        raise DeviceUnavailable(found)
    from switchgear_bench.gpu_clock import Bounds, Clock
    from switchgear_bench.gpu_goals import judged, summary
    from switchgear_runtime.cuda.backend import kernels_of
    from switchgear_runtime.errors import ConfigError

    kernels = kernels_of(device, 0, gemm_family)
    with kernels.on_stream():
        bounds, clock = Bounds.of(kernels.device), Clock(kernels.device)
    rates = {
        "copy_gb_per_s": bounds.copy_bytes_per_s / 1e9,
        "product_tflops_per_s": bounds.product_flops_per_s / 1e12,
        "kernels": kernels.version(),
    }
    done: list[dict[str, Any]] = []
    left_out: list[str] = []

    def finished(row: dict[str, Any]) -> dict[str, Any]:
        whole = {"device": device, **judged(row), **rates}
        done.append(whole)
        print(line(whole), flush=True)
        return whole

    chosen = [section for section in sections(kernels, device, bounds, clock, gemm_family) if only in section[0]]
    if not chosen:
        raise ConfigError(f"only={only!r} names none of the sections: {', '.join(section_names(device))}")
    for name, begin in chosen:
        if budget_s is not None and time.monotonic() - start_s > budget_s:
            left_out.append(name)
            continue
        try:
            with kernels.on_stream():
                for row in begin():
                    yield finished(row)
                    if budget_s is not None and time.monotonic() - start_s > budget_s:
                        left_out.append(f"what is left of {name}")
                        break
        except Exception as error:  # noqa: BLE001 - it is in the rows, and the other sections are worth as much
            yield finished({"kernel": name, "shape": "", "variant": "", "num_tokens": 0, "error": _words(error)})
        _give_back(kernels.device)
    for row in summary(list(done)):
        yield finished(row)
    if left_out:
        print(f"Past the budget of {budget_s:.0f} s: left out {', '.join(left_out)}")
        yield {"device": device, "kernel": "left out", "budget_s": budget_s, "left_out": left_out}


def section_names(device: str) -> list[str]:
    return [name for name, _ in sections(None, device, None, None, "auto")]


def sections(
    kernels: Any, device: str, bounds: Any, clock: Any, gemm_family: str
) -> Iterator[tuple[str, Callable[[], Rows]]]:
    """(name, what makes its rows), in order of what they tell."""
    from switchgear_bench.gpu_decode import engine_steps
    from switchgear_bench.gpu_dense import dense_kernels
    from switchgear_bench.gpu_exchange import exchanges
    from switchgear_bench.gpu_layer import DEEPSEEK, QWEN3, TINY, UNIFORM, ZIPF, Shape
    from switchgear_bench.gpu_moe import NUM_TOKENS, Cell, LayerBench
    from switchgear_bench.gpu_moving import moving_rows

    is_small = device != "cuda"

    def layer(shape: Shape, *variants: tuple[str, bool]) -> Callable[[], Rows]:
        cells = [
            Cell(num_tokens=num_tokens, skew=skew, with_router=with_router)
            for skew, with_router in variants
            for num_tokens in ((1, 16) if is_small else NUM_TOKENS)
        ]
        return lambda: LayerBench(kernels, shape, bounds, clock).rows(cells)

    yield "moving rows", lambda: moving_rows(kernels, bounds, clock, is_small=is_small)
    if is_small:
        yield "moe layer tiny", layer(TINY, (UNIFORM, False), (ZIPF, True))
    else:
        yield "moe layer Qwen3-30B-A3B uniform", layer(QWEN3, (UNIFORM, False))
        yield "moe layer DeepSeek-V3 uniform", layer(DEEPSEEK, (UNIFORM, False))
    yield "engine steps", lambda: engine_steps(device, bounds, is_small=is_small, gemm_family=gemm_family)
    if not is_small:
        rest = ((UNIFORM, True), (ZIPF, False), (ZIPF, True))
        yield "moe layer Qwen3-30B-A3B with router, skewed", layer(QWEN3, *rest)
        yield "moe layer DeepSeek-V3 with router, skewed", layer(DEEPSEEK, *rest)
    yield "dense kernels", lambda: dense_kernels(kernels, bounds, clock, is_small=is_small)
    yield "exchanges", lambda: exchanges(device, bounds, is_small=is_small, gemm_family=gemm_family)


def describe(device: str) -> dict[str, Any]:
    """The header: machine.py's, and the GPU."""
    from switchgear_bench import machine
    from switchgear_runtime.cuda.facts import gather_facts
    from switchgear_runtime.cuda.report import gpu_report

    return {**machine.describe(), "device": device, **gpu_report(gather_facts())}


def line(row: dict[str, Any]) -> str:
    head = f"{row['kernel']:<18}{row.get('shape', ''):<24}{row.get('variant', ''):<16}{row.get('num_tokens', ''):>6}"
    if "error" in row:
        return f"{head}  failed: {row['error'][:160]}"
    if "left_out" in row:
        return f"{head}  {', '.join(row['left_out'])}"
    times = f"{row['time_us']:>12.1f}{row['bound_us']:>12.1f}" if "time_us" in row else f"{'':>24}"
    of_bound = f"{row['fraction_of_bound']:>8.2f} {row.get('bound_by', ''):<6}"
    ratio = f"{row['ratio_to_baseline']:>7.2f}x {row['baseline']}" if row.get("ratio_to_baseline") else ""
    verdict = {True: "  pass", False: "  FAIL", None: ""}[row.get("passed")]
    return f"{head}{times}{of_bound}{ratio}{verdict}"


def table(rows: list[dict[str, Any]]) -> str:
    head = f"{'kernel':<18}{'shape':<24}{'variant':<16}{'tokens':>6}{'us':>12}{'bound us':>12}{'of it':>8} {'by':<6}{'ratio':>8} to"
    return "\n".join([head, *map(line, rows)])


def _give_back(device: Any) -> None:
    """What a section held: the next one's weights, and other processes on the device, need the room."""
    import gc

    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


GPU = GpuCommand()
