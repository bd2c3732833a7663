"""A rank that loads many experts while a generation begins: it is waited for, and a new process loads before it joins."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from tiny_cluster import Cluster, make_config, make_tiny_checkpoint

from switchgear_runtime.comm.loopback import LoopbackHub
from switchgear_runtime.inbox import Inbox
from switchgear_runtime.link import RankLink
from switchgear_runtime.link_store import LinkStore
from switchgear_runtime.model_runner import ModelRunner
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.rank_worker import RankWorker, RankWorkerConfig
from switchgear_runtime.system import RealSystem


def slow_to_load(runner: ModelRunner, seconds: float) -> ModelRunner:
    """A generation's experts take it longer than the others wait for a step."""
    build = runner._builder.build

    def slow_build(*given: Any) -> Any:
        time.sleep(seconds)
        return build(*given)

    runner._builder.build = slow_build  # type: ignore[method-assign]
    return runner


@pytest.mark.parametrize("device", ["cpu", "twin"])  # whose ranks tell each other of their experts first
def test_who_loads_while_a_generation_begins_is_waited_for(tmp_path: Path, device: str) -> None:
    cluster = Cluster(
        make_config(make_tiny_checkpoint(tmp_path, seed=8), step_timeout_s=1.0, device=device),
        2,
        wrap=lambda runner, rank: slow_to_load(runner, 1.5) if rank == 1 else runner,
        start_timeout_s=30.0,
    )
    cluster.pump(lambda run: run.num_parked >= 2 or bool(run.faults))
    assert not cluster.stop().faults


@pytest.mark.parametrize("num_ranks", [3, 2, 4])  # of the map in force: the same, and as the third joins or stays
def test_a_new_process_loads_by_the_map_in_force(tmp_path: Path, num_ranks: int) -> None:
    config = make_config(make_tiny_checkpoint(tmp_path, seed=8), step_timeout_s=1.0)
    expert_map = ExpertMap.random(np.random.default_rng(3), 2, 8, num_ranks, num_redundant=num_ranks, epoch=5)
    worker = RankWorker(
        RankWorkerConfig(
            rank=2,
            world_size=3,
            engine={**asdict(config), "transport": "shm", "bind_cpus": False},
            host="127.0.0.1",
            port=1,
            token="",
            start_timeout_s=20.0,
            expert_map=expert_map.to_json(),
        )
    )
    link = cast(RankLink, SimpleNamespace(own_address="127.0.0.1", send=lambda _: None))
    system = RealSystem(seed=1)
    engine = worker._load(Inbox(system), link, LinkStore(link.send, system))
    runner: ModelRunner = engine.runner
    assert engine._start_timeout_s == 10.0
    assert runner.expert_map.num_ranks == 3
    if num_ranks == 3:
        assert runner.expert_map == expert_map
    elif num_ranks == 4:
        assert set(expert_map.local_experts(0, 2).tolist()) <= set(runner.expert_map.local_experts(0, 2).tolist())
    num_read = 0

    def read(moe_layer: int, expert: int, _pace: object = None) -> Any:
        nonlocal num_read
        num_read += 1
        return runner._store.expert(runner.spec.moe_layers[moe_layer], expert, None)

    runner.experts.read = read  # type: ignore[method-assign]
    runner.begin(LoopbackHub(3, system).transport(2), runner.expert_map)
    assert num_read == 0  # nothing is left to load while the others wait
