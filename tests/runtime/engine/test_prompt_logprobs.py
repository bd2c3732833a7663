"""Prompt logprobs: each position's, bit for bit what one rank computes for that prefix alone, however it is served."""

from __future__ import annotations

import random
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from scheduling import make_sequence, make_submit
from tiny_cluster import VOCAB_SIZE, ClusterRun, make_config, make_runner, make_tiny_checkpoint, run_cluster

from switchgear_runtime import launched_step, ops, prompt_scorer
from switchgear_runtime.batch import Batch, ScheduledSequence
from switchgear_runtime.comm.loopback import LoopbackHub
from switchgear_runtime.messages import Submit
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.system import RealSystem

Scored = list[tuple[float, list[tuple[int, float]]]]


class PrefixByPrefix:
    """The reference: one token a step through one rank, each row of logits read by plain means."""

    def __init__(self, model_dir: Path) -> None:
        self._runner = make_runner(make_config(model_dir), 0, 1)
        spec = self._runner.spec
        hub = LoopbackHub(1, RealSystem(seed=0))
        self._runner.begin(hub.transport(0), ExpertMap.contiguous(spec.num_moe_layers, spec.num_experts, 1))

    def scored(self, prompt: list[int], num_logprobs: int) -> Scored:
        sequence = make_sequence(0, prompt)
        sequence.block_table = array("i", range(len(prompt) // 16 + 1))
        result: Scored = []
        for position in range(len(prompt) - 1):
            logits = self._runner.forward(Batch((ScheduledSequence(sequence, position, 1, True),)))
            all_logprobs = ops.log_softmax_at(
                logits.expand(VOCAB_SIZE, VOCAB_SIZE).contiguous(), torch.arange(VOCAB_SIZE)
            )
            best = sorted(range(VOCAB_SIZE), key=lambda i: (-float(logits[0, i]), i))[:num_logprobs]
            logprobs = all_logprobs.tolist()
            result.append((logprobs[prompt[position + 1]], [(i, logprobs[i]) for i in best]))
        return result


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), random.randrange(1 << 20))


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> PrefixByPrefix:
    return PrefixByPrefix(model_dir)


def joined(run: ClusterRun, submit: Submit) -> Scored:
    result: Scored = []
    for part in run.scored[submit.sequence_id]:
        assert part.start == len(result) + 1, "lost, repeated or reordered"
        result += list(zip(part.logprobs, part.top_logprobs, strict=True))
    return result


SETTINGS: list[dict[str, Any]] = [
    {"world_size": 1},
    {"world_size": 3},
    {"world_size": 2, "max_num_batched_tokens": 16, "max_num_seqs": 8},
    {"world_size": 2, "enable_chunked_prefill": False},
    {"world_size": 1, "num_kv_blocks": 12, "max_model_len": 128},  # preempts
    {"world_size": 2, "enable_prefix_caching": False},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("few_rows", [False, True])
def test_every_way_of_serving_gives_the_same_bits(
    model_dir: Path, reference: PrefixByPrefix, options: dict[str, Any], few_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if few_rows:  # chunks of three rows of logits, frames of five positions
        monkeypatch.setattr(prompt_scorer, "POSITIONS_PER_FRAME", 5)
        monkeypatch.setattr(launched_step, "PROMPT_LOGITS_BYTES_MAX", 3 * 4 * VOCAB_SIZE)
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    common = [rng.randrange(VOCAB_SIZE) for _ in range(70)]
    submits = []
    for sequence_id in range(8):
        prompt = common[: rng.choice([0, 32, 64])] + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 30))]
        num_logprobs = rng.choice([None, 0, 1, 5])
        submits.append(make_submit(sequence_id, prompt, prompt_logprobs=num_logprobs, max_tokens=rng.randrange(1, 12)))
    settings = dict(options)
    run = run_cluster(model_dir, settings.pop("world_size"), submits, **settings)
    for submit in submits:
        num_logprobs = submit.sampling.prompt_logprobs
        expected = [] if num_logprobs is None else reference.scored(submit.prompt_token_ids, num_logprobs)
        assert joined(run, submit) == expected, f"seed {seed}: {options} {submit}"
        if num_logprobs is not None:
            assert run.outputs[submit.sequence_id][0].num_cached_tokens == 0


def test_a_scored_prompt_fills_the_prefix_cache_and_does_not_read_it(model_dir: Path) -> None:
    prompt = [random.Random(3).randrange(VOCAB_SIZE) for _ in range(40)]
    runs = [make_submit(i, prompt, prompt_logprobs=one, max_tokens=1) for i, one in enumerate([None, 0, None])]
    # A step each: the second waits for the first, by the budget of tokens.
    run = run_cluster(model_dir, 1, runs, max_num_batched_tokens=40, max_num_seqs=1)
    assert [run.outputs[i][0].num_cached_tokens for i in range(3)] == [0, 0, 32]
    assert sum(len(part.logprobs) for part in run.scored[1]) == 39
