"""One question: how many tokens per second do N ranks give, against one rank in the same run and against the machine's bound?

Each cell runs `LLM.generate` on random token-id prompts. Prefill is a one-token request; decode is the difference to a
longer one. A cell counts only if its tokens equal one rank's bit for bit and every rank computed expert rows, so that a
transport that did nothing cannot win.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from switchgear import LLM, SamplingParams
from switchgear_bench.weight_bytes import WeightBytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One measured configuration. Rates are medians over `num_repeats`; `ratio` is to one rank, `bound` to the machine."""

    num_ranks: int
    batch_size: int
    input_tokens: int
    output_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
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


def _timed(llm: LLM, prompts: list[list[int]], max_tokens: int) -> tuple[float, list[list[int]]]:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    start_s = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    duration_s = time.perf_counter() - start_s
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    if any(len(row) != max_tokens for row in tokens):
        raise RuntimeError("a request ended early; the rate would be a lie")
    return duration_s, tokens


def _measure(llm: LLM, work: Workload, vocab_size: int, num_repeats: int) -> tuple[float, float, list[list[int]]]:
    """(median prefill seconds, median decode seconds, all tokens). Each repeat has fresh prompts: a prefix cache hit is no prefill."""
    prefill, decode, tokens = [], [], []
    for repeat in range(num_repeats + 1):  # the first warms up
        prefill_s, _ = _timed(llm, work.prompts(vocab_size, 2 * repeat), 1)
        total_s, rows = _timed(llm, work.prompts(vocab_size, 2 * repeat + 1), work.output_tokens + 1)
        if repeat:
            prefill.append(prefill_s)
            decode.append(max(total_s - prefill_s, 1e-9))
        tokens += rows
    return median(prefill), median(decode), tokens


def run(
    model: str,
    ranks: Sequence[int],
    workloads: Sequence[Workload],
    *,
    num_repeats: int,
    bandwidth: float,
    settings: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Yields one row a cell. Rank counts without 1 get it added: it is the baseline."""
    weights = WeightBytes.of(model)
    baseline: dict[Workload, tuple[float, list[list[int]]]] = {}
    for num_ranks in sorted({1, *ranks}):
        with LLM(model, **settings, ranks=num_ranks, enable_prefix_caching=False) as llm:
            for work in workloads:
                prefill_s, decode_s, tokens = _measure(llm, work, weights.vocab_size, num_repeats)
                reference_s, reference = baseline.setdefault(work, (decode_s, tokens))
                if tokens != reference:
                    raise RuntimeError(f"the tokens of {num_ranks} ranks differ from those of one rank")
                bound = weights.decode_bound_tokens_per_s(work.batch_size, num_ranks, bandwidth)
                rate = work.batch_size * work.output_tokens / decode_s
                yield asdict(
                    Cell(
                        num_ranks=num_ranks,
                        batch_size=work.batch_size,
                        input_tokens=work.input_tokens,
                        output_tokens=work.output_tokens,
                        prefill_tokens_per_s=work.batch_size * work.input_tokens / prefill_s,
                        decode_tokens_per_s=rate,
                        decode_ratio_to_one_rank=reference_s / decode_s,
                        decode_bound_tokens_per_s=bound,
                        decode_fraction_of_bound=rate / bound,
                        num_repeats=num_repeats,
                    )
                )
            rows = llm.expert_load().rows
            idle = [rank for rank, layers in enumerate(rows) if not any(map(any, layers))]
            if idle:
                raise RuntimeError(f"ranks {idle} computed no expert row: nothing was expert-parallel here")
