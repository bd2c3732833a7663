"""One question: how many tokens per second do N ranks give, against one rank in the same run and against the machine's bound?

Each cell runs `LLM.generate` on random token-id prompts. Prefill is a one-token request; decode is the difference to a
longer one. A cell counts only if its tokens equal one rank's bit for bit and every rank computed expert rows, so that a
transport that did nothing cannot win.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from switchgear import LLM, RequestOutput, SamplingParams
from switchgear_bench.weight_bytes import WeightBytes

LOAD_REPORT_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One measured configuration, medians over `num_repeats`; `ratio` is to one rank, `bound` to the machine.

    Latencies are those of the batch's slowest request: its first token, and its mean time from token to token after it.
    """

    num_ranks: int
    batch_size: int
    input_tokens: int
    output_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    time_to_first_token_ms: float
    inter_token_latency_ms: float
    decode_ratio_to_one_rank: float
    decode_bound_tokens_per_s: float
    decode_fraction_of_bound: float
    num_repeats: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    batch_size: int
    input_tokens: int
    output_tokens: int

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        draw = random.Random(seed)
        return [[draw.randrange(3, vocab_size) for _ in range(self.input_tokens)] for _ in range(self.batch_size)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Timing:
    """Of one cell, in seconds: medians."""

    prefill_s: float
    decode_s: float
    first_token_s: float
    inter_token_s: float
    tokens: list[list[int]]


def _generate(llm: LLM, prompts: list[list[int]], max_tokens: int) -> tuple[float, list[RequestOutput]]:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    start_s = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    duration_s = time.perf_counter() - start_s
    if any(len(output.outputs[0].token_ids) != max_tokens for output in outputs):
        raise RuntimeError("a request ended early; the rate would be a lie")
    return duration_s, outputs


def _inter_token_s(output: RequestOutput) -> float:
    first_s, finished_s = output.metrics.first_token_s, output.metrics.finished_s
    assert first_s is not None
    assert finished_s is not None
    return (finished_s - first_s) / (len(output.outputs[0].token_ids) - 1)


def _measure(llm: LLM, work: Workload, vocab_size: int, num_repeats: int) -> _Timing:
    """Each repeat has fresh prompts: a prefix cache hit is no prefill. The first one warms up and does not count."""
    prefill, decode, first_token, inter_token = [], [], [], []
    tokens: list[list[int]] = []
    for repeat in range(num_repeats + 1):
        prefill_s, _ = _generate(llm, work.prompts(vocab_size, 2 * repeat), 1)
        total_s, outputs = _generate(llm, work.prompts(vocab_size, 2 * repeat + 1), work.output_tokens + 1)
        tokens += [list(output.outputs[0].token_ids) for output in outputs]
        if repeat:
            prefill.append(prefill_s)
            decode.append(max(total_s - prefill_s, 1e-9))
            first_token.append(max(output.metrics.first_token_s or 0.0 for output in outputs))
            inter_token.append(max(map(_inter_token_s, outputs)))
    return _Timing(
        prefill_s=median(prefill),
        decode_s=median(decode),
        first_token_s=median(first_token),
        inter_token_s=median(inter_token),
        tokens=tokens,
    )


def idle_ranks(llm: LLM) -> list[int]:
    """Ranks whose experts have computed no row. Ranks report when they park, so a short run is given a moment."""
    deadline_s = time.monotonic() + LOAD_REPORT_TIMEOUT_S
    while True:
        rows = llm.expert_load().rows
        idle = [rank for rank, layers in enumerate(rows) if not any(map(any, layers))]
        if not idle or time.monotonic() > deadline_s:
            return idle
        time.sleep(0.05)


def run(
    model: str,
    ranks: Sequence[int],
    workloads: Sequence[Workload],
    *,
    num_repeats: int,
    bandwidth: Callable[[int], float],
    settings: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Yields one row a cell. Rank counts without 1 get it added: it is the baseline. `bandwidth(n)`: bytes per second that n
    ranks can read together."""
    weights = WeightBytes.of(model)
    baseline: dict[Workload, _Timing] = {}
    for num_ranks in sorted({1, *ranks}):
        with LLM(model, **settings, ranks=num_ranks, enable_prefix_caching=False) as llm:
            for work in workloads:
                timing = _measure(llm, work, weights.vocab_size, num_repeats)
                one_rank = baseline.setdefault(work, timing)
                if timing.tokens != one_rank.tokens:
                    raise RuntimeError(f"the tokens of {num_ranks} ranks differ from those of one rank")
                bound = weights.decode_bound_tokens_per_s(work.batch_size, num_ranks, bandwidth(num_ranks))
                rate = work.batch_size * work.output_tokens / timing.decode_s
                yield asdict(
                    Cell(
                        num_ranks=num_ranks,
                        batch_size=work.batch_size,
                        input_tokens=work.input_tokens,
                        output_tokens=work.output_tokens,
                        prefill_tokens_per_s=work.batch_size * work.input_tokens / timing.prefill_s,
                        decode_tokens_per_s=rate,
                        time_to_first_token_ms=timing.first_token_s * 1e3,
                        inter_token_latency_ms=timing.inter_token_s * 1e3,
                        decode_ratio_to_one_rank=one_rank.decode_s / timing.decode_s,
                        decode_bound_tokens_per_s=bound,
                        decode_fraction_of_bound=rate / bound,
                        num_repeats=num_repeats,
                    )
                )
            idle = idle_ranks(llm)
            if idle:
                raise RuntimeError(f"ranks {idle} computed no expert row: nothing was expert-parallel here")
