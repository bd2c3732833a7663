"""What balancing costs a real step: two ranks decode one batch with it and without, taking turns, with an A/A arm."""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

from switchgear import LLM, SamplingParams

INPUT_LEN, OUTPUT_LEN = 16, 40
OFF: dict[str, Any] = {"replica_choice": "static", "lending": 0}
ARMS: dict[str, dict[str, Any]] = {"static": OFF, "balanced": {}, "static again": OFF}


def measure(model: str, batch: int, *, num_repeats: int, added_step_us: float) -> dict[str, Any]:
    """Tokens per second of each arm, and ratios within a repetition. All arms give the same tokens.

    Prompts are random, so the experts' loads are nearly even and there is little to win: the ratio is the cost.
    """
    rng = random.Random(batch)
    prompts = [{"prompt_token_ids": [rng.randrange(1000) for _ in range(INPUT_LEN)]} for _ in range(batch)]
    params = SamplingParams(max_tokens=OUTPUT_LEN, temperature=0.0, ignore_eos=True)
    rates: dict[str, list[float]] = {name: [] for name in ARMS}
    expected: list[list[int]] | None = None
    llms: dict[str, LLM] = {}
    try:
        for name, settings in ARMS.items():  # idle ranks wait without polling, so all may live at once
            llms[name] = LLM(model, ranks=2, launcher="local", placement="off", bind_cpus=False, **settings)
        for repeat in range(num_repeats + 1):
            for turn in range(len(ARMS)):  # each arm comes first, in the middle and last
                name, llm = list(llms.items())[(repeat + turn) % len(ARMS)]
                start = time.perf_counter()
                outputs = llm.generate(prompts, params, use_tqdm=False)
                seconds = time.perf_counter() - start
                token_ids = [list(output.outputs[0].token_ids) for output in outputs]
                expected = expected or token_ids
                assert token_ids == expected, f"{name} gives other tokens"
                if repeat:  # the first warms up
                    rates[name].append(batch * OUTPUT_LEN / seconds)
    finally:
        for llm in llms.values():
            llm.close()
    step_us = 1e6 * batch / statistics.median(rates["static"])
    return {
        "num_ranks": 2,
        "batch": batch,
        "tokens_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "ratio_to_static": {
            name: statistics.median(mine / theirs for mine, theirs in zip(values, rates["static"], strict=True))
            for name, values in rates.items()
        },
        "step_us": step_us,
        "added_fraction": added_step_us / step_us,
        "num_repeats": num_repeats,
    }
