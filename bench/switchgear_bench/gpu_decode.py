"""Decode steps of the device engine on a model with random weights: tokens per second, and how near to the bytes' bound.

The bound is what a step must read (dense weights once, the experts that its tokens chose, the K and V of all positions)
over the copy bandwidth. Before it is timed, a batch's first row is compared with the same sequence alone: bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median
from typing import Any, cast

import torch

from switchgear_bench.random_checkpoint import RandomCheckpoint, qwen3_30b_a3b, tiny
from switchgear_runtime.batch import Batch, ScheduledSequence
from switchgear_runtime.comm.loopback import LoopbackHub
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.messages import WireSampling
from switchgear_runtime.model.checkpoint import Checkpoint
from switchgear_runtime.model.spec import DecoderSpec
from switchgear_runtime.model_runner import ModelRunner
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.sequence import Sequence
from switchgear_runtime.system import RealSystem

BATCHES = (1, 32, 256)
CONTEXT = 512  # positions of each sequence
BLOCK = 16
NUM_STEPS = 20


def measure_decode(device: str, copy_bytes_per_s: float, *, is_small: bool) -> Iterator[dict[str, Any]]:
    """A row per batch size."""
    spec, batches, context = (tiny(), (1, 4), 32) if is_small else (qwen3_30b_a3b(), BATCHES, CONTEXT)
    runner = _runner(spec, device, max(batches), context)
    alone = runner.forward(_batch(1, context))
    assert bool(alone.isfinite().all())
    assert float(alone.std()) > 0.0
    for size in batches:
        batch = _batch(size, context)
        assert torch.equal(runner.forward(batch)[:1], alone), f"batch {size}: a row depends on its mates"
        runner.load.take_routed()
        steps_s = [_step(runner, batch) for _ in range(2 if is_small else NUM_STEPS)]
        touched = _experts_touched(runner, len(steps_s))
        num_bytes = _dense_bytes(spec) + touched * 6 * spec.hidden_size * spec.moe.ffn + size * _kv_bytes(spec, context)
        step_s = median(steps_s)
        yield {
            "kernel": "decode",
            "shape": "Qwen3-30B-A3B" if not is_small else "tiny",
            "num_tokens": size,
            "time_us": step_s * 1e6,
            "bound_us": num_bytes / copy_bytes_per_s * 1e6,
            "bound_by": "bytes",
            "fraction_of_bound": num_bytes / copy_bytes_per_s / step_s,
            "baseline": None,
            "baseline_us": None,
            "ratio_to_baseline": None,
            "num_repeats": len(steps_s),
            "tokens_per_s": size / step_s,
            "context": context,
        }


def _runner(spec: DecoderSpec, device: str, num_seqs: int, context: int) -> ModelRunner:
    config = EngineConfig(
        model="random",
        device=device,
        num_kv_blocks=num_seqs * (context // BLOCK) + 1,
        block_size=BLOCK,
        max_model_len=context,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=max(512, num_seqs),
    )
    where = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    checkpoint = cast(Checkpoint, RandomCheckpoint(spec, where))
    runner = ModelRunner(config, spec, checkpoint, rank=0, world_size=1)
    hub = LoopbackHub(1, RealSystem())
    runner.begin(hub.transport(0), ExpertMap.contiguous(spec.num_moe_layers, spec.num_experts, 1))
    return runner


def _batch(size: int, context: int) -> Batch:
    """The last token of `size` sequences, each with KV blocks of its own (zeros, all but the last row)."""
    blocks = context // BLOCK
    return Batch(
        tuple(
            ScheduledSequence(
                Sequence(
                    sequence_id=number,
                    incarnation=0,
                    token_ids=[1 + (7 * number + place) % 100 for place in range(context)],
                    num_prompt_tokens=context,
                    sampling=_greedy(),
                    block_table=[number * blocks + block for block in range(blocks)],
                ),
                context - 1,
                1,
                True,
            )
            for number in range(size)
        )
    )


def _greedy() -> WireSampling:
    return WireSampling(
        temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, presence_penalty=0.0, frequency_penalty=0.0,
        repetition_penalty=1.0, logit_bias={}, stop_token_ids=(), max_tokens=1 << 20, min_tokens=0, logprobs=None,
        seed=0,
    )  # fmt: skip


def _step(runner: ModelRunner, batch: Batch) -> float:
    """Its logits are on the host when it returns."""
    start_s = time.perf_counter()
    runner.forward(batch)
    return time.perf_counter() - start_s


def _experts_touched(runner: ModelRunner, num_steps: int) -> int:
    """(layer, expert) pairs of one step: all steps had the same tokens."""
    routed = runner.load.take_routed()
    assert sum(routed) == num_steps * (sum(routed) // num_steps) > 0
    return sum(count > 0 for count in routed)


def _dense_bytes(spec: DecoderSpec) -> int:
    hidden, layers = spec.hidden_size, spec.layers
    attention = sum(
        2 * hidden * layer.attention.head_dim * (2 * layer.attention.num_heads + 2 * layer.attention.num_kv_heads)
        for layer in layers
    )
    return attention + len(layers) * spec.num_experts * hidden * 4 + spec.vocab_size * hidden * 2


def _kv_bytes(spec: DecoderSpec, context: int) -> int:
    return sum(2 * 2 * context * layer.attention.num_kv_heads * layer.attention.head_dim for layer in spec.layers)
