"""Steps of the device engine on a model with random weights: decode against the bytes' bound, prefill against the FLOPs'.

Bytes are what a step must read (dense weights once, the experts that its tokens chose, the K and V of all positions) over
the copy bandwidth; FLOPs are the products' and attention's over that of a large bf16 product. Before it is timed, a batch's
first row is compared with the same sequence alone: bit for bit.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from statistics import median
from typing import Any, cast

import torch

from switchgear_bench.gpu_clock import Bounds
from switchgear_bench.random_checkpoint import RandomCheckpoint, qwen3_30b_a3b, tiny
from switchgear_runtime.batch import Batch, ScheduledSequence
from switchgear_runtime.comm.loopback import LoopbackHub
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.messages import WireSampling
from switchgear_runtime.model.checkpoint import Checkpoint
from switchgear_runtime.model.spec import DecoderSpec
from switchgear_runtime.model_runner import ModelRunner
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.sampler import Sampler
from switchgear_runtime.sequence import Sequence
from switchgear_runtime.system import RealSystem

BATCHES = (1, 32, 256)
CONTEXT = 512  # positions of each sequence
PROMPTS = 8  # of so many positions are prefilled in one step
BLOCK = 16
NUM_STEPS = 20
NUM_PREFILLS = 5


def engine_steps(device: str, bounds: Bounds, *, is_small: bool, gemm_family: str) -> Iterator[dict[str, Any]]:
    """A row per batch size, and one of a prefill."""
    spec, batches, context = (tiny(), (1, 4), 32) if is_small else (qwen3_30b_a3b(), BATCHES, CONTEXT)
    prompts = 2 if is_small else PROMPTS
    name = "tiny" if is_small else "Qwen3-30B-A3B"
    runner = _runner(spec, device, gemm_family, max(*batches, prompts), context, prompts * context)
    alone = runner.forward(_batch(1, context, 1))
    assert bool(alone.isfinite().all())
    assert float(alone.std()) > 0.0
    for size in batches:
        batch = _batch(size, context, 1)
        assert torch.equal(runner.forward(batch)[:1], alone), f"batch {size}: a row depends on its mates"
        step_s, touched = _time(runner, batch, 2 if is_small else NUM_STEPS)
        experts_bytes = touched * 6 * spec.hidden_size * spec.moe.ffn
        num_bytes = _dense_bytes(spec) + experts_bytes + size * _kv_bytes(spec, context)
        row = bounds.row(num_bytes, size * _flops(spec, context, 1), step_s)
        yield {"kernel": "decode", "shape": name, "num_tokens": size, **row, **_rest(size / step_s, context)}
    batch = _batch(prompts, context, context)
    first = runner.forward(_batch(1, context, context))
    assert torch.equal(runner.forward(batch)[:1], first), "prefill: a row depends on its mates"
    step_s, touched = _time(runner, batch, 2 if is_small else NUM_PREFILLS)
    num_tokens = prompts * context
    num_bytes = _dense_bytes(spec) + touched * 6 * spec.hidden_size * spec.moe.ffn
    row = bounds.row(num_bytes, prompts * _flops(spec, context, context), step_s)
    yield {"kernel": "prefill", "shape": name, "num_tokens": num_tokens, **row, **_rest(num_tokens / step_s, context)}


def _rest(tokens_per_s: float, context: int) -> dict[str, Any]:
    nothing = {"variant": "", "baseline": None, "baseline_us": None, "ratio_to_baseline": None}
    return {**nothing, "tokens_per_s": tokens_per_s, "context": context}


def _runner(
    spec: DecoderSpec, device: str, gemm_family: str, num_seqs: int, context: int, num_tokens: int
) -> ModelRunner:
    config = EngineConfig(
        model="random",
        device=device,
        gemm_family=gemm_family,
        num_kv_blocks=num_seqs * (context // BLOCK) + 1,
        block_size=BLOCK,
        max_model_len=context,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=max(num_tokens, num_seqs),
    )
    where = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    checkpoint = cast(Checkpoint, RandomCheckpoint(spec, where))
    runner = ModelRunner(config, spec, checkpoint, rank=0, world_size=1)
    hub = LoopbackHub(1, RealSystem())
    runner.begin(hub.transport(0), ExpertMap.contiguous(spec.num_moe_layers, spec.num_experts, 1))
    if device == "cuda":
        torch.cuda.synchronize()  # weights are drawn on another stream than steps run on
    return runner


def _batch(size: int, context: int, num_tokens: int) -> Batch:
    """The last tokens of `size` sequences, each with KV blocks of its own."""
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
                    block_table=array("i", range(number * blocks, (number + 1) * blocks)),
                ),
                context - num_tokens,
                num_tokens,
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


def _time(runner: ModelRunner, batch: Batch, num_steps: int) -> tuple[float, int]:
    """(seconds from step to step, (layer, expert) pairs that one touches). As the engine: the next step is launched before
    the last is finished, and tokens are drawn on the device."""
    sampler = Sampler()
    runner.launch(batch, sampler).finish()  # from here on a small step of its size is a graph
    runner.load.take_routed()
    steps_s = []
    running = runner.launch(batch, sampler)
    start_s = time.perf_counter()
    for _ in range(num_steps):
        following = runner.launch(batch, sampler)
        running.finish()
        running, end_s = following, time.perf_counter()
        steps_s.append(end_s - start_s)
        start_s = end_s
    running.finish()
    routed, num_run = runner.load.take_routed(), num_steps + 1
    assert sum(routed) == num_run * (sum(routed) // num_run) > 0  # all steps had the same tokens
    return median(steps_s), sum(count > 0 for count in routed)


def _dense_bytes(spec: DecoderSpec) -> int:
    hidden, layers = spec.hidden_size, spec.layers
    attention = sum(
        2 * hidden * layer.attention.head_dim * (2 * layer.attention.num_heads + 2 * layer.attention.num_kv_heads)
        for layer in layers
    )
    return attention + len(layers) * spec.num_experts * hidden * 4 + spec.vocab_size * hidden * 2


def _kv_bytes(spec: DecoderSpec, context: int) -> int:
    return sum(2 * 2 * context * layer.attention.num_kv_heads * layer.attention.head_dim for layer in spec.layers)


def _flops(spec: DecoderSpec, context: int, num_tokens: int) -> float:
    """Of a sequence's last tokens: their products, and scores and sums over all positions before each."""
    total = 2.0 * spec.vocab_size * spec.hidden_size  # logits, of the last one
    for layer in spec.layers:
        heads, head_dim = layer.attention.num_heads, layer.attention.head_dim
        products = 2 * spec.hidden_size * head_dim * (2 * heads + 2 * layer.attention.num_kv_heads)
        experts = 2 * spec.num_experts * spec.hidden_size + 6 * spec.moe.top_k * spec.hidden_size * spec.moe.ffn
        positions = sum(range(context - num_tokens + 1, context + 1))
        total += num_tokens * (products + experts) + 4 * heads * head_dim * positions
    return total
