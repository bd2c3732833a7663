"""Steps in which sequences have different versions of the model: each has the bits of its own version's checkpoint.

On one rank, that is; here on any ranks, maps, replica choice and lending, native and op by op, across loads and settlings.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from expert_swaps import ExpertFile, swapped_checkpoint, write_expert
from tiny_checkpoints import make_checkpoint, make_runner, make_sequence, run_ranks

from switchgear_runtime.batch import Batch, ScheduledSequence
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.errors import CheckpointError, ConfigError
from switchgear_runtime.header import Decision
from switchgear_runtime.model_runner import ModelRunner
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.moe.model_versions import ModelVersions
from switchgear_runtime.moe.rehome import rehome

LENDS = Decision(kind="run", epoch=0, num_tokens=(1000,), lends=True)
NUM_EXPERTS, STEPS_AN_EPOCH = 7, 2
SWAPS = ((0, 4), (0, 4), (1, 3), (0, 2))  # (layer, expert) of versions 1, 2, ...: experts that this model likes
# Of each epoch: how many swaps were loaded, and the oldest version
EPOCHS = ((0, 0), (1, 0), (3, 0), (3, 2), (4, 2), (4, 4))


@dataclass(frozen=True)
class Lab:
    files: list[ExpertFile]
    models: list[Path]  # by version

    def versions(self, num_loaded: int, oldest: int) -> ModelVersions:
        versions = ModelVersions()
        for file in self.files[:num_loaded]:
            versions = file.next_of(versions)
        return versions.with_oldest(oldest)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    root = tmp_path_factory.mktemp("versions")
    model_dir = make_checkpoint(root, "qwen3_moe", 5, dtype="bfloat16", num_experts=NUM_EXPERTS)
    files = [
        write_expert(root / f"{version}.safetensors", model_dir, layer=layer, expert=expert, seed=version)
        for version, (layer, expert) in enumerate(SWAPS, start=1)
    ]
    newer = [swapped_checkpoint(model_dir, root / f"v{n}", files[:n]) for n in range(1, len(files) + 1)]
    return Lab(files, [model_dir, *newer])


@dataclass
class Entry:
    """A sequence of one rank, and what of it runs in an epoch's steps."""

    version: int
    token_ids: list[int]
    block: int
    first_epoch: int
    last_epoch: int

    def steps(self) -> list[tuple[int, int, int]]:
        """(step over all epochs, start, number of tokens): the prompt, then one token a step."""
        first = self.first_epoch * STEPS_AN_EPOCH
        num_steps = (self.last_epoch + 1 - self.first_epoch) * STEPS_AN_EPOCH
        prompt = len(self.token_ids) - num_steps + 1
        return [(first, 0, prompt), *((first + n, prompt + n - 1, 1) for n in range(1, num_steps))]


def entries_of(seed: int, rank: int) -> list[Entry]:
    """Begun in each epoch, of a version that it knows, to the last epoch that knows it; some ranks have none."""
    draw = random.Random(f"{seed} {rank}")
    entries = []
    if rank and draw.random() < 0.2:
        return entries
    for epoch, (loaded, oldest) in enumerate(EPOCHS):
        for _ in range(draw.randint(0, 2)):
            version = draw.randint(oldest, loaded)
            last = max(e for e in range(epoch, len(EPOCHS)) if EPOCHS[e][1] <= version)
            num_tokens = draw.randint(2, 12) + STEPS_AN_EPOCH * (last + 1 - epoch)
            tokens = draw.choices(draw.sample(range(60), 5), k=num_tokens)
            entries.append(Entry(version, tokens, 2 * len(entries), epoch, last))
    return entries


def sequence_of(entry: Entry) -> Any:
    sequence = make_sequence(entry.token_ids, [entry.block, entry.block + 1])
    sequence.version = entry.version
    return sequence


def run_alone(lab: Lab, seed: int, world_size: int, **settings: Any) -> list[list[list[torch.Tensor]]]:
    """Logits by rank, sequence and step, each sequence by itself on the checkpoint of its version."""

    def run(_rank: int, transport: Transport) -> list[list[list[torch.Tensor]]]:
        runners = []
        for model_dir in lab.models:
            runner = make_runner(model_dir, **settings)
            runner.begin(transport, ExpertMap.contiguous(2, NUM_EXPERTS, 1))
            runners.append(runner)
        logits = []
        for rank in range(world_size):
            logits.append([])
            for entry in entries_of(seed, rank):
                runner, sequence = runners[entry.version], sequence_of(entry)
                sequence.version = 0
                steps = [ScheduledSequence(sequence, start, size, True) for _, start, size in entry.steps()]
                logits[-1].append([runner.forward(Batch((step,)))[0] for step in steps])
        return logits

    (logits,) = run_ranks(1, run)
    return logits


def maps_of(seed: int, world_size: int) -> list[ExpertMap]:
    rng = np.random.default_rng(seed)
    maps = []
    for epoch in range(len(EPOCHS)):
        if epoch % 2 or not maps:  # else the same map with other versions
            maps.append(
                ExpertMap.random(rng, 2, NUM_EXPERTS, world_size, num_redundant=int(rng.integers(0, 6)), epoch=epoch)
            )
        else:
            maps.append(maps[-1].with_epoch(epoch))
    return maps


def flip(runner: ModelRunner, expert_map: ExpertMap, versions: ModelVersions) -> None:
    staged = runner.stage(expert_map, versions)
    if expert_map == runner.expert_map.with_epoch(expert_map.epoch):
        loaded = {swap.sha256 for swap in versions.swaps} - {swap.sha256 for swap in runner.versions.swaps}
        assert staged.num_new == len(loaded)  # nothing is read to settle a version
    runner.flip(staged)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_every_sequence_has_the_bits_of_its_version(lab: Lab, world_size: int, quantization: str) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    expected = run_alone(lab, seed, world_size, quantization=quantization)
    routed: dict[bool, list[Any]] = {}
    for native in (True, False):
        for lending, choice in ((0, "static"), (0, "hash"), (2, "lp")):
            where = f"seed {seed}, native {native}, lending {lending}, {choice}"
            maps = maps_of(seed, world_size)

            def run(
                rank: int,
                transport: Transport,
                native: bool = native,
                lending: int = lending,
                choice: str = choice,
                maps: list[ExpertMap] = maps,
            ) -> tuple[list[list[torch.Tensor]], list[int]]:
                settings = {"quantization": quantization, "lending": lending, "replica_choice": choice}
                runner = make_runner(lab.models[0], rank=rank, world_size=world_size, native=native, **settings)
                runner.begin(transport, maps[0])
                assert runner.lends == (lending > 0 and world_size > 1)
                entries = entries_of(seed, rank)
                sequences, logits = [sequence_of(entry) for entry in entries], [[] for _ in entries]
                for step in range(len(EPOCHS) * STEPS_AN_EPOCH):
                    epoch = step // STEPS_AN_EPOCH
                    if epoch and step % STEPS_AN_EPOCH == 0:
                        flip(runner, maps[epoch], lab.versions(*EPOCHS[epoch]))
                    if epoch == 3 and step % STEPS_AN_EPOCH == 1 and rank == 0 and choice == "lp":
                        runner = replaced(runner, lab, transport, maps[epoch], lab.versions(*EPOCHS[epoch]))
                    runner.begin_step(LENDS)
                    due = [
                        (index, ScheduledSequence(sequences[index], start, size, True))
                        for index, entry in enumerate(entries)
                        for when, start, size in entry.steps()
                        if when == step
                    ]
                    rows = runner.forward(Batch(tuple(scheduled for _, scheduled in due)))
                    for (index, _), row in zip(due, rows, strict=True):
                        logits[index].append(row)
                return logits, runner.load.take_routed()

            results = run_ranks(world_size, run)
            for rank, (ours, _) in enumerate(results):
                for index, (steps, alone) in enumerate(zip(ours, expected[rank], strict=True)):
                    for step, (row, wanted) in enumerate(zip(steps, alone, strict=True)):
                        assert torch.equal(row, wanted), f"{where}, rank {rank}, sequence {index}, step {step}"
            routed.setdefault(native, []).append([counts for _, counts in results])
    assert routed[True] == routed[False], f"seed {seed}"  # counted for the logical expert


def replaced(
    runner: ModelRunner, lab: Lab, transport: Transport, expert_map: ExpertMap, versions: ModelVersions
) -> ModelRunner:
    """Another process in the place of this one, with its KV cache (as if it had recomputed it)."""
    fresh = make_runner(
        lab.models[0],
        rank=runner.rank,
        world_size=runner.world_size,
        native=runner.is_native,
        quantization=runner.config.quantization,
        lending=runner.config.lending,
        replica_choice=runner.config.replica_choice,
    )
    fresh.begin(transport, expert_map, versions)
    for mine, theirs in ((fresh.kv_cache.k, runner.kv_cache.k), (fresh.kv_cache.v, runner.kv_cache.v)):
        for cache, source in zip(mine, theirs, strict=True):
            cache.copy_(source)
    return fresh


@pytest.mark.parametrize("lending", [0, 2])
def test_survivors_re_home_experts_of_every_version(lab: Lab, lending: int) -> None:
    """Rank 2 of 3 is lost while version 1 is settled and 2 and 3 are live: the others have the same bits without it."""
    seed = random.SystemRandom().randrange(1 << 30)
    tokens = [random.Random(f"{seed} {n}").choices(range(60), k=20) for n in range(6)]
    versions = lab.versions(3, 1)
    first_map = ExpertMap.random(np.random.default_rng(seed), 2, NUM_EXPERTS, 3, num_redundant=2)

    def batch(numbers: range, version: int | None = None) -> Batch:
        entries = []
        for place, number in enumerate(numbers):
            sequence = make_sequence(tokens[number], [2 * place, 2 * place + 1])
            sequence.version = 1 + number % 3 if version is None else version
            entries.append(ScheduledSequence(sequence, 0, 20, True))
        return Batch(tuple(entries))

    def begin(rank: int, transport: Transport) -> ModelRunner:
        runner = make_runner(lab.models[0], rank=rank, world_size=3, lending=lending)
        runner.begin(transport, first_map, versions)
        runner.begin_step(LENDS)
        runner.forward(batch(range(2 * rank, 2 * rank + 2)))
        return runner

    runners = run_ranks(3, begin)

    def go_on(rank: int, transport: Transport) -> torch.Tensor:
        runner = runners[rank]
        runner.begin(transport, rehome(first_map, [0, 1], epoch=1), versions)
        assert runner.lends == (lending > 0)
        runner.begin_step(LENDS)
        return runner.forward(batch(range(3 * rank, 3 * rank + 3)))

    def alone(_rank: int, transport: Transport) -> list[torch.Tensor]:
        rows = []
        for number in range(6):
            runner = make_runner(lab.models[1 + number % 3])
            runner.begin(transport, ExpertMap.contiguous(2, NUM_EXPERTS, 1))
            rows.append(runner.forward(batch(range(number, number + 1), version=0))[0])
        return rows

    (expected,) = run_ranks(1, alone)
    assert torch.equal(torch.cat(run_ranks(2, go_on)), torch.stack(expected)), f"seed {seed}"


def test_a_version_changes_the_bits_of_those_that_have_it_alone(lab: Lab) -> None:
    """Two sequences with the same tokens and different versions in one batch."""

    def run(_rank: int, transport: Transport) -> None:
        runner = make_runner(lab.models[0])
        runner.begin(transport, ExpertMap.contiguous(2, NUM_EXPERTS, 1), lab.versions(3, 0))
        tokens = random.Random(1).choices(range(60), k=40)
        entries = []
        for version in range(4):
            sequence = make_sequence(tokens, [3 * version, 3 * version + 1, 3 * version + 2])
            sequence.version = version
            entries.append(ScheduledSequence(sequence, 0, len(tokens), True))
        logits = runner.forward(Batch(tuple(entries)))
        assert len({tuple(row.tolist()) for row in logits}) == 4

    run_ranks(1, run)


def test_memory_of_a_settled_version_is_given_back(lab: Lab) -> None:
    def run(_rank: int, transport: Transport) -> None:
        runner = make_runner(lab.models[0], lending=0, replica_choice="static")
        runner.begin(transport, ExpertMap.contiguous(2, NUM_EXPERTS, 1))
        pool = runner._store.cache.pool
        for epoch, (loaded, oldest) in enumerate(((1, 0), (2, 0), (2, 2)), start=1):
            runner.flip(runner.stage(runner.expert_map.with_epoch(epoch), lab.versions(loaded, oldest)))
        assert pool.num_free == 4  # the checkpoint's expert and version 1, two matrices each
        again = lab.files[0].next_of(runner.versions)
        runner.flip(runner.stage(runner.expert_map.with_epoch(4), again))
        assert pool.num_free == 2

    run_ranks(1, run)


def test_what_cannot_be_staged_changes_nothing(lab: Lab, tmp_path: Path) -> None:
    def run(_rank: int, transport: Transport) -> None:
        runner = make_runner(lab.models[0])
        runner.begin(transport, ExpertMap.contiguous(2, NUM_EXPERTS, 1))
        gone = ModelVersions().with_swap(0, 1, path=str(tmp_path / "gone"), sha256="0" * 64)
        outside = ModelVersions().with_swap(2, 1, path=str(tmp_path / "gone"), sha256="0" * 64)
        for versions, error, reason in (
            (gone, CheckpointError, "cannot be read"),
            (outside, ConfigError, "MoE layer 2"),
        ):
            with pytest.raises(error, match=reason):
                runner.stage(runner.expert_map.with_epoch(1), versions)
            with pytest.raises(error, match=reason):
                runner.begin(transport, runner.expert_map, versions)
        assert runner.versions == ModelVersions()

    run_ranks(1, run)
