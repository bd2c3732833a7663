"""A GPU's footprint is what the device engine really holds, and its bounds are above what steps take (on the twin)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_runs import VARIANTS
from test_footprint import tensor_bytes
from tiny_checkpoints import contiguous_map, make_checkpoint, make_runner, make_sequence
from torch.profiler import ProfilerActivity, profile

from switchgear_runtime.batch import Batch, ScheduledSequence
from switchgear_runtime.comm.loopback import LoopbackHub
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.cuda import device_footprint, structs
from switchgear_runtime.cuda.backend import kernels_of
from switchgear_runtime.cuda.device_footprint import (
    GPU_MEMORY_UTILIZATION,
    DeviceBytes,
    device_bytes_of,
    exchange_bytes,
    kv_cache_bytes,
)
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.model import footprint
from switchgear_runtime.model.spec import DecoderSpec, load_spec
from switchgear_runtime.model_runner import ModelRunner
from switchgear_runtime.system import RealSystem

GIB = 1 << 30


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def peak_bytes(run: Any) -> int:
    """Of what torch's allocator holds at once while `run` runs, beside what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as told:
        run()
    events = sorted(
        (event.start_ns(), event.nbytes())
        for event in told.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    held = np.cumsum([num_bytes for _, num_bytes in events])
    assert len(held), "nothing was allocated"
    return int(held.max())


def weights_and_pool(runner: ModelRunner, dtype: str = "bfloat16") -> None:
    spec, device = runner.spec, runner._device
    assert device is not None
    found = device_bytes_of(spec, runner.config, num_ranks=runner.world_size, num_positions=runner.max_model_len)
    pool = runner._store.pool
    assert (pool.num_slots, pool.layout.num_bytes) == (found.num_slots, found.slot)
    assert found.pool == found.num_slots * found.slot
    skip = (runner.kv_cache, pool, device._kernels, device.placements)
    held = tensor_bytes(runner._decoder, device._layers, device._final_norm, skip=skip)
    caches = tensor_bytes(runner.kv_cache.k, runner.kv_cache.v)
    assert caches == runner.num_kv_blocks * footprint.kv_block_bytes(spec, dtype, runner.config.block_size)
    experts = tensor_bytes(*(layer.experts for layer in runner.moe_layers))
    tables = (
        48 * spec.num_moe_layers * spec.num_experts
    )  # PlacementTables: addresses and ids of each slot, lent ones too
    assert 0 <= held - caches - experts - found.dense.total <= tables


@pytest.mark.parametrize(("arch", "overrides"), VARIANTS)
def test_what_a_runner_allocates(arch: str, overrides: dict[str, Any], root: Path) -> None:
    model_dir = make_checkpoint(root, arch, 1, dtype="bfloat16", **overrides)
    for world_size, survive in ((1, 1), (2, 1), (3, 0), (4, 2)):
        runner = make_runner(
            model_dir, rank=world_size - 1, world_size=world_size, device="twin", survive=survive, num_kv_blocks=7
        )
        weights_and_pool(runner)


def start(model_dir: Path, **settings: Any) -> ModelRunner:
    runner = make_runner(model_dir, device="twin", enable_prefix_caching=False, **settings)
    runner.begin(LoopbackHub(1, RealSystem()).transport(0), contiguous_map(runner))
    return runner


def prefill(runner: ModelRunner, num_tokens: int) -> Batch:
    """One sequence, of which every token is drawn from."""
    sequence = make_sequence([1] * num_tokens, range(-(-num_tokens // runner.config.block_size)))
    return Batch(tuple(ScheduledSequence(sequence, t, 1, True) for t in range(num_tokens)))


def bound(runner: ModelRunner) -> DeviceBytes:
    return device_bytes_of(runner.spec, runner.config, num_ranks=1, num_positions=runner.max_model_len)


@pytest.mark.parametrize(("arch", "overrides"), VARIANTS)
def test_a_large_step(arch: str, overrides: dict[str, Any], root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it holds at once is within the bound, and not far below, but for the work of attention, which hardly has any."""
    monkeypatch.setattr(device_footprint, "ATTENTION_WORK_BYTES", 0)
    model_dir = make_checkpoint(root, arch, 2, dtype="bfloat16", **overrides)
    runner = start(model_dir, max_num_batched_tokens=512, max_num_seqs=512, small_step_tokens=0)
    batch = prefill(runner, 512)
    most = bound(runner).step - footprint.PROMPT_LOGITS_BYTES
    assert most / 4 < peak_bytes(lambda: runner.forward(batch)) <= most


@pytest.mark.parametrize(("arch", "overrides"), VARIANTS)
def test_small_steps(arch: str, overrides: dict[str, Any], root: Path) -> None:
    """Of all sizes, as traffic that grows brings them, with tiles and without: in the one piece that was reserved."""
    model_dir = make_checkpoint(root, arch, 2, dtype="bfloat16", **overrides)
    runner = start(model_dir, small_step_tokens=48, max_num_seqs=48, max_num_batched_tokens=48)
    assert runner._device is not None
    small, capacity = runner._device._small, bound(runner).small_steps
    for size in (1, 2, 3, 5, 8, 16, 24, 40, 48):
        runner.forward(prefill(runner, size))
        sequences = [make_sequence([1] * 9, [index]) for index in range(size)]
        runner.forward(Batch(tuple(ScheduledSequence(one, 8, 1, True) for one in sequences)))
    assert [chunk.numel() for chunk in small.memory._chunks] == [capacity]


@pytest.mark.parametrize("seed", range(20))
def test_what_peers_write_into(seed: int, root: Path) -> None:
    rng = np.random.default_rng(seed)
    spec = load_spec(make_checkpoint(root, "qwen3_moe", 1, dtype="bfloat16"))
    kernels = kernels_of("twin", 0)
    num_ranks, max_tokens = int(rng.integers(2, 65)), int(rng.integers(1, 1000))
    args = structs.Peer(
        num_ranks=num_ranks,
        max_tokens=max_tokens,
        top_k=spec.moe.top_k,
        hidden=spec.hidden_size,
        row_bytes=2 * spec.hidden_size,
    )
    assert exchange_bytes(spec, num_ranks=num_ranks, max_tokens=max_tokens) == kernels.size("peer_bytes", args)
    assert exchange_bytes(spec, num_ranks=1, max_tokens=max_tokens) == 0


def test_the_rest_is_the_kv_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_spec(make_checkpoint(root, "qwen3_moe", 1, dtype="bfloat16"))
    engine = EngineConfig(device="cuda", max_model_len=128)
    monkeypatch.setattr(device_footprint, "useful_cache_bytes", lambda *_: 1 << 60)
    others = device_bytes_of(spec, engine, num_ranks=2, num_positions=128).total
    for part in (None, 0.5):
        config = replace(engine, gpu_memory_utilization=part)
        left = kv_cache_bytes(spec, config, num_ranks=2, memory_bytes=80 * GIB)
        assert left == int((part or GPU_MEMORY_UTILIZATION) * 80 * GIB) - others
    one_sequence = 128 // 16 * footprint.kv_block_bytes(spec, "bfloat16", 16)
    whole = replace(engine, gpu_memory_utilization=1.0)
    assert kv_cache_bytes(spec, whole, num_ranks=2, memory_bytes=others + one_sequence) == one_sequence
    with pytest.raises(ConfigError, match=r"expert slots .*raise gpu_memory_utilization"):
        kv_cache_bytes(spec, whole, num_ranks=2, memory_bytes=others + one_sequence - 1)


def test_no_more_cache_than_is_of_use(root: Path) -> None:
    spec = load_spec(make_checkpoint(root, "qwen3_moe", 1, dtype="bfloat16"))
    config = EngineConfig(device="cuda", max_num_seqs=8, max_model_len=100)
    blocks = kv_cache_bytes(spec, config, num_ranks=1, memory_bytes=80 * GIB) // footprint.kv_block_bytes(
        spec, "bfloat16", 16
    )
    assert blocks == 2 * 8 * 7


def test_fp8_experts_are_half_as_large(root: Path) -> None:
    spec: DecoderSpec = load_spec(
        make_checkpoint(root, "qwen3_moe", 1, dtype="bfloat16", hidden_size=128, moe_intermediate_size=128)
    )
    plain, fp8 = (
        device_bytes_of(spec, EngineConfig(device="twin", quantization=name), num_ranks=1, num_positions=64).slot
        for name in ("none", "fp8")
    )
    assert plain == 256 + 3 * 128 * 128 * 2
    assert fp8 == 256 + 3 * 128 * 128 + 256 * 2


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"gpu_memory_utilization": 0.5}, "needs device='cuda'"),
        ({"device": "cuda", "gpu_memory_utilization": 0}, "above 0 and at most 1"),
        ({"device": "cuda", "gpu_memory_utilization": 1.1}, "above 0 and at most 1"),
        ({"device": "cuda", "gpu_memory_utilization": "0.5"}, "above 0 and at most 1"),
    ],
)
def test_what_is_no_part(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        EngineConfig(**settings)
