"""Every architecture, through LLM and real processes: tokens and logprobs over shm and gloo equal those of one rank."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tiny_checkpoints import ARCHITECTURES, make_checkpoint

from switchgear import LLM, SamplingParams
from switchgear_bench.throughput import idle_ranks
from switchgear_runtime.model.spec import load_spec

SEED = random.SystemRandom().randrange(1 << 20)  # fresh each run, and in every failure's message


def answers(model: Path, ranks: int, transport: str) -> list[tuple[list[int], list[str]]]:
    draw = random.Random(SEED)
    vocab_size = load_spec(model).vocab_size
    prompts = [[draw.randrange(vocab_size) for _ in range(draw.randint(1, 40))] for _ in range(12)]
    params = [
        SamplingParams(max_tokens=8, temperature=draw.choice((0.0, 1.0)), seed=index, logprobs=0, ignore_eos=True)
        for index in range(len(prompts))
    ]
    with LLM(str(model), ranks=ranks, launcher="local", transport=transport, num_kv_blocks=64) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert idle_ranks(llm) == [], f"a rank computed nothing, seed {SEED}"
    found = []
    for output in outputs:
        (completion,) = output.outputs
        assert completion.logprobs is not None
        steps = zip(completion.token_ids, completion.logprobs, strict=True)
        found.append((list(completion.token_ids), [step[token].logprob.hex() for token, step in steps]))
    return found


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_every_architecture_over_every_transport(arch: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, arch, SEED, dtype="bfloat16")
    alone = answers(model, 1, "shm")
    for ranks, transport in ((3, "shm"), (2, "gloo")):
        assert answers(model, ranks, transport) == alone, (ranks, transport, SEED)
