"""One question: under skewed prompts, what does placement that follows the load give, against experts that stay put?

Three clusters take turns on the same prompts: experts where they began (static), the same again (what two
equal clusters differ by on this machine), and the default: placement by load, replicas chosen by each batch, lending. The
tokens of all three must be equal, and the third must have moved experts before anything is timed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchgear import LLM, SamplingParams
from switchgear_bench.rank_affinity import pin_ranks
from switchgear_bench.serve import NotMeasured, pair_ratios, spread

STATIC, STATIC_AGAIN, PLACED = "static", "static again", "placed"
_ARMS: dict[str, dict[str, Any]] = {
    STATIC: {"placement": "off", "replica_choice": "static", "lending": 0},
    STATIC_AGAIN: {"placement": "off", "replica_choice": "static", "lending": 0},
    PLACED: {"placement": "adaptive", "placement_window_s": 2.0},
}
_FIRST_MOVE_TIMEOUT_S = 40.0
REPORT_S = 1.3  # ranks tell their load about once a second, and when they park


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """`num_hot`: the prompts' tokens are drawn from so few, so that few experts get most rows."""

    name: str
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    num_hot: int

    def prompts(self, vocab_size: int, seed: int) -> list[dict[str, list[int]]]:
        hot = random.Random(self.num_hot).sample(range(vocab_size), self.num_hot)  # of all repetitions
        rng = random.Random(seed)
        return [
            {"prompt_token_ids": [rng.choice(hot) for _ in range(self.prompt_tokens)]} for _ in range(self.batch_size)
        ]

    @property
    def num_timed_tokens(self) -> int:
        return self.batch_size * (self.new_tokens if self.new_tokens > 1 else self.prompt_tokens)


TRAFFIC = (
    Traffic(name="prefill", batch_size=16, prompt_tokens=256, new_tokens=1, num_hot=4),
    Traffic(name="decode", batch_size=32, prompt_tokens=16, new_tokens=64, num_hot=4),
)


def run(
    model: str,
    *,
    num_ranks: int,
    num_threads: int,
    num_repeats: int,
    vocab_size: int,
    launcher: str,
    traffic: Sequence[Traffic] = TRAFFIC,
) -> Iterator[dict[str, Any]]:
    """A row a kind of traffic."""
    with ExitStack() as stack:
        llms = {
            arm: stack.enter_context(
                LLM(
                    model,
                    launcher=launcher,
                    ranks=num_ranks,
                    num_threads=num_threads,
                    bind_cpus=False,  # the first cluster would have the CPUs, and the others none
                    enable_prefix_caching=False,
                    max_num_batched_tokens=2048,
                    **settings,
                )
            )
            for arm, settings in _ARMS.items()
        }
        for llm in llms.values():
            pin_ranks(llm, num_threads)
        for one in traffic:
            yield _measure(one, llms, num_ranks=num_ranks, num_repeats=num_repeats, vocab_size=vocab_size)


def _measure(
    traffic: Traffic, llms: dict[str, LLM], *, num_ranks: int, num_repeats: int, vocab_size: int
) -> dict[str, Any]:
    _wait_for_move(traffic, llms[PLACED], vocab_size)
    rates: dict[str, list[float]] = {arm: [] for arm in llms}
    before = {arm: _rows(llm) for arm, llm in llms.items()}
    for repeat in range(num_repeats + 1):  # the first one warms up
        tokens = {}
        arms = list(llms)
        random.Random(repeat).shuffle(arms)
        for arm in arms:
            seconds, tokens[arm] = generate(llms[arm], traffic, vocab_size, 100 + repeat)
            if repeat:
                rates[arm].append(traffic.num_timed_tokens / seconds)
        if any(tokens[arm] != tokens[STATIC] for arm in arms):
            raise NotMeasured(f"{traffic.name}: tokens differ between {', '.join(arms)}")
    time.sleep(REPORT_S)
    after = {arm: _rows(llm) for arm, llm in llms.items()}
    return {
        "traffic": traffic.name,
        "num_ranks": num_ranks,
        "batch_size": traffic.batch_size,
        "prompt_tokens": traffic.prompt_tokens,
        "new_tokens": traffic.new_tokens,
        "num_hot_tokens": traffic.num_hot,
        "tokens_per_s": {arm: spread(values) for arm, values in rates.items()},
        "ratio_placed": pair_ratios(rates[PLACED], rates[STATIC]),
        "ratio_static_again": pair_ratios(rates[STATIC_AGAIN], rates[STATIC]),
        "max_over_mean": {arm: _max_over_mean(after[arm] - before[arm]) for arm in llms},
        "epochs": llms[PLACED].expert_load().epoch,  # since the start; a later kind of traffic may need none of its own
        "num_repeats": num_repeats,
    }


def _wait_for_move(traffic: Traffic, llm: LLM, vocab_size: int) -> None:
    """Traffic until placement has moved something; it may have done so already."""
    deadline_s = time.monotonic() + _FIRST_MOVE_TIMEOUT_S
    seed = 0
    while llm.expert_load().epoch == 0:
        if time.monotonic() > deadline_s:
            raise NotMeasured(f"{traffic.name}: no expert moved within {_FIRST_MOVE_TIMEOUT_S:g} s of skewed traffic")
        generate(llm, traffic, vocab_size, seed)
        seed += 1


def generate(llm: LLM, traffic: Traffic, vocab_size: int, seed: int) -> tuple[float, list[list[int]]]:
    params = SamplingParams(max_tokens=traffic.new_tokens, temperature=0.0, ignore_eos=True)
    prompts = traffic.prompts(vocab_size, seed)
    start_s = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start_s
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    if any(len(ids) != traffic.new_tokens for ids in tokens):
        raise NotMeasured(f"{traffic.name}: an output has another length than {traffic.new_tokens}")
    return seconds, tokens


def _rows(llm: LLM) -> NDArray[np.int64]:
    """[rank, layer]: rows that each rank's experts have computed."""
    rows_RL: NDArray[np.int64] = np.array(llm.expert_load().rows, np.int64).sum(axis=2)
    return rows_RL


def _max_over_mean(rows_RL: NDArray[np.int64]) -> float:
    """Of ranks' rows; the sum over layers of the largest over that of the mean."""
    if rows_RL.sum() == 0:
        raise NotMeasured("no rank computed an expert row")
    return float(rows_RL.max(axis=0).sum() / rows_RL.mean(axis=0).sum())
