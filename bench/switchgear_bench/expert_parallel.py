"""One question: what does it cost to split a model over two ranks of one host, against what the bytes and the load allow?

The same threads once as one rank and once as two: all that two ranks add is in the ratio (each reads the dense weights
itself, rows travel, ranks wait for each other). Configurations take turns on the same prompts; their tokens must be equal
bit for bit, and every rank must have computed the rows of its experts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from switchgear_bench.expert_parallel_bound import Bound, decode_bound, prefill_bound
from switchgear_bench.quiet import quietly
from switchgear_bench.serve import NotMeasured, busy, pair_ratios, spread, tokens_per_s, turn
from switchgear_bench.serve_bound import Model
from switchgear_bench.serve_cases import CASES, Case
from switchgear_bench.serve_runners import our_runner
from switchgear_bench.serve_worker import Runner, Worker

_SEED = 5000
_REPORT_TIMEOUT_S = 10.0
ONE_RANK_TWO_THREADS = "1 rank x 2 threads"
ONE_RANK = "1 rank x 1 thread"
TWO_RANKS = "2 ranks x 1 thread"
WARM_UP = Case(name="warm-up", batch_size=8, prompt_tokens=64, new_tokens=0, num_repeats=1)
_SIZES = {ONE_RANK_TWO_THREADS: (1, 2), ONE_RANK: (1, 1), TWO_RANKS: (2, 1)}  # ranks, threads of each


@dataclass(frozen=True, slots=True)
class Comparison:
    """`case` on two ranks against `baseline`. Prompts are several, since attention is data parallel."""

    case: Case
    baseline: str


COMPARISONS = (
    Comparison(CASES["decode-8"], ONE_RANK_TWO_THREADS),
    Comparison(CASES["decode-32"], ONE_RANK_TWO_THREADS),
    Comparison(Case(name="prefill-8x256", batch_size=8, prompt_tokens=256, new_tokens=0, num_repeats=7), ONE_RANK),
)


def run(
    model_dir: str,
    precision: str,
    *,
    comparisons: Sequence[Comparison] = COMPARISONS,
    num_repeats: int | None,
    settings: dict[str, Any],
    lock: Path | None,
) -> Iterator[dict[str, Any]]:
    """A row a comparison."""
    model = Model(model_dir)
    names = [TWO_RANKS, *dict.fromkeys(comparison.baseline for comparison in comparisons)]
    with ExitStack() as stack:
        with busy(lock):
            workers = {
                name: stack.enter_context(Worker(_runner(name, model_dir, precision, settings))) for name in names
            }
        for comparison in comparisons:
            repeats = num_repeats or comparison.case.num_repeats
            yield _compare(comparison, workers, model, precision, repeats, lock)


def _runner(name: str, model_dir: str, precision: str, settings: dict[str, Any]) -> Runner:
    ranks, threads = _SIZES[name]
    runner = our_runner(model_dir, precision, threads, {"ranks": ranks, **settings})
    return replace(runner, name=name)


def _compare(
    comparison: Comparison,
    workers: Mapping[str, Worker],
    model: Model,
    precision: str,
    num_repeats: int,
    lock: Path | None,
) -> dict[str, Any]:
    case, vocab_size = comparison.case, model.spec.vocab_size
    taking_part = [workers[comparison.baseline], workers[TWO_RANKS]]
    rates: dict[str, list[float]] = {worker.runner.name: [] for worker in taking_part}
    rows_RLE: list[list[list[int]]] = []
    for repeat in quietly(range(num_repeats + 1), lock):  # the first one warms up
        tokens = []
        before_RLE: list[list[list[int]]] = []
        for worker in taking_part:
            waiting = [other for other in workers.values() if other is not worker]
            before_RLE = _warmed_up(worker, model, _SEED + repeat)
            answer = turn(case, worker, waiting, vocab_size, _SEED + repeat)
            tokens.append(answer["tokens"])
            if repeat:
                rates[worker.runner.name].append(tokens_per_s(case, answer))
        if tokens[0] != tokens[1]:
            raise NotMeasured(f"{case.name}: the tokens of two ranks differ from those of one")
        rows_RLE = _rows_of_turn(workers[TWO_RANKS], before_RLE, case, model)  # two ranks' turn is the last
    tensor_bytes = model.tensor_bytes(precision)
    bound = decode_bound(case, model, tensor_bytes) if case.kind == "decode" else prefill_bound(case, model, rows_RLE)
    return _row(comparison, precision, rates, bound, rows_RLE)


def _row(
    comparison: Comparison,
    precision: str,
    rates: Mapping[str, Sequence[float]],
    bound: Bound,
    rows_RLE: Sequence[Sequence[Sequence[int]]],
) -> dict[str, Any]:
    case = comparison.case
    one, two = rates[comparison.baseline], rates[TWO_RANKS]
    ratio = pair_ratios(two, one)
    by_rank = [sum(map(sum, layers)) for layers in rows_RLE]
    return {
        "case": case.name,
        "precision": precision,
        "batch_size": case.batch_size,
        "prompt_tokens": case.prompt_tokens,
        "new_tokens": case.new_tokens,
        "baseline": comparison.baseline,
        "baseline_tokens_per_s": median(one),
        "two_ranks_tokens_per_s": median(two),
        "baseline_spread": spread(one),
        "two_ranks_spread": spread(two),
        "ratio": ratio,
        "bound_by": bound.by,
        "bound_ratio": bound.ratio,
        "bound_ratio_if_dense_is_shared": bound.ratio_if_dense_is_shared,
        "fraction_of_bound": ratio["median"] / bound.ratio,
        "baseline_work": bound.one_rank,
        "work_by_rank": bound.by_rank,
        "distinct_experts": bound.distinct_experts,
        "expert_rows_by_rank": [rows / sum(by_rank) for rows in by_rank],
        "num_repeats": len(one),
    }


def _warmed_up(worker: Worker, model: Model, seed: int) -> list[list[list[int]]]:
    """A short turn before the timed one: systems take idle memory's pages back, and two processes that sat idle have
    more of them to find again than one. Returns the expert rows so far."""
    before_RLE = _expert_rows(worker)
    worker.run(WARM_UP.request(model.spec.vocab_size, seed))
    if worker.runner.name == TWO_RANKS:
        _rows_of_turn(worker, before_RLE, WARM_UP, model)  # waits until all are reported
    return _expert_rows(worker)


def _expert_rows(worker: Worker) -> list[list[list[int]]]:
    rows: list[list[list[int]]] = worker.run({"kind": "expert_rows"})["rows"]
    return rows


def _rows_of_turn(worker: Worker, before_RLE: list[list[list[int]]], case: Case, model: Model) -> list[list[list[int]]]:
    """What each rank's experts computed, [rank][layer][expert]; every token of the turn met its experts in every layer.

    Ranks report when they park, and the first report comes late: it is waited for.
    """
    num_tokens = case.batch_size * (case.prompt_tokens + case.new_tokens)  # nobody computes the last one's successor
    num_layers = model.spec.num_moe_layers
    expected = num_tokens * model.weights.top_k * num_layers
    deadline_s = time.monotonic() + _REPORT_TIMEOUT_S
    while True:
        now_RLE = _expert_rows(worker)
        rows_RLE = _minus(now_RLE, before_RLE) if before_RLE else now_RLE
        total = sum(sum(map(sum, layers)) for layers in rows_RLE)
        if total == expected:
            break
        if time.monotonic() > deadline_s:
            raise NotMeasured(f"{case.name}: {total} expert rows were computed instead of {expected}")
        time.sleep(0.05)
    idle = [rank for rank, layers in enumerate(rows_RLE) if not all(map(any, layers))]
    if idle or len(rows_RLE) < _SIZES[TWO_RANKS][0]:
        raise NotMeasured(f"{case.name}: ranks {idle or 'missing'} computed no expert row: nothing was expert-parallel")
    return rows_RLE


def _minus(now_RLE: list[list[list[int]]], before_RLE: list[list[list[int]]]) -> list[list[list[int]]]:
    return [
        [[a - b for a, b in zip(*experts, strict=True)] for experts in zip(*layers, strict=True)]
        for layers in zip(now_RLE, before_RLE, strict=True)
    ]
