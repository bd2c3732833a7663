"""Forced routing keeps the signature: the same tokens for any ranks and batch mates, and the load is the trace's."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from scheduling import make_submit
from tiny_cluster import VOCAB_SIZE, Alone, content, make_config, make_runner, make_tiny_checkpoint, run_cluster

from switchgear_runtime.errors import ConfigError
from switchgear_runtime.messages import Submit
from switchgear_runtime.moe.load_window import LoadWindow
from switchgear_runtime.moe.routing_trace import RoutingTrace

NUM_EXPERTS, TOP_K = 8, 2  # the tiny model's


def write_trace(path: Path, seed: int) -> RoutingTrace:
    """Three windows, each with another pair of hot experts."""
    rng = np.random.default_rng(seed)
    routed_WLE = rng.integers(1, 20, (3, 2, NUM_EXPERTS))
    for window in range(3):
        routed_WLE[window, :, 2 * window : 2 * window + 2] = 60
    windows = [LoadWindow(begin_step=i, end_step=i + 1, routed_SLE=load[None]) for i, load in enumerate(routed_WLE)]
    trace = RoutingTrace.of(windows, top_k=TOP_K)
    trace.save(path)
    return trace


def draw_submits(rng: random.Random, count: int) -> list[Submit]:
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 50))] for _ in range(count)]
    return [
        make_submit(i, prompt, max_tokens=rng.randrange(1, 20), logprobs=2, temperature=0.9, seed=rng.getrandbits(64))
        for i, prompt in enumerate(prompts)
    ]


def test_the_same_tokens_wherever_they_are_computed(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    rng = random.Random(seed)
    write_trace(tmp_path / "trace.npz", seed)
    forced = {"forced_routing": str(tmp_path / "trace.npz"), "enable_prefix_caching": False}
    model_dir = make_tiny_checkpoint(tmp_path, seed)
    submits = draw_submits(rng, 9)
    alone, free = Alone(model_dir, **forced), Alone(model_dir)
    expected = {submit.sequence_id: content(alone.outputs(submit)) for submit in submits}
    assert any(content(free.outputs(submit)) != expected[submit.sequence_id] for submit in submits), f"seed {seed}"
    for world_size, changes in (
        (1, {}),
        (2, {"max_num_batched_tokens": 40}),
        (4, {"num_kv_blocks": 8, "max_model_len": 100}),
    ):
        run = run_cluster(model_dir, world_size, submits, **forced, **changes)
        actual = {sequence_id: content(outputs) for sequence_id, outputs in run.outputs.items()}
        assert actual == expected, f"seed {seed}, {world_size} ranks, {changes}"


def test_the_load_is_the_traces(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    trace = write_trace(tmp_path / "trace.npz", seed)
    forced = {"forced_routing": str(tmp_path / "trace.npz"), "enable_prefix_caching": False}
    alone = Alone(make_tiny_checkpoint(tmp_path, seed), **forced)
    for window, expected in enumerate(trace):
        alone._runner.load.take_routed()
        for request in range(8):
            alone.outputs(make_submit(request, [5] * 100, max_tokens=4, temperature=0.0, seed=window + 3 * request))
        routed_LE = np.array(alone._runner.load.take_routed()).reshape(2, NUM_EXPERTS)
        share_LE, due_LE = (
            routed_LE / routed_LE.sum(axis=1)[:, None],
            expected.routed_LE / expected.routed_LE.sum(1)[:, None],
        )
        assert np.abs(share_LE - due_LE).sum(axis=1).max() / 2 < 0.06, f"seed {seed}, window {window}"


def test_a_trace_of_another_model_and_a_prefix_cache_are_refused(tmp_path: Path) -> None:
    window = LoadWindow(begin_step=0, end_step=1, routed_SLE=np.ones((1, 2, 7), np.int64))
    RoutingTrace.of([window], top_k=2).save(tmp_path / "trace.npz")
    model_dir = make_tiny_checkpoint(tmp_path, 3)
    path = str(tmp_path / "trace.npz")
    with pytest.raises(ConfigError, match="enable_prefix_caching"):
        make_config(model_dir, forced_routing=path)
    with pytest.raises(ConfigError, match=r"\(2, 7\).*\(2, 8\)"):
        make_runner(make_config(model_dir, forced_routing=path, enable_prefix_caching=False), 0, 1)
