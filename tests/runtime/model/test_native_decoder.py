"""The native decoder gives the bits of the op-by-op Decoder: hidden states, logits, KV cache and load counters."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from tiny_checkpoints import SIZES, make_checkpoint, make_sequence, run_ranks

from switchgear_runtime import ops
from switchgear_runtime.batch import Batch, FlatBatch, ScheduledSequence
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.errors import TransportAborted
from switchgear_runtime.model.checkpoint import Checkpoint
from switchgear_runtime.model_runner import ModelRunner
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.moe.load_window import LoadWindow
from switchgear_runtime.moe.routing_trace import RoutingTrace
from switchgear_runtime.sequence import Sequence

NOT_NATIVE = {"phimoe"}  # LayerNorm and SparseMixer
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((arch, {}) for arch in SIZES if arch not in NOT_NATIVE),
    ("qwen3_moe", {"mlp_only_layers": [1], "num_hidden_layers": 3, "attention_bias": True, "num_experts": 7,
                   "num_experts_per_tok": 4, "tie_word_embeddings": True}),
    ("mixtral", {"sliding_window": 20, "hidden_size": 33, "num_attention_heads": 3, "num_key_value_heads": 1,
                 "head_dim": 6, "intermediate_size": 27}),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 20, "hidden_size": 42, "moe_intermediate_size": 21,
                   "shared_expert_intermediate_size": 35, "norm_topk_prob": True, "head_dim": 10}),
    ("olmoe", {"clip_qkv": 0.7, "num_experts_per_tok": 6, "attention_bias": True, "intermediate_size": 23}),
    ("flex_olmo", {"num_experts": 17, "num_experts_per_tok": 1}),
    ("granitemoe", {"num_local_experts": 9, "num_experts_per_tok": 1, "attention_bias": True}),
]  # fmt: skip
KINDS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "int4": {"dtype": "bfloat16", "quantization": "int4"},
}
NUM_STEPS = 8


class Recorder(ModelRunner):
    """Keeps what the layers of each step gave."""

    states: list[torch.Tensor]

    def _hidden_states(self, flat: FlatBatch, transport: Transport) -> torch.Tensor:
        x_TD = super()._hidden_states(flat, transport)
        self.states.append(x_TD)
        return x_TD


@dataclass
class Trace:
    """What one rank computed, step by step."""

    states: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    prompt_logits: list[torch.Tensor] = field(default_factory=list)
    loads: list[tuple[list[int], list[int], dict[str, bytes]]] = field(default_factory=list)
    cache: bytes = b""


def make_recorder(model_dir: Path, rank: int, world_size: int, **settings: Any) -> Recorder:
    native = settings.pop("native")
    checkpoint = Checkpoint(model_dir)
    config = EngineConfig(model=str(model_dir), num_kv_blocks=24, max_num_batched_tokens=512, **settings)
    runner = Recorder(config, checkpoint.spec, checkpoint, rank=rank, world_size=world_size, native=native)
    runner.states = []
    assert runner.is_native == native
    return runner


def run_steps(runner: Recorder, rng: random.Random, epochs: list[ExpertMap]) -> Trace:
    """Steps that mix chunks of prefill with decode, some empty; the second half on other experts."""
    block_size, num_blocks, vocab_size = runner.config.block_size, runner.num_kv_blocks, runner.spec.vocab_size
    free = rng.sample(range(num_blocks), num_blocks)
    running: list[list[Any]] = []  # [sequence, tokens done]
    trace = Trace()
    for step in range(NUM_STEPS):
        if step == NUM_STEPS // 2:
            runner.flip(runner.stage(epochs[1]))
        if free and rng.random() < 0.8:
            token_ids = [rng.randrange(vocab_size) for _ in range(rng.randint(1, 50))]
            needed = -(-(len(token_ids) + 8) // block_size)
            table, free = free[:needed], free[needed:]
            if len(table) == needed:
                sequence = make_sequence(token_ids, table)
                sequence.tenant = rng.choice(["", "a", "b"])
                if rng.random() < 0.5:
                    sequence.sampling = msgspec.structs.replace(sequence.sampling, prompt_logprobs=0)
                running.append([sequence, 0])
        scheduled = []
        for entry in rng.sample(running, rng.randint(0, len(running))):
            sequence, done = entry
            if done == len(sequence.token_ids):
                sequence.token_ids.append(rng.randrange(vocab_size))
            left = len(sequence.token_ids) - done
            size = rng.randint(1, left)
            scheduled.append(ScheduledSequence(sequence, done, size, size == left))
            entry[1] += size
        trace.logits.append(runner.forward(Batch(tuple(scheduled))))
        trace.prompt_logits += list(runner.prompt_logits())
        trace.loads.append((runner.load.take_routed(), runner.load.take_rows(), runner.load.taken_by_tenant))
    trace.states, trace.cache = runner.states, bytes(runner.kv_cache._memory)
    return trace


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield
    ops.set_num_threads(1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def check(model_dir: Path, world_size: int, kind: str, **changes: Any) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    rng = random.Random(seed)
    settings = KINDS[kind] | {"block_size": rng.choice([16, 48]), "num_threads": rng.choice([1, 2, 3])} | changes
    map_seed, num_redundant = rng.randrange(1 << 30), rng.randint(0, 4)

    def run_all(native: bool) -> list[Trace]:
        def run(rank: int, transport: Transport) -> Trace:
            runner = make_recorder(model_dir, rank, world_size, native=native, **settings)
            shape = (runner.spec.num_moe_layers, runner.spec.num_experts, world_size)
            draw = np.random.default_rng(map_seed)
            epochs = [ExpertMap.random(draw, *shape, num_redundant=num_redundant, epoch=epoch) for epoch in (0, 1)]
            runner.begin(transport, epochs[0])
            return run_steps(runner, random.Random(f"{seed} {rank}"), epochs)

        return run_ranks(world_size, run)

    fast, slow = run_all(True), run_all(False)
    for rank, (ours, theirs) in enumerate(zip(fast, slow, strict=True)):
        label = f"seed {seed}, rank {rank} of {world_size}, {settings}"
        for name in ("states", "logits", "prompt_logits"):
            for index, (mine, other) in enumerate(zip(getattr(ours, name), getattr(theirs, name), strict=True)):
                assert torch.equal(mine, other), f"{label}: {name} {index}"
        assert ours.loads == theirs.loads, label
        assert ours.cache == theirs.cache, label
        assert len(ours.states) == NUM_STEPS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("arch", "overrides"), VARIANTS, ids=str)
def test_the_same_bits_as_op_by_op(root: Path, arch: str, overrides: dict[str, Any], kind: str) -> None:
    model_dir = make_checkpoint(root, arch, 7, **overrides)
    for world_size in (1, 2, 3):
        check(model_dir, world_size, kind)


def test_the_same_bits_with_forced_routing(root: Path) -> None:
    model_dir = make_checkpoint(root, "qwen3_moe", 7)
    spec = Checkpoint(model_dir).spec
    load = np.random.default_rng(7).integers(0, 9, (1, spec.num_moe_layers, spec.num_experts))
    window = LoadWindow(begin_step=0, end_step=1, routed_SLE=load)
    RoutingTrace.of([window], top_k=spec.moe.top_k).save(root / "trace.npz")
    for world_size in (1, 2):
        check(model_dir, world_size, "bfloat16", forced_routing=str(root / "trace.npz"), enable_prefix_caching=False)


def test_what_is_not_native_says_so(root: Path) -> None:
    for arch in SIZES:
        model_dir = make_checkpoint(root, arch, 7)
        checkpoint = Checkpoint(model_dir)
        config = EngineConfig(model=str(model_dir), num_kv_blocks=4)
        runner = ModelRunner(config, checkpoint.spec, checkpoint, rank=0, world_size=1)
        assert runner.is_native == (arch not in NOT_NATIVE), arch


def test_bad_steps_are_errors_and_the_next_is_right(root: Path) -> None:
    def run(_rank: int, transport: Transport) -> None:
        runner = make_recorder(make_checkpoint(root, "qwen3_moe", 7), 0, 1, native=True)
        runner.begin(transport, ExpertMap.contiguous(2, 6, 1))
        good = make_sequence([1, 2, 3], [0])
        expected = runner.forward(Batch((ScheduledSequence(good, 0, 3, True),)))
        for token_ids, table, what in (
            ([1, 999], [1], r"token_ids_T\[1\]=999 is outside the vocabulary of 151"),
            ([1, -1], [1], r"token_ids_T\[1\]=-1"),
            ([1, 2], [24], "slots_T"),
            ([1] * 400, [*range(24), 0], r"positions_T\[384\]=384 is outside the table of 384 positions"),
        ):
            bad = make_sequence(token_ids, table)
            with pytest.raises(ValueError, match=what):
                runner.forward(Batch((ScheduledSequence(bad, 0, len(token_ids), True),)))
        assert torch.equal(runner.forward(Batch((ScheduledSequence(good, 0, 3, True),))), expected)
        assert runner.load.take_routed() == [2 * count for count in _routed(runner, good)]

    run_ranks(1, run)


def _routed(runner: ModelRunner, sequence: Sequence) -> list[int]:
    runner.forward(Batch((ScheduledSequence(sequence, 0, 3, True),)))
    return runner.load.take_routed()


def test_an_error_of_the_transport_passes_through(root: Path) -> None:
    model_dir = make_checkpoint(root, "qwen3_moe", 7)

    def run(rank: int, transport: Transport) -> None:
        runner = make_recorder(model_dir, rank, 2, native=True)
        runner.begin(transport, ExpertMap.contiguous(2, 6, 2))
        if rank == 1:
            transport.abort("enough")
            return
        with pytest.raises(TransportAborted, match="enough"):
            runner.forward(Batch((ScheduledSequence(make_sequence([1, 2], [0]), 0, 2, True),)))
        assert sum(runner.load.take_routed()) == 0

    run_ranks(2, run)
