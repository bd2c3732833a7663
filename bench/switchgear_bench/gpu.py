"""One question: how near do the device kernels come to what the GPU can do, and how do they compare with torch on it?

Ours and torch take turns, repetition by repetition. The bound is the copy bandwidth and the bf16 product that torch reaches on
the same device in the same run. Each subject's result is checked against torch before it is timed. With the twin library
(`--device twin`) the same code runs on the host with small shapes: a test of this benchmark, and no measurement.

Letters: T tokens, D hidden, F ffn, K top-k, E experts, R ranks, N pairs, S slots.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from switchgear_runtime.cuda.kernels import Kernels

Run = Callable[[], object]
NUM_REPEATS = 7
_REPEAT_S = 0.02
_CALLS_MAX = 200


@dataclass(frozen=True, slots=True)
class Shape:
    """A layer of experts."""

    name: str
    num_experts: int
    top_k: int
    hidden: int
    ffn: int


QWEN3 = Shape("Qwen3-30B-A3B", 128, 8, 2048, 768)
DEEPSEEK = Shape("DeepSeek-V3", 256, 8, 7168, 2048)
TINY = Shape("tiny", 8, 2, 64, 32)
NUM_TOKENS = (1, 16, 128, 1024, 4096)


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is timed. `check` raises unless the two agree."""

    kernel: str
    shape: str
    num_tokens: int
    num_bytes: int
    flops: int
    ours: Run
    baseline: Run
    baseline_name: str
    check: Callable[[], None]


class Clock:
    """Seconds a call takes on the device, by events; on the host by the clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def seconds(self, run: Run, num_calls: int) -> float:
        if self._device.type != "cuda":
            start_s = time.perf_counter()
            for _ in range(num_calls):
                run()
            return (time.perf_counter() - start_s) / num_calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(num_calls):
            run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / num_calls

    def calls(self, run: Run) -> int:
        self.seconds(run, 2)
        return max(1, min(_CALLS_MAX, int(_REPEAT_S / max(self.seconds(run, 2), 1e-7))))


@dataclass(frozen=True, slots=True)
class Bounds:
    """What torch reaches: bytes per second of a copy (read and written), FLOPs per second of a bf16 product."""

    copy_bytes_per_s: float
    product_flops_per_s: float

    @classmethod
    def of(cls, device: torch.device) -> Bounds:
        is_gpu = device.type == "cuda"
        clock = Clock(device)
        source = torch.empty(1 << (30 if is_gpu else 20), dtype=torch.uint8, device=device)
        to = torch.empty_like(source)
        size = 8192 if is_gpu else 128
        a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))

        def best(run: Run) -> float:
            run()
            return min(clock.seconds(run, 5 if is_gpu else 2) for _ in range(5))

        return cls(2 * source.numel() / best(lambda: to.copy_(source)), 2 * size**3 / best(lambda: a @ b))


def measure(subject: Subject, bounds: Bounds, clock: Clock) -> dict[str, Any]:
    """A row. Ours and the baseline alternate."""
    subject.check()
    ours_calls, baseline_calls = clock.calls(subject.ours), clock.calls(subject.baseline)
    ours_s, baseline_s = [], []
    for _ in range(NUM_REPEATS):
        ours_s.append(clock.seconds(subject.ours, ours_calls))
        baseline_s.append(clock.seconds(subject.baseline, baseline_calls))
    bytes_s = subject.num_bytes / bounds.copy_bytes_per_s
    flops_s = subject.flops / bounds.product_flops_per_s
    return {
        "kernel": subject.kernel,
        "shape": subject.shape,
        "num_tokens": subject.num_tokens,
        "time_us": median(ours_s) * 1e6,
        "bound_us": max(bytes_s, flops_s) * 1e6,
        "bound_by": "bytes" if bytes_s >= flops_s else "flops",
        "fraction_of_bound": max(bytes_s, flops_s) / median(ours_s),
        "baseline": subject.baseline_name,
        "baseline_us": median(baseline_s) * 1e6,
        "ratio_to_baseline": median(theirs / ours for theirs, ours in zip(baseline_s, ours_s, strict=True)),
        "num_repeats": NUM_REPEATS,
    }


def subjects(kernels: Kernels, *, is_small: bool) -> Iterator[Subject]:
    """All of them, largest weights last; each made when it is asked for."""
    from switchgear_bench.gpu_experts import experts

    moving = (TINY, 32) if is_small else (DEEPSEEK, 4096)
    yield dispatch(kernels, *moving)
    yield combine(kernels, *moving)
    for shape in (TINY,) if is_small else (QWEN3, DEEPSEEK):
        yield from experts(kernels, shape, (1, 16) if is_small else NUM_TOKENS)


def draw_ids(shape: Shape, num_tokens: int, device: torch.device) -> Tensor:
    """Different experts for each token, uniform, from one seed."""
    generator = torch.Generator().manual_seed(num_tokens)
    scores = torch.rand(num_tokens, shape.num_experts, generator=generator)
    return scores.topk(shape.top_k, -1).indices.int().to(device)


def dispatch(kernels: Kernels, shape: Shape, num_tokens: int, num_ranks: int = 8) -> Subject:
    """Remap, plan and gather: everything between the router and the wire."""
    device = kernels.device
    x_TD = torch.randn(num_tokens, shape.hidden, device=device)
    ids_TK = draw_ids(shape, num_tokens, device)
    slot_of_E = torch.arange(shape.num_experts, dtype=torch.int32, device=device)
    per_rank = shape.num_experts // num_ranks
    plan = kernels.plan_dispatch(kernels.remap(ids_TK, slot_of_E), num_ranks, per_rank)
    num_rows = int(plan.rows_begin_R1[-1])
    tokens_M = plan.row_tokens_M[:num_rows]
    tokens_long_M = tokens_M.long()

    def ours() -> Tensor:
        fresh = kernels.plan_dispatch(kernels.remap(ids_TK, slot_of_E), num_ranks, per_rank)
        return kernels.gather_rows(x_TD, fresh.row_tokens_M[:num_rows])

    def baseline() -> Tensor:
        ranks_TR = torch.zeros(num_tokens, num_ranks, dtype=torch.bool, device=device)
        ranks_TR.scatter_(1, (ids_TK // per_rank).long(), True)
        return x_TD.index_select(0, ranks_TR.T.nonzero()[:, 1]).bfloat16()

    def check() -> None:
        assert torch.equal(ours(), x_TD[tokens_long_M].bfloat16())
        assert torch.equal(ours(), baseline())

    return Subject(
        kernel="dispatch",
        shape=f"{shape.name}, {num_ranks} ranks",
        num_tokens=num_tokens,
        num_bytes=num_tokens * shape.hidden * 4 + num_rows * shape.hidden * 2,
        flops=0,
        ours=ours,
        baseline=baseline,
        baseline_name="torch index_select",
        check=check,
    )


def combine(kernels: Kernels, shape: Shape, num_tokens: int) -> Subject:
    device, num_pairs = kernels.device, num_tokens * shape.top_k
    rows_ND = torch.randn(num_pairs, shape.hidden, device=device).bfloat16()
    index_TK = torch.randperm(num_pairs, device=device).int().view(num_tokens, shape.top_k)
    weights_TK = torch.rand(num_tokens, shape.top_k, device=device)
    index_N = index_TK.long().view(-1)

    def ours() -> Tensor:
        return kernels.combine(rows_ND, index_TK, weights_TK)

    def baseline() -> Tensor:
        gathered_TKD = rows_ND.index_select(0, index_N).view(num_tokens, shape.top_k, -1)
        return (gathered_TKD * weights_TK[..., None]).sum(1)

    def check() -> None:
        torch.testing.assert_close(ours(), baseline(), rtol=1e-4, atol=1e-4)

    return Subject(
        kernel="combine",
        shape=f"{shape.name}",
        num_tokens=num_tokens,
        num_bytes=num_pairs * shape.hidden * 2 + num_tokens * shape.hidden * 4,
        flops=0,
        ours=ours,
        baseline=baseline,
        baseline_name="torch index_select, mul, sum",
        check=check,
    )


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate) * up
