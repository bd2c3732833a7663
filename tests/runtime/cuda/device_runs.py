"""Random steps of one model on some ranks, by any device: `run_all`; and what near enough is: `check_near`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_checkpoints import make_runner, make_sequence, run_ranks

from switchgear_runtime.batch import Batch, ScheduledSequence
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.moe.expert_map import ExpertMap

NUM_STEPS = 6
ROWS_NEAR_MIN = 0.8  # of all: a router may choose otherwise where two experts are nearly as good
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    (
        "qwen2_moe",
        {
            "hidden_size": 64,
            "moe_intermediate_size": 24,
            "intermediate_size": 40,
            "shared_expert_intermediate_size": 32,
        },
    ),
    ("mixtral", {"head_dim": 24, "intermediate_size": 32, "sliding_window": 20}),
    ("olmoe", {"hidden_size": 64, "clip_qkv": 0.7, "attention_bias": True, "num_experts_per_tok": 5}),
    ("flex_olmo", {"hidden_size": 64}),
    ("granitemoe", {"hidden_size": 96, "intermediate_size": 32, "attention_bias": True}),
    ("qwen3_moe", {"mlp_only_layers": [1], "num_hidden_layers": 3, "num_experts": 7, "tie_word_embeddings": True}),
]


def run_all(model_dir: Path, world_size: int, seed: int, **settings: Any) -> list[list[torch.Tensor]]:
    """Each rank's logits, step by step: chunks of prefill and decode, some steps empty, other experts half way."""

    def run(rank: int, transport: Transport) -> list[torch.Tensor]:
        runner = make_runner(
            model_dir, rank=rank, world_size=world_size, dtype="bfloat16", num_kv_blocks=24, **settings
        )
        shape = (runner.spec.num_moe_layers, runner.spec.num_experts, world_size)
        draw = np.random.default_rng(seed)
        epochs = [ExpertMap.random(draw, *shape, num_redundant=2, epoch=epoch) for epoch in (0, 1)]
        runner.begin(transport, epochs[0])
        rng = random.Random(f"{seed} {rank}")
        prompts = [[rng.randrange(runner.spec.vocab_size) for _ in range(rng.randint(1, 40))] for _ in range(4)]
        running = [[make_sequence(ids, [3 * i, 3 * i + 1, 3 * i + 2]), 0] for i, ids in enumerate(prompts)]
        logits = []
        for step in range(NUM_STEPS):
            if step == NUM_STEPS // 2:
                runner.flip(runner.stage(epochs[1]))
            scheduled = []
            for entry in rng.sample(running, rng.randint(0, len(running))):
                sequence, done = entry
                if done == len(sequence.token_ids):
                    sequence.token_ids.append(rng.randrange(runner.spec.vocab_size))
                size = rng.randint(1, len(sequence.token_ids) - done)
                scheduled.append(ScheduledSequence(sequence, done, size, True))
                entry[1] += size
            logits.append(runner.forward(Batch(tuple(scheduled))))
        assert sum(runner.load.take_routed()) > 0
        return logits

    return run_ranks(world_size, run)


def check_near(ours: list[list[torch.Tensor]], theirs: list[list[torch.Tensor]], label: str) -> None:
    """Logits within what bf16 rows between products allow."""
    num_near = num_rows = 0
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine, other, strict=True):
            assert a.shape == b.shape
            assert bool(a.isfinite().all()), label
            scale = b.std(-1, keepdim=True).clamp_min(1e-3) if b.numel() else b
            num_near += int(((a - b).abs() < 0.15 * scale).all(-1).sum())
            num_rows += len(a)
    assert num_rows > 0
    assert num_near >= ROWS_NEAR_MIN * num_rows, f"{label}: {num_near} of {num_rows} rows are near"
