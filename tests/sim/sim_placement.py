"""Migrations in simulation: `SimPlacement` orders them as a server would, `SimPeers` carries experts between ranks.

The server's side is small and hostile: it proposes random maps, sometimes to some of the ranks only (it died while it
told them), drops what it proposed at any moment, and lets a generation begin on the last map it saw in force.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import msgspec
import numpy as np
from sim_system import SimSystem

from switchgear_runtime.errors import PeerLost, TransportAborted
from switchgear_runtime.generation import GenerationDescriptor
from switchgear_runtime.messages import BeginGeneration, DropMap, MapRefused, MapStaged, StageMap, StepFrame, ToRank
from switchgear_runtime.migration.pace import Pace
from switchgear_runtime.model_runner import ModelRunner
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.moe.rehome import rehome

Send = Callable[[int, ToRank], None]


class SimPlacement:
    """All in the server's thread, but for `computes`."""

    def __init__(self, system: SimSystem, num_layers: int, num_experts: int, num_ranks: int) -> None:
        self._system = system
        self._shape = (num_layers, num_experts)
        self._maps = np.random.default_rng(system.randbits(32))
        self._current = ExpertMap.contiguous(*self._shape, num_ranks)
        self._latest = 0  # of all epochs ever proposed
        self._proposed: dict[int, ExpertMap] = {}
        self._generation: int | None = None
        self.answers: dict[tuple[int, int, int], int] = defaultdict(int)  # (generation, epoch, rank) -> how many
        self.refusals: list[str] = []
        self.flipped_epochs: set[int] = set()
        self.num_fetched = 0  # experts that came from another rank
        self.maps_by_step: dict[tuple[int, int], set[tuple[int, int]]] = defaultdict(
            set
        )  # (epoch, digest) of each step

    @property
    def num_ranks(self) -> int:
        """Of the map in force."""
        return self._current.num_ranks

    def begin(self, message: BeginGeneration) -> BeginGeneration:
        """As the controller wrote it, with the map in force."""
        generation = message.descriptor.generation
        if self._generation != generation:
            self._generation = generation
            num_ranks = message.descriptor.world_size
            if num_ranks != self.num_ranks:
                self._latest += 1
                origins = [rank if rank < self.num_ranks else None for rank in range(num_ranks)]
                self._current = rehome(self._current, origins, epoch=self._latest)
            elif self._proposed:  # some rank may have flipped to one of them, unseen
                self._latest += 1
                self._current = self._current.with_epoch(self._latest)
            self._proposed.clear()
        descriptor = msgspec.structs.replace(message.descriptor, epoch=self._current.epoch)
        return BeginGeneration(descriptor, self._current.to_json())

    def ready(self, descriptor: GenerationDescriptor) -> None:
        """Every rank has stepped."""

    def over(self, reason: str) -> None:
        """The generation is not whole any more."""

    def propose(self, ranks: list[int], send: Send) -> None:
        if self._generation is None:
            return
        self._latest += 1
        num_redundant = int(self._maps.integers(4))
        proposed = ExpertMap.random(
            self._maps, *self._shape, self.num_ranks, num_redundant=num_redundant, epoch=self._latest
        )
        self._proposed[proposed.epoch] = proposed
        source = ("auto", "peer", "checkpoint")[int(self._maps.integers(3))]
        for rank in ranks:
            message = StageMap(
                generation=self._generation,
                expert_map=proposed.to_json(),
                bytes_per_s=[None, 1 << 20][int(self._maps.integers(2))],
                source=source,  # type: ignore[arg-type]
            )
            send(rank, message)

    def drop(self, ranks: list[int], send: Send) -> None:
        """The latest proposal. It stays known: all ranks may have flipped to it just before they hear this."""
        if self._generation is not None and self._proposed:
            for rank in ranks:
                send(rank, DropMap(self._generation, max(self._proposed)))

    def on_message(self, message: StepFrame | MapStaged | MapRefused) -> None:
        if isinstance(message, StepFrame):
            if message.generation == self._generation and message.epoch > self._current.epoch:
                self._current = self._proposed[message.epoch]
                self._proposed = {epoch: one for epoch, one in self._proposed.items() if epoch > message.epoch}
                self.flipped_epochs.add(message.epoch)
            return
        self.answers[message.generation, message.epoch, message.rank] += 1
        if isinstance(message, MapRefused):
            self.refusals.append(message.reason)

    def computes(self, generation: int, step: int, expert_map: ExpertMap) -> None:
        """A rank computes this step with this map."""
        self.maps_by_step[generation, step].add((expert_map.epoch, expert_map.digest()))

    def check(self) -> None:
        """Never a mix: one map a step, and epochs that only rise, also from one generation to the next."""
        epochs = []
        for where, maps in sorted(self.maps_by_step.items()):
            assert len(maps) == 1, f"(generation, step) {where}: ranks computed with {maps}"
            epochs += [epoch for epoch, _ in maps]
        assert epochs == sorted(epochs)
        digests: dict[int, set[int]] = defaultdict(set)
        for maps in self.maps_by_step.values():
            for epoch, digest in maps:
                digests[epoch].add(digest)
        assert all(len(one) == 1 for one in digests.values()), "one number for two maps"
        assert all(count == 1 for count in self.answers.values()), self.answers


class SimPeers:
    """One rank's channel to the others. `runner_of(rank)`: of the process that is `rank` now, None if it is dead;
    raises nothing and never waits."""

    def __init__(
        self, system: SimSystem, rank: int, runner_of: Callable[[int], ModelRunner | None], placement: SimPlacement
    ) -> None:
        self._system = system
        self._rank = rank
        self._runner_of = runner_of
        self._placement = placement
        self._is_closed = False

    def fetch(
        self,
        source: int,
        moe_layer: int,
        expert: int,
        out: tuple[memoryview, memoryview],
        pace: Pace,
        sha256: str = "",
    ) -> None:
        for half in (0, 1):
            self._system.sleep(self._system.random.random() * 0.004)
            if self._is_closed:
                raise TransportAborted("the channel is closed", rank=self._rank)
            runner = self._runner_of(source)
            held = None if runner is None else runner.experts.held(moe_layer, expert, sha256)
            if held is None:
                raise PeerLost(f"rank {source} has no expert {expert}", rank=self._rank, peers=(source,))
            out[half][:] = held[half].numpy().data
            pace(len(out[half]))
        self._placement.num_fetched += 1

    def close(self) -> None:
        self._is_closed = True
