"""ModelRunner: cache arithmetic, refusals, generations and epochs, broken steps, load and fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoints import compute, contiguous_map, make_checkpoint, make_runner, make_sequence, run_ranks

from switchgear_runtime.batch import Batch, ScheduledSequence
from switchgear_runtime.comm.loopback import LoopbackHub
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.errors import ConfigError, PeerLost
from switchgear_runtime.model_runner import ModelRunner
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.system import RealSystem

TOKENS = [5, 9, 2, 7, 7, 1, 30, 41]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints"), "qwen3_moe", 3)


def last_logits(runner: ModelRunner) -> torch.Tensor:
    return compute(runner, make_sequence(TOKENS, [0]), 0, len(TOKENS))


def test_blocks_follow_from_bytes(model_dir: Path) -> None:
    per_block = 2 * 2 * 16 * (2 * 16) * 4  # K and V, layers, tokens, kv heads x head size, fp32
    runner = make_runner(model_dir, num_kv_blocks=None, kv_cache_memory_bytes=10 * per_block + 1)
    assert runner.num_kv_blocks == 10
    assert runner.max_model_len == 160  # what the cache holds, being less than the model's 512
    half = make_runner(
        model_dir, num_kv_blocks=None, kv_cache_memory_bytes=10 * per_block, dtype="bfloat16", block_size=32
    )
    assert half.num_kv_blocks == 10
    assert half.kv_cache.k[0].shape == (10, 2, 32, 16)
    assert make_runner(model_dir, num_kv_blocks=100).max_model_len == 512


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"block_size": 24}, "block_size=24"),
        ({"max_model_len": 513}, "max_position_embeddings=512"),
        ({"max_model_len": 161, "num_kv_blocks": 10}, "max_model_len=161 does not fit"),
        ({"num_kv_blocks": None, "kv_cache_memory_bytes": 100}, "kv_cache_memory_bytes=100"),
        ({"num_kv_blocks": 1 << 50, "max_model_len": 16}, "cannot be reserved"),
    ],
)
def test_settings_that_cannot_work(model_dir: Path, settings: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        make_runner(model_dir, **settings)


def test_a_map_of_another_cluster_is_refused(model_dir: Path) -> None:
    def run(_rank: int, transport: Transport) -> None:
        runner = make_runner(model_dir)
        with pytest.raises(RuntimeError, match="before begin"):
            runner.forward(Batch())
        for shape in ((2, 6, 2), (3, 6, 1), (2, 5, 1)):
            with pytest.raises(ConfigError, match="expert map"):
                runner.begin(transport, ExpertMap.contiguous(*shape))
        runner.begin(transport, contiguous_map(runner))
        with pytest.raises(ConfigError, match="not later"):
            runner.flip(runner.stage(contiguous_map(runner)))

    run_ranks(1, run)


def test_logits_only_for_rows_that_sample(model_dir: Path) -> None:
    def run(_rank: int, transport: Transport) -> None:
        runner = make_runner(model_dir)
        runner.begin(transport, contiguous_map(runner))
        expected = last_logits(runner)
        first, second = make_sequence(TOKENS, [3]), make_sequence(TOKENS, [4])
        logits = runner.forward(Batch((ScheduledSequence(first, 0, 8, False), ScheduledSequence(second, 0, 8, True))))
        assert logits.shape == (1, runner.spec.vocab_size)
        assert torch.equal(logits[0], expected)
        assert runner.forward(Batch((ScheduledSequence(first, 0, 8, False),))).shape == (0, runner.spec.vocab_size)
        assert runner.forward(Batch()).shape == (0, runner.spec.vocab_size)
        assert torch.equal(compute(runner, first, 7, 1), expected)  # its K and V of the unsampled steps are there

    run_ranks(1, run)


def test_epochs_flip_without_a_changed_bit_and_read_only_what_is_new(model_dir: Path) -> None:
    def run(rank: int, transport: Transport) -> torch.Tensor:
        runner = make_runner(model_dir, rank=rank, world_size=2)
        runner.begin(transport, contiguous_map(runner))
        before = last_logits(runner)
        rng = np.random.default_rng(11)
        for epoch in (1, 2):
            expert_map = ExpertMap.random(rng, 2, 6, 2, num_redundant=2, epoch=epoch)
            held = [set(layer.experts.experts.tolist()) for layer in runner.moe_layers if layer.experts is not None]
            wanted = [set(expert_map.local_experts(layer, rank).tolist()) - {-1} for layer in range(2)]
            num_read = runner.checkpoint.num_tensors_read
            staged = runner.stage(expert_map)
            num_new = sum(len(want - have) for want, have in zip(wanted, held, strict=True))
            assert runner.checkpoint.num_tensors_read - num_read == 3 * num_new
            assert staged.num_new == num_new
            assert (staged.new_bytes > 0) == (num_new > 0)
            assert torch.equal(last_logits(runner), before)  # still the old epoch
            assert runner.epoch == epoch - 1
            runner.flip(staged)
            assert runner.epoch == epoch
            assert torch.equal(last_logits(runner), before)
        return before

    first, second = run_ranks(2, run)
    assert torch.equal(first, second)


def test_a_new_generation_keeps_weights_and_cache(model_dir: Path) -> None:
    system = RealSystem(seed=0)
    hubs = [LoopbackHub(1, system), LoopbackHub(1, system)]
    runner = make_runner(model_dir)
    runner.begin(hubs[0].transport(0), contiguous_map(runner))
    sequence = make_sequence(TOKENS, [2])
    expected = compute(runner, sequence, 0, len(TOKENS))
    num_read = runner.checkpoint.num_tensors_read
    runner.begin(hubs[1].transport(0), contiguous_map(runner).with_epoch(1))
    assert runner.checkpoint.num_tensors_read == num_read
    assert torch.equal(compute(runner, sequence, len(TOKENS) - 1, 1), expected)


def test_a_lost_peer_passes_through_and_counts_no_load(model_dir: Path) -> None:
    hub = LoopbackHub(2, RealSystem(seed=0))
    runner = make_runner(model_dir, world_size=2)
    runner.begin(hub.transport(0), contiguous_map(runner))
    hub.transport(1)
    hub.kill(1)
    with pytest.raises(PeerLost) as caught:
        last_logits(runner)
    assert caught.value.peers == (1,)
    single = LoopbackHub(1, RealSystem(seed=0))
    runner.begin(single.transport(0), ExpertMap.contiguous(2, 6, 1, epoch=1))
    last_logits(runner)
    assert sum(runner.load.take_routed()) == len(TOKENS) * 2 * 2  # one completed step: tokens x layers x top-k


def test_load_counts_tokens_at_the_router_and_rows_at_the_experts(model_dir: Path) -> None:
    def run(rank: int, transport: Transport) -> tuple[list[int], list[int]]:
        runner = make_runner(model_dir, rank=rank, world_size=3)
        runner.begin(transport, ExpertMap.random(np.random.default_rng(4), 2, 6, 3, num_redundant=3))
        runner.forward(Batch())
        assert sum(runner.load.take_routed()) == 0
        if rank == 1:
            runner.forward(Batch())
        else:
            last_logits(runner)
        routed, rows = runner.load.take_routed(), runner.load.take_rows()
        assert sum(runner.load.take_routed()) + sum(runner.load.take_rows()) == 0
        return routed, rows

    results = run_ranks(3, run)
    assert [sum(routed) for routed, _ in results] == [32, 0, 32]
    totals = np.array(results, dtype=np.int64).sum(0)
    assert totals[0].tolist() == totals[1].tolist()  # every routed pair was computed once, somewhere


def test_fingerprint_tells_models_and_dtypes_apart(model_dir: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path, "qwen3_moe", 3, rms_norm_eps=1e-5)
    prints = [
        make_runner(folder, dtype=dtype).fingerprint()
        for folder in (model_dir, other)
        for dtype in ("auto", "bfloat16")
    ]
    assert len(set(prints)) == 4
    assert make_runner(model_dir).fingerprint() == prints[0]


def test_mailboxes_are_bounded(model_dir: Path) -> None:
    small = make_runner(model_dir, max_num_batched_tokens=64)
    large = make_runner(model_dir, max_num_batched_tokens=1 << 20)
    assert 64 << 10 <= small.mailbox_bytes(2) <= large.mailbox_bytes(2) <= 32 << 20
    assert large.mailbox_bytes(8) < large.mailbox_bytes(2)  # a rank has one to each other
