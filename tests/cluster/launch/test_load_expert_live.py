"""Experts loaded into running rank processes: each sequence ends as on a checkpoint that had its version from the start.

The oracle is one rank alone on that checkpoint, in this process: tokens and logprobs are equal bit for bit.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from cluster_rig import PROMPTS, SMALL, LogprobCollector, play, rank_pids, until
from expert_swaps import swapped_checkpoint, write_expert
from tiny_cluster import Alone

from switchgear.cluster import Cluster
from switchgear.config import bundled_model, split_settings
from switchgear.server.live_sequence import LiveSequence
from switchgear_runtime.messages import Submit, ToRank
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.sampling_params import SamplingParams

pytestmark = pytest.mark.ranks
SHORT, LONG = 12, 200  # tokens; a long sequence outlives a load


class LoadingCluster(Cluster):
    """Remembers what it was asked, and checks what came of it."""

    def __init__(self, root: Path, **settings: Any) -> None:
        super().__init__(*split_settings({"launcher": "local", "ranks": 2, **SMALL, **settings}))
        places = [(0, 3), (2, 17), (0, 3)]
        self.files = [
            write_expert(
                root / f"{index}.safetensors",
                bundled_model(),
                layer=layer,
                expert=expert,
                seed=index,
                own_names=index == 1,
            )
            for index, (layer, expert) in enumerate(places)
        ]
        self.versions = [0]  # of the checkpoint, and with each file
        self._root = root
        self._begun: list[tuple[Submit, LiveSequence]] = []
        self._rng = np.random.default_rng(5)

    def _send(self, rank: int, message: ToRank) -> None:
        if isinstance(message, Submit) and message.incarnation == 1:
            self._begun.append((message, self.core._sequences[message.sequence_id]))
        super()._send(rank, message)

    def ask(self, max_tokens: int = SHORT) -> LogprobCollector:
        """Each prompt, greedy or sampled."""
        collector = LogprobCollector()
        params = [
            SamplingParams(temperature=index % 2, seed=7, max_tokens=max_tokens, ignore_eos=True, logprobs=0)
            for index in range(len(PROMPTS))
        ]
        self.core.submit(PROMPTS, params, sink=collector)
        return collector

    async def begin(self) -> LogprobCollector:
        """Long sequences, once they have their first tokens."""
        collector = self.ask(LONG)
        await collector.until(lambda: len(collector.token_ids) == len(PROMPTS))
        return collector

    async def load(self) -> None:
        """The next file; then sequences that begin on it."""
        file = self.files[len(self.versions) - 1]
        outcome = await self.placement.load_expert(file.layer, file.expert, str(file.path))
        assert outcome.error == ""
        assert outcome.version == self.core.model_version > self.versions[-1]
        self.versions.append(outcome.version)
        await self.ask().all_finished(len(PROMPTS), 60)

    async def move(self) -> None:
        """Experts at random."""
        wanted = ExpertMap.random(self._rng, self.spec.num_moe_layers, self.spec.num_experts, 2, num_redundant=6)
        assert (await self.placement.apply(wanted)).error == ""
        await self.ask().all_finished(len(PROMPTS), 60)

    async def kill(self, rank: int) -> None:
        os.kill(rank_pids(self)[rank], signal.SIGKILL)
        await until(lambda: not self.ready, 10)
        await until(lambda: self.ready, 60)
        await self.ask().all_finished(len(PROMPTS), 60)

    @contextmanager
    def files_gone(self) -> Iterator[None]:
        paths = [file.path for file in self.files if file.path.exists()]
        for path in paths:
            path.rename(path.with_suffix(".away"))
        yield
        for path in paths:
            path.with_suffix(".away").rename(path)

    async def settled(self) -> None:
        await until(lambda: self.placement.controller.versions.oldest == self.versions[-1], 20)
        await self.ask().all_finished(len(PROMPTS), 60)

    def check(self) -> None:
        """Every sequence against the checkpoint of its version, which is not that of another one."""
        settings = {name: getattr(self.engine, name) for name in ("max_model_len", "num_kv_blocks", "quantization")}
        alone = {
            version: Alone(swapped_checkpoint(bundled_model(), self._root / str(count), self.files[:count]), **settings)
            for count, version in enumerate(self.versions)
        }
        for submit, sequence in self._begun:
            collector = sequence.request.sink
            assert isinstance(collector, LogprobCollector)
            outputs = alone[submit.version].outputs(msgspec.structs.replace(submit, version=0))
            assert collector.token_ids[sequence.prompt_index] == [output.token_id for output in outputs]
            logprobs = [float(output.logprob or 0.0).hex() for output in outputs]
            assert collector.logprobs[sequence.prompt_index] == logprobs
        assert {submit.version for submit, _ in self._begun} == set(self.versions)
        first = msgspec.structs.replace(self._begun[0][0], version=0)
        told = {tuple(output.logprob for output in one.outputs(first)) for one in alone.values()}
        assert len(told) == len(alone), "a file that changes nothing"


def run(cluster: LoadingCluster, scenario: Callable[[], Awaitable[None]]) -> None:
    async def main(_: Cluster) -> None:
        await scenario()

    play(cluster, main, timeout_s=150)
    cluster.check()


def test_each_sequence_keeps_its_weights_over_loads_moves_and_a_death(tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"not safetensors")
    cluster = LoadingCluster(tmp_path, placement="off", survive=1, quantization="int8")

    async def scenario() -> None:
        running = [await cluster.begin()]
        refused = await cluster.placement.load_expert(0, 0, str(bad))
        assert "refused" in refused.error
        assert str(bad) in refused.error
        assert cluster.core.model_version == refused.version == 0
        await cluster.load()
        running.append(await cluster.begin())
        await cluster.load()
        running.append(await cluster.begin())
        await cluster.move()
        with cluster.files_gone():
            await cluster.kill(1)  # the replacement needs all versions, and reads the copies that the host has kept
        for collector in running:
            await collector.all_finished(len(PROMPTS), 60)
        await cluster.settled()

    run(cluster, scenario)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"placement": "off", "lending": 0, "survive": 1},
        {"placement_window_s": 0.3},
        {"weight_cache_dir": "", "survive": 1, "placement": "static"},
    ],
    ids=["off", "adaptive", "no-cache"],
)
def test_versions_settle_and_outlive_deaths(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Where the planner moves experts, an operator's order may have to wait for it."""
    cluster = LoadingCluster(tmp_path, **settings)

    async def patiently(order: Callable[[], Awaitable[None]]) -> None:
        await until(lambda: cluster.placement.controller.state == "observing", 20)
        await order()

    async def scenario() -> None:
        old = await cluster.begin()
        await cluster.load()
        await cluster.kill(0)
        await patiently(cluster.move)
        new = await cluster.begin()
        await cluster.load()
        await old.all_finished(len(PROMPTS), 60)
        await new.all_finished(len(PROMPTS), 60)
        await cluster.settled()
        await cluster.kill(1)
        await patiently(cluster.move)
        await cluster.kill(0)
        await cluster.load()
        await cluster.settled()
        assert len(cluster.placement.controller.versions.swaps) == 2
        await patiently(cluster.move)

    run(cluster, scenario)
