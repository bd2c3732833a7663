"""Random maps applied back to back while requests run: nothing differs by a bit from one rank that never moved an expert.

Five seconds in the suite, ten minutes marked slow; the seed is in every message.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest
from scheduling import make_submit
from tiny_cluster import Alone, Cluster, make_config, make_tiny_checkpoint

from switchgear_runtime.messages import Submit
from switchgear_runtime.moe.expert_map import ExpertMap

NUM_PROMPTS = 24  # distinct ones, so that the reference computes each once


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Alone]:
    model_dir = make_tiny_checkpoint(tmp_path_factory.mktemp("soak"), seed=9)
    return model_dir, Alone(model_dir)


def soak(lab: tuple[Path, Alone], world_size: int, duration_s: float, seed: int) -> None:
    model_dir, alone = lab
    draw, rng = random.Random(seed), np.random.default_rng(seed)
    cluster = Cluster(make_config(model_dir), world_size)
    prompts = [[draw.randrange(1, 96) for _ in range(draw.randrange(1, 40))] for _ in range(NUM_PROMPTS)]
    sent: dict[int, Submit] = {}
    num_flips, epoch, deadline_s = 0, 0, time.monotonic() + duration_s

    def num_done() -> int:
        return sum(outputs[-1].finish_reason is not None for outputs in cluster.run_result.outputs.values() if outputs)

    while time.monotonic() < deadline_s:
        while len(sent) - num_done() < 3 * world_size:
            index = draw.randrange(NUM_PROMPTS)
            submit = make_submit(
                len(sent), prompts[index], max_tokens=8 + index, temperature=0.8 * (index % 2), seed=index
            )
            sent[submit.sequence_id] = submit
            cluster.inboxes[draw.randrange(world_size)].put(submit)
        epoch += 1
        expert_map = ExpertMap.random(rng, 2, 8, world_size, num_redundant=int(rng.integers(5)), epoch=epoch)
        cluster.stage(expert_map, source="checkpoint")
        cluster.pump(lambda run, epoch=epoch: all(run.epochs[rank][-1:] == [epoch] for rank in range(world_size)))  # type: ignore[misc]
        num_flips += 1
    run = cluster.pump(lambda _: num_done() == len(sent))
    cluster.stop()
    assert not run.faults, f"seed {seed}: {run.faults}"
    assert not run.refused, f"seed {seed}: {run.refused}"
    for sequence_id, submit in sent.items():
        expected = [(output.token_id, output.logprob) for output in alone.outputs(submit)]
        assert [(output.token_id, output.logprob) for output in run.outputs[sequence_id]] == expected, (
            f"seed {seed}: sequence {sequence_id} of {len(sent)} differs after {num_flips} flips"
        )
    assert num_flips >= 5
    assert len(sent) > world_size


def test_five_seconds_of_random_maps(lab: tuple[Path, Alone]) -> None:
    soak(lab, 3, 5.0, seed=random.SystemRandom().getrandbits(32))


@pytest.mark.slow
@pytest.mark.timeout(480)
@pytest.mark.parametrize("world_size", [2, 4])
def test_ten_minutes_of_random_maps(lab: tuple[Path, Alone], world_size: int) -> None:
    soak(lab, world_size, 300.0, seed=random.SystemRandom().getrandbits(32))
