"""`--device twin` through a whole cluster of processes: the same API, and the same tokens on one rank and on two."""

from __future__ import annotations

import pytest

from switchgear import LLM, SamplingParams

PROMPTS = ["harbor (noun):", "7 * 8 =", "def main(argv):", "And it came to pass"]
MODES = [
    SamplingParams(max_tokens=10, temperature=0, logprobs=2),
    SamplingParams(max_tokens=10, temperature=0.9, seed=5),
]


@pytest.mark.slow
@pytest.mark.ranks
def test_one_rank_or_two() -> None:
    found = []
    for ranks in (1, 2):
        with LLM(ranks=ranks, launcher="local", device="twin", step_timeout_s=60.0) as llm:
            outputs = [llm.generate(PROMPTS, mode) for mode in MODES]
        found.append(
            [(output.outputs[0].token_ids, output.outputs[0].logprobs) for batch in outputs for output in batch]
        )
    assert found[0] == found[1]
    assert all(len(token_ids) == 10 for token_ids, _ in found[0])
