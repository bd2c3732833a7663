"""The device engine: near the CPU engine and the slow kernels, and bit for bit itself.

Through the kernels' twin everywhere; on a GPU (marker gpu) the same tests with its own library, all ranks on that GPU.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_runs import VARIANTS, check_near, run_all
from reference_kernels import ReferenceKernels
from scheduling import make_submit
from test_engine_equality import assert_as_alone, draw_submits
from tiny_checkpoints import make_checkpoint, make_runner
from tiny_cluster import Alone, Cluster, make_config, make_tiny_checkpoint, num_finished, run_cluster
from usable_gpu import skip_without_gpu

from switchgear_runtime.cuda import backend
from switchgear_runtime.cuda.hierarchical_dispatch import HierarchicalDispatch
from switchgear_runtime.errors import CheckpointError, ConfigError
from switchgear_runtime.moe.expert_map import ExpertMap

Lab = tuple[Path, Alone]


@pytest.fixture(scope="module", params=["twin", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        skip_without_gpu()
    kind: str = request.param
    return kind


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def lab(device: str, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    seed = random.randrange(1 << 20)  # in the directory's name, which every failure shows
    model_dir = make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed)
    return model_dir, Alone(model_dir, device=device)


@pytest.mark.parametrize(("arch", "overrides"), VARIANTS, ids=str)
def test_near_the_cpu_engine(root: Path, device: str, arch: str, overrides: dict[str, Any]) -> None:
    """Of several runs together: where one token's router chooses otherwise, the rest of its sequence differs, too, and
    one run has only some ten rows."""
    model_dir = make_checkpoint(root, arch, 7, dtype="bfloat16", **overrides)
    seeds = [random.SystemRandom().randrange(1 << 30) for _ in range(4)]
    ours, theirs = (
        [rank for seed in seeds for rank in run_all(model_dir, 1, seed, device=kind)] for kind in (device, "cpu")
    )
    check_near(ours, theirs, f"seeds {seeds}")


@pytest.mark.parametrize("world_size", [1, 3])
def test_near_the_slow_kernels(root: Path, device: str, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ranks, experts with replicas, and a flip half way: the same steps by plain torch."""
    model_dir = make_checkpoint(root, "qwen2_moe", 7, dtype="bfloat16", **dict(VARIANTS)["qwen2_moe"])
    seed = random.SystemRandom().randrange(1 << 30)
    fast = run_all(model_dir, world_size, seed, device=device)
    monkeypatch.setattr(backend, "Kernels", lambda _kind, _device: ReferenceKernels())
    slow = run_all(model_dir, world_size, seed, device="twin", small_step_tokens=0)
    check_near(fast, slow, f"seed {seed}")


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_tokens_do_not_depend_on_ranks_mates_or_chunks(lab: Lab, device: str, world_size: int) -> None:
    submits = draw_submits(random.Random(f"{lab[0].name} {world_size}"), 12, longest=40)
    run = run_cluster(lab[0], world_size, submits, device=device, max_num_seqs=8, max_num_batched_tokens=24)
    assert_as_alone(lab, submits, run)
    assert run.expert_load == run.expert_rows > 0


@pytest.mark.parametrize("choice", ["static", "hash", "lp"])
def test_tokens_do_not_depend_on_placement(lab: Lab, device: str, choice: str) -> None:
    """Random maps with replicas, flipped while requests run."""
    rng = random.Random(f"{lab[0].name} {choice}")
    draw = np.random.default_rng(rng.randrange(1 << 30))
    submits = draw_submits(rng, 8, longest=30)
    config = {"device": device, "max_num_seqs": 8, "replica_choice": choice}
    cluster = Cluster(make_config(lab[0], **config), 3)
    for index, submit in enumerate(submits):
        cluster.inboxes[index % 3].put(submit)
    for epoch in (1, 2):
        cluster.stage(ExpertMap.random(draw, 2, 8, 3, num_redundant=rng.randint(0, 4), epoch=epoch))
        cluster.pump(lambda run, epoch=epoch: all(run.epochs[rank][-1:] == [epoch] for rank in range(3)))
    cluster.pump(lambda run: num_finished(run) == len(submits) or bool(run.faults))
    assert not cluster.run_result.faults
    run = cluster.stop()
    assert all(run.epochs[rank][-2:] == [1, 2] for rank in range(3))
    assert_as_alone(lab, submits, run)


@pytest.mark.parametrize("domains", ["aabb", "abab", "aaab"])
def test_tokens_do_not_depend_on_domains(lab: Lab, device: str, domains: str) -> None:
    """Rows once to each domain; a random map with replicas, flipped while requests run."""
    rng = random.Random(f"{lab[0].name} {domains}")
    draw = np.random.default_rng(rng.randrange(1 << 30))
    submits = draw_submits(rng, 8, longest=30)
    num_ranks = len(domains)
    cluster = Cluster(make_config(lab[0], device=device, max_num_seqs=8), num_ranks, domains=domains)
    for index, submit in enumerate(submits):
        cluster.inboxes[index % num_ranks].put(submit)
    cluster.stage(ExpertMap.random(draw, 2, 8, num_ranks, num_redundant=rng.randint(0, 4), epoch=1))
    cluster.pump(lambda run: all(run.epochs[rank][-1:] == [1] for rank in range(num_ranks)))
    cluster.pump(lambda run: num_finished(run) == len(submits) or bool(run.faults))
    assert not cluster.run_result.faults
    groups = {type(engine.runner._device._groups.large) for engine in cluster.engines}
    assert groups == {HierarchicalDispatch}
    assert_as_alone(lab, submits, cluster.stop())


def test_prompt_logprobs_and_preemption(lab: Lab, device: str) -> None:
    rng = random.Random(lab[0].name)
    submits = [
        make_submit(i, [rng.randrange(96) for _ in range(rng.randrange(12, 17))], max_tokens=24, seed=i, logprobs=1)
        for i in range(8)
    ]
    run = run_cluster(lab[0], 2, submits, device=device, num_kv_blocks=7, max_model_len=64)
    assert_as_alone(lab, submits, run)
    assert all(stats.num_preemptions > 0 for stats in run.stats.values())


def _narrow(root: Path) -> Path:
    return make_checkpoint(root, "qwen3_moe", 7, dtype="bfloat16", head_dim=10)


def _odd(root: Path) -> Path:
    return make_checkpoint(root, "qwen3_moe", 7, dtype="bfloat16", hidden_size=44)


@pytest.mark.parametrize(
    ("make", "error", "word"),
    [
        (lambda root: make_checkpoint(root, "phimoe", 7, dtype="bfloat16"), ConfigError, "LayerNorm"),
        (lambda root: make_checkpoint(root, "qwen3_moe", 7), ConfigError, "bfloat16"),
        (_narrow, ConfigError, "heads of 10 "),
        (_odd, CheckpointError, "44 inputs; the device engine takes multiples of 8"),
    ],
)
def test_what_a_device_cannot_serve(
    root: Path, device: str, make: Callable[[Path], Path], error: type[Exception], word: str
) -> None:
    with pytest.raises(error, match=word):
        make_runner(make(root), device=device)


def test_a_fingerprint_of_its_own(lab: Lab, device: str) -> None:
    prints = [make_runner(lab[0], device=kind).fingerprint() for kind in (device, "cpu")]
    assert f"kernels={device}" in prints[0]
    assert prints[0] != prints[1]
    assert make_runner(lab[0], device=device).device == ("cuda:0" if device == "cuda" else "cpu")


def test_an_expert_that_comes_from_another_rank(lab: Lab, device: str) -> None:
    """What one rank gives as bytes is, in the memory another made for it, the same weights on its device."""
    giver, taker = (make_runner(lab[0], device=device) for _ in range(2))
    held = giver.experts.held(1, 5)
    assert held is not None
    weights = taker.experts.empty(1, 5)
    for weight, given in zip(weights, held, strict=True):
        assert weight.data.dtype == given.dtype == torch.uint8
        weight.data.copy_(given)
    placement = giver.moe_layers[1].placement
    assert placement is not None
    own = placement.find(5, "")
    assert own is not None
    for taken, expected in zip(taker._store.on_device(weights, (1, 5, "")), own, strict=True):
        assert taken.data.device == expected.device
        assert torch.equal(taken.data, expected)
