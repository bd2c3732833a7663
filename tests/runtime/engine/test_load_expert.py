"""One expert's weights swapped while requests run: sequences keep the version they began with, and nothing else changes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from expert_swaps import ExpertFile, swapped_checkpoint, write_expert
from scheduling import make_submit
from tiny_cluster import Alone, Cluster, ClusterRun, content, make_config, make_tiny_checkpoint, num_finished

from switchgear_runtime.generation import GenerationDescriptor
from switchgear_runtime.messages import BeginGeneration, EndGeneration, Submit
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.moe.model_versions import ModelVersions

SWAPS = ((0, 3), (1, 5), (0, 3), (0, 1))  # (layer, expert) of versions 1, 2, ...
NUM_PROMPTS = 8


class Lab:
    """Files of experts, and the reference of each version: one rank that serves a checkpoint with its weights."""

    def __init__(self, root: Path) -> None:
        self.model_dir = make_tiny_checkpoint(root, seed=9)
        self.files: list[ExpertFile] = []
        self.alone = [Alone(self.model_dir)]
        for version, (layer, expert) in enumerate(SWAPS, start=1):
            path = root / f"{version}.safetensors"
            self.files.append(write_expert(path, self.model_dir, layer=layer, expert=expert, seed=version))
            self.alone.append(Alone(swapped_checkpoint(self.model_dir, root / f"v{version}", self.files)))
        (submit, *_) = submits(0, 0)
        outputs = [repr(content(alone.outputs(submit))) for alone in self.alone]
        assert len(set(outputs)) == len(outputs)  # or a wrong version would not be seen

    def versions(self, num_loaded: int, oldest: int = 0) -> ModelVersions:
        versions = ModelVersions()
        for file in self.files[:num_loaded]:
            versions = file.next_of(versions)
        return versions.with_oldest(oldest)

    def assert_served(self, run: ClusterRun, submits: list[Submit], where: str = "") -> None:
        for submit in submits:
            ours, expected = run.outputs[submit.sequence_id], self.alone[submit.version].outputs(submit)
            assert content(ours) == content(expected), f"{where}: sequence {submit.sequence_id}, {submit.version}"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("load"))


def of_version(version: int, submit: Submit) -> Submit:
    return msgspec.structs.replace(submit, version=version)


def submits(first_id: int, version: int, count: int = 4, **sampling: Any) -> list[Submit]:
    """The same prompts for every version, two blocks long, so that the prefix cache has them."""
    rng = np.random.default_rng(5)
    return [
        of_version(
            version, make_submit(first_id + i, rng.integers(96, size=40).tolist(), **{"max_tokens": 24, **sampling})
        )
        for i in range(count)
    ]


def stage(cluster: Cluster, epoch: int, versions: ModelVersions | None, expert_map: ExpertMap | None = None) -> None:
    expert_map = expert_map or ExpertMap.contiguous(2, 8, cluster.world_size)
    cluster.stage(expert_map.with_epoch(epoch), versions=None if versions is None else versions.to_json())


def on_epoch(cluster: Cluster, epoch: int) -> Callable[[ClusterRun], bool]:
    return lambda run: all(run.epochs[rank][-1:] == [epoch] for rank in range(cluster.world_size))


def put(cluster: Cluster, wanted: list[Submit]) -> list[Submit]:
    for index, submit in enumerate(wanted):
        cluster.inboxes[index % cluster.world_size].put(submit)
    return wanted


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"quantization": "int8"},
        {"lending": 0, "replica_choice": "hash"},
        pytest.param({"device": "twin"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_sequences_keep_the_version_they_began_with(lab: Lab, tmp_path: Path, settings: dict[str, Any]) -> None:
    if settings.keys() & {"quantization", "device"}:
        lab = Lab(tmp_path)
        lab.alone = [Alone(alone._model_dir, **settings) for alone in lab.alone]
    cluster = Cluster(make_config(lab.model_dir, num_kv_blocks=256, **settings), 3)
    wanted = put(cluster, submits(0, 0, max_tokens=150))
    cluster.pump(lambda run: len(run.outputs[0]) > 5)
    stage(cluster, 1, lab.versions(1))
    cluster.pump(on_epoch(cluster, 1))
    assert not num_finished(cluster.run_result)
    wanted += put(cluster, submits(10, 1, max_tokens=100))
    wanted += put(cluster, submits(20, 0))  # as one that another rank had
    cluster.pump(lambda run: len(run.outputs[10]) > 5)
    # The next swaps, and other places, while all three versions run
    stage(cluster, 2, lab.versions(3), ExpertMap.random(np.random.default_rng(1), 2, 8, 3, num_redundant=4))
    cluster.pump(on_epoch(cluster, 2))
    wanted += put(cluster, submits(30, 3))
    wanted += put(cluster, submits(40, 2))
    run = cluster.pump(lambda run: num_finished(run) == len(wanted))
    stage(cluster, 3, lab.versions(3, oldest=3))
    cluster.pump(on_epoch(cluster, 3))
    wanted += put(cluster, submits(50, 3))
    cluster.pump(lambda run: num_finished(run) == len(wanted))
    put(cluster, submits(60, 2, count=1) + submits(61, 4, count=1))
    cluster.pump(lambda run: len(run.rejected) == 2)
    run = cluster.stop()
    assert not run.faults
    assert not run.refused
    assert {message.message for message in run.rejected} == {
        f"version={version}: this rank computes versions 3..3" for version in (2, 4)
    }
    assert run.expert_load == run.expert_rows
    assert [message.num_experts for message in run.staged if message.epoch == 1] == [1, 1, 1]
    assert run.outputs[50][0].num_cached_tokens == 32  # of version 3, which ran these prompts before
    assert run.outputs[10][0].num_cached_tokens == run.outputs[30][0].num_cached_tokens == 0
    lab.assert_served(run, wanted)


def test_a_version_that_did_not_come_into_force_is_forgotten(lab: Lab) -> None:
    cluster = Cluster(make_config(lab.model_dir), 2)
    wanted = put(cluster, submits(0, 0, max_tokens=150))
    spoilt = lab.files[0].next_of(ModelVersions()).to_json()
    spoilt["swaps"][0]["sha256"] = "ab" * 32
    stage(cluster, 1, ModelVersions.from_json(spoilt))
    cluster.pump(lambda run: len(run.refused) == 2)
    assert all("ab" * 32 in message.reason for message in cluster.run_result.refused)
    stage(cluster, 2, lab.versions(2, oldest=1))
    cluster.pump(lambda run: len(run.rejected) == 4)  # none of version 0 may be left
    stage(cluster, 3, lab.versions(1))
    stage(cluster, 4, lab.versions(2, oldest=1))
    cluster.pump(on_epoch(cluster, 4))
    refused = cluster.run_result.refused[2:]
    assert [message.epoch for message in refused] == [3, 3]
    assert all("do not follow from those in force, 1..2" in message.reason for message in refused)
    stage(cluster, 5, None)  # those in force stay
    cluster.pump(on_epoch(cluster, 5))
    wanted = put(cluster, submits(10, 1))
    cluster.pump(lambda run: num_finished(run) == len(wanted) + 4)
    lab.assert_served(cluster.stop(), wanted)


def test_versions_pass_into_the_next_generation_and_decide_there(lab: Lab) -> None:
    cluster = Cluster(make_config(lab.model_dir), 2)
    wanted = put(cluster, submits(0, 0, max_tokens=100))
    cluster.pump(lambda run: len(run.outputs[0]) > 5)
    for inbox in cluster.inboxes:
        inbox.put(EndGeneration(1, 1, "over"))
    cluster.pump(lambda run: len(run.faults) == 2)
    wanted += put(cluster, submits(10, 2, count=3))  # between generations, with a version to come
    (unknown,) = put(cluster, submits(20, 3, count=1))
    cluster.begin(2, ExpertMap.random(np.random.default_rng(2), 2, 8, 2, epoch=7), lab.versions(2).to_json())
    cluster.pump(lambda run: num_finished(run) == len(wanted) + 1)
    for inbox in cluster.inboxes:
        inbox.put(EndGeneration(1, 2, "over"))
    cluster.pump(lambda run: len(run.faults) == 4)
    settled = lab.versions(2, oldest=2)
    cluster.begin(3, ExpertMap.random(np.random.default_rng(3), 2, 8, 2, epoch=9), settled.to_json())
    wanted += put(cluster, submits(30, 2))
    cluster.pump(lambda run: num_finished(run) == len(wanted) + 1)
    run = cluster.stop()
    assert [message.sequence_id for message in run.rejected] == [unknown.sequence_id]
    lab.assert_served(run, wanted)


def test_ranks_with_other_versions_do_not_step_together(lab: Lab) -> None:
    cluster = Cluster(make_config(lab.model_dir), 2)
    cluster.pump(lambda run: run.num_parked == 2)
    for inbox in cluster.inboxes:
        inbox.put(EndGeneration(1, 1, "over"))
    cluster.pump(lambda run: len(run.faults) == 2)
    descriptor = GenerationDescriptor(term=1, generation=2, world_size=2, epoch=0, channel="g2")
    for inbox, versions in zip(cluster.inboxes, (lab.versions(1), lab.versions(1, oldest=1)), strict=True):
        inbox.put(BeginGeneration(descriptor, None, versions.to_json()))
    cluster.pump(lambda run: len(run.faults) == 4)
    assert "HeaderMismatch" in {fault.kind for fault in cluster.run_result.faults}
    cluster.begin(3)
    wanted = put(cluster, submits(0, 0))
    cluster.pump(lambda run: num_finished(run) == 4)
    lab.assert_served(cluster.stop(), wanted)


def soak(lab: Lab, world_size: int, duration_s: float, seed: int, **settings: Any) -> int:
    """Loads, settlings and random maps back to back; the server's rules in small: new sequences get the latest version,
    and the oldest may rise to that of the oldest sequence."""
    draw, rng = random.Random(seed), np.random.default_rng(seed)
    cluster = Cluster(make_config(lab.model_dir, **settings), world_size)
    sent: dict[int, Submit] = {}
    versions, epoch, deadline_s = ModelVersions(), 0, time.monotonic() + duration_s

    def is_done(submit: Submit) -> bool:
        outputs = cluster.run_result.outputs[submit.sequence_id]
        return bool(outputs) and outputs[-1].finish_reason is not None

    while time.monotonic() < deadline_s or versions.latest < len(SWAPS) or versions.oldest < versions.latest:
        live = [submit for submit in sent.values() if not is_done(submit)]
        for _ in range(len(live), 3 * world_size):
            index = draw.randrange(NUM_PROMPTS)
            prompt = np.random.default_rng(index).integers(96, size=20 + index).tolist()
            submit = make_submit(len(sent), prompt, max_tokens=8 + index, temperature=0.8 * (index % 2), seed=index)
            sent[submit.sequence_id] = of_version(versions.latest, submit)
            cluster.inboxes[draw.randrange(world_size)].put(sent[submit.sequence_id])
        after = versions
        is_used = any(submit.version == versions.latest for submit in sent.values())  # every version shall be
        if is_used and versions.latest < len(SWAPS) and draw.random() < 0.4:
            after = lab.files[versions.latest].next_of(after)
        if draw.random() < 0.5:
            after = after.with_oldest(min([submit.version for submit in live], default=versions.latest))
        epoch += 1
        assert epoch < 5000, f"seed {seed}: {versions}"
        expert_map = ExpertMap.contiguous(2, 8, world_size)
        if draw.random() < 0.5:
            expert_map = ExpertMap.random(rng, 2, 8, world_size, num_redundant=int(rng.integers(5)))
        stage(cluster, epoch, after if after != versions or draw.random() < 0.5 else None, expert_map)
        cluster.pump(on_epoch(cluster, epoch))
        versions = after
    run = cluster.pump(lambda _: all(map(is_done, sent.values())))
    cluster.stop()
    assert not (run.faults or run.refused or run.rejected), f"seed {seed}: {run}"
    assert {submit.version for submit in sent.values()} == set(range(len(SWAPS) + 1)), f"seed {seed}"
    lab.assert_served(run, list(sent.values()), f"seed {seed}, {epoch} flips")
    return epoch


def test_loads_settlings_and_random_maps_back_to_back(lab: Lab) -> None:
    assert soak(lab, 3, 3.0, seed=random.SystemRandom().getrandbits(32)) >= len(SWAPS)


@pytest.mark.slow
@pytest.mark.timeout(480)
@pytest.mark.parametrize("world_size", [2, 4])
def test_minutes_of_loads_settlings_and_random_maps(lab: Lab, world_size: int) -> None:
    draw = random.SystemRandom()
    deadline_s = time.monotonic() + 120.0
    while time.monotonic() < deadline_s:
        soak(lab, world_size, 1.0, seed=draw.getrandbits(32), lending=draw.choice([0, 2]))
