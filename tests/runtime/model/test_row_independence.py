"""The signature: logits, K and V of a sequence are the same bits whatever runs beside it, in what pieces, on how many
ranks.

The baseline is each sequence alone, on one rank, in one prefill. A drawn `Scenario` spreads the sequences over ranks
(some may have none), cuts them into chunks, mixes them with batch mates, shuffles their blocks and places the experts
anywhere.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoints import BUNDLED, contiguous_map, make_checkpoint, make_runner, make_sequence, run_ranks

from switchgear_runtime.batch import Batch, ScheduledSequence
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.model_runner import ModelRunner
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.ops_reference import unpack_k, unpack_v
from switchgear_runtime.sequence import Sequence

FRESH_SEEDS = [random.SystemRandom().randrange(1 << 32) for _ in range(3)]
FRESH = [f"fresh{index}" for index in range(len(FRESH_SEEDS))]  # the same names in every process of pytest
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_moe", {"mlp_only_layers": [1], "num_hidden_layers": 3, "attention_bias": True, "num_experts": 7,
                   "num_experts_per_tok": 4}),
    ("qwen3_moe", {"dtype": "bfloat16", "num_experts_per_tok": 6}),
    ("mixtral", {"sliding_window": 20, "num_experts_per_tok": 5}),
    ("mixtral", {"dtype": "bfloat16", "hidden_size": 33, "num_attention_heads": 3, "num_key_value_heads": 1,
                 "head_dim": 6}),
    ("qwen2_moe", {"dtype": "bfloat16", "use_sliding_window": True, "sliding_window": 20, "num_experts_per_tok": 5}),
    ("olmoe", {"clip_qkv": 0.7, "num_experts_per_tok": 6}),
    ("flex_olmo", {"dtype": "bfloat16"}),
    ("granitemoe", {"dtype": "bfloat16", "num_experts_per_tok": 5}),
    ("phimoe", {"hidden_size": 37, "head_dim": 6}),
    ("phimoe", {"dtype": "bfloat16", "router_jitter_noise": 0.4}),
]  # fmt: skip


@dataclass
class Trace:
    """What a sequence left: logits after position p, and its keys and values of every layer, [tokens, G, C]."""

    logits: dict[int, torch.Tensor] = field(default_factory=dict)
    keys_values: list[torch.Tensor] = field(default_factory=list)


@dataclass
class Job:
    token_ids: list[int]
    rank: int
    chunks: list[int]  # sums to the number of tokens


def keys_values(runner: ModelRunner, sequence: Sequence) -> list[torch.Tensor]:
    block_size = runner.config.block_size
    positions = torch.arange(len(sequence.token_ids))
    blocks = torch.tensor(sequence.block_table)[positions // block_size]
    keys, values = map(unpack_k, runner.kv_cache.k), map(unpack_v, runner.kv_cache.v)
    return [cache[blocks, :, positions % block_size] for cache in (*keys, *values)]


def run_jobs(runner: ModelRunner, jobs: dict[int, Job], num_steps: int, rng: random.Random) -> dict[int, Trace]:
    """This rank's jobs, over exactly `num_steps` steps (empty batches when it has nothing left)."""
    free = rng.sample(range(runner.num_kv_blocks), runner.num_kv_blocks)
    sequences: dict[int, Sequence] = {}
    for index, job in jobs.items():
        num_blocks = -(-len(job.token_ids) // runner.config.block_size)
        sequences[index] = make_sequence(job.token_ids, [free.pop() for _ in range(num_blocks)])
    traces = {index: Trace() for index in jobs}
    pending = {index: list(job.chunks) for index, job in jobs.items()}
    done = dict.fromkeys(jobs, 0)
    for step in range(num_steps):
        steps_left = num_steps - step
        order = rng.sample(sorted(jobs), len(jobs))
        chosen = [
            index for index in order if pending[index] and (len(pending[index]) == steps_left or rng.random() < 0.7)
        ]
        scheduled = []
        for index in chosen:
            size = pending[index].pop(0)
            scheduled.append(ScheduledSequence(sequences[index], done[index], size, True))
            done[index] += size
        logits = runner.forward(Batch(tuple(scheduled)))
        assert logits.shape == (len(chosen), runner.spec.vocab_size)
        for row, index in zip(logits, chosen, strict=True):
            traces[index].logits[done[index] - 1] = row
    for index, sequence in sequences.items():
        assert not pending[index]
        traces[index].keys_values = keys_values(runner, sequence)
    return traces


def draw_chunks(rng: random.Random, length: int) -> list[int]:
    """One prefill, or chunks, or a prefill and then decode steps, or only decode steps."""
    kind = rng.choice(["whole", "chunks", "decode", "steps"])
    if kind == "whole" or length == 1:
        return [length]
    if kind == "chunks":
        cuts = sorted(rng.sample(range(1, length), min(length - 1, rng.randint(1, 5))))
        return [end - begin for begin, end in zip([0, *cuts], [*cuts, length], strict=True)]
    first = rng.randint(1, length - 1) if kind == "decode" else 1
    first = max(first, length - 24)  # at most so many single steps
    return [first] + [1] * (length - first)


def baseline(model_dir: Path, prompts: list[list[int]]) -> list[Trace]:
    """Each alone: one prefill for the keys and values, with every position's logits."""

    def run(_rank: int, transport: Transport) -> list[Trace]:
        runner = make_runner(model_dir)
        runner.begin(transport, contiguous_map(runner))
        traces = []
        for prompt in prompts:
            sequence = make_sequence(prompt, range(-(-len(prompt) // 16)))
            rows = runner.forward(Batch(tuple(ScheduledSequence(sequence, t, 1, True) for t in range(len(prompt)))))
            last = runner.forward(Batch((ScheduledSequence(sequence, 0, len(prompt), True),)))
            assert torch.equal(last[0], rows[-1])
            traces.append(Trace(dict(enumerate(rows)), keys_values(runner, sequence)))
        return traces

    return run_ranks(1, run)[0]


def sends_surely(runner: ModelRunner, expert_map: ExpertMap) -> bool:
    """Whether some layer has too few replicas here for all of a token's experts."""
    for layer in range(expert_map.num_layers):
        is_local = expert_map.slot_table(layer, runner.rank) // expert_map.slots_per_rank == runner.rank
        if is_local.sum() < runner.spec.moe.top_k:
            return True
    return False


def check(model_dir: Path, world_size: int, seed: int, *, num_prompts: int, longest: int) -> None:
    rng = random.Random(seed)
    vocab_size = make_runner(model_dir).spec.vocab_size
    prompts = [[rng.randrange(vocab_size) for _ in range(rng.randint(1, longest))] for _ in range(num_prompts)]
    busy = rng.sample(range(world_size), rng.randint(1, world_size))  # the others only take part
    jobs = {index: Job(prompt, rng.choice(busy), draw_chunks(rng, len(prompt))) for index, prompt in enumerate(prompts)}
    num_steps = max(len(job.chunks) for job in jobs.values()) + 1
    num_redundant, map_seed, block_size, num_threads = (
        rng.randint(0, 6),
        rng.randrange(1 << 32),
        rng.choice([16, 48]),
        rng.choice([1, 2]),
    )

    def run(rank: int, transport: Transport) -> tuple[dict[int, Trace], int, bool]:
        runner = make_runner(
            model_dir,
            rank=rank,
            world_size=world_size,
            block_size=block_size,
            num_threads=num_threads,
            num_kv_blocks=128,
        )
        shape = (runner.spec.num_moe_layers, runner.spec.num_experts, world_size)
        expert_map = ExpertMap.random(np.random.default_rng(map_seed), *shape, num_redundant=num_redundant)
        runner.begin(transport, expert_map)
        own = {index: job for index, job in jobs.items() if job.rank == rank}
        traces = run_jobs(runner, own, num_steps, random.Random(f"{seed} {rank}"))
        return traces, transport.stats().sent_bytes, bool(own) and sends_surely(runner, expert_map)

    results = run_ranks(world_size, run)
    for _, sent_bytes, must_send in results:
        assert sent_bytes > 0 or not must_send, "nothing crossed"
    for index, expected in enumerate(baseline(model_dir, prompts)):
        trace = results[jobs[index].rank][0][index]
        label = f"world_size={world_size} seed={seed} sequence {index} in chunks {jobs[index].chunks}"
        assert trace.logits, label
        for position, logits in trace.logits.items():
            assert torch.equal(logits, expected.logits[position]), f"{label}: logits at {position}"
        for layer, (ours, theirs) in enumerate(zip(trace.keys_values, expected.keys_values, strict=True)):
            assert torch.equal(ours, theirs), f"{label}: keys or values, tensor {layer}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize("seed", FRESH_SEEDS, ids=FRESH)
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize(("arch", "overrides"), VARIANTS, ids=str)
def test_tiny_checkpoints(root: Path, arch: str, overrides: dict[str, Any], world_size: int, seed: int) -> None:
    check(make_checkpoint(root, arch, 7, **overrides), world_size, seed, num_prompts=6, longest=90)


@pytest.mark.parametrize("world_size", [1, 4])
def test_the_bundled_model_among_32_batch_mates(world_size: int) -> None:
    check(BUNDLED, world_size, FRESH_SEEDS[0], num_prompts=33, longest=40)
