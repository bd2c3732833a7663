"""Which generation this rank is in, and with which expert map it computes: `Membership`.

    begin(descriptor) -> group: transport, step, expert map -> leave        (then wait for the next BeginGeneration)
    stage(map of a later epoch) ... all ranks have staged it -> flip(epoch)  (inside a generation, between two steps)

Every generation starts on the contiguous map of its world size, which all ranks can derive, those that have just joined
included. One thread, but for `on_arrival`.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.errors import ConfigError, StaleTerm
from switchgear_runtime.generation import Fence, GenerationDescriptor
from switchgear_runtime.messages import BeginGeneration, EndGeneration
from switchgear_runtime.model_runner import ModelRunner
from switchgear_runtime.moe.expert_map import ExpertMap

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Group:
    """The generation this rank is in. `step` and `wake_step` are the engine's."""

    descriptor: GenerationDescriptor
    transport: Transport
    expert_map: ExpertMap
    map_digest: int
    step: int = 0
    wake_step: int = -1  # the latest park that a Wake ended

    @property
    def generation(self) -> int:
        return self.descriptor.generation


class Membership:
    """`group` is None between generations. `open_transport` meets the other ranks, within a deadline of its own."""

    def __init__(
        self, runner: ModelRunner, *, rank: int, open_transport: Callable[[GenerationDescriptor], Transport]
    ) -> None:
        self.group: Group | None = None
        self._runner = runner
        self._rank = rank
        self._open_transport = open_transport
        self._fence = Fence()
        self._staged: dict[int, ExpertMap] = {}  # by epoch, each after the current one
        self._over_generation = 0  # the latest that the controller gave up; written by the link's reader thread

    @property
    def generation(self) -> int:
        """The latest this rank has been in, or tried to enter."""
        return self._fence.generation

    def begin(self, descriptor: GenerationDescriptor) -> None:
        """Enter a generation; a stale one is ignored. Whatever keeps the ranks from meeting is raised."""
        try:
            self._fence.accept(descriptor)
        except StaleTerm as error:
            log.warning("rank %d: %s", self._rank, error)
            return
        self.leave(f"generation {descriptor.generation} follows")
        if descriptor.generation <= self._over_generation:
            return  # its end has arrived already; to meet the others would only wait for the dead
        spec = self._runner.spec
        expert_map = ExpertMap.contiguous(
            spec.num_moe_layers, spec.num_experts, descriptor.world_size, epoch=descriptor.epoch
        )
        transport = self._open_transport(descriptor)
        self.group = Group(descriptor, transport, expert_map, _digest(expert_map))
        self._runner.begin(transport, expert_map)
        staged, self._staged = self._staged, {}
        for later in staged.values():
            self.stage(later)
        log.info("rank %d: in generation %d of %d ranks", self._rank, descriptor.generation, descriptor.world_size)

    def ends(self, message: EndGeneration) -> bool:
        """Is it the end of the generation this rank is in?"""
        return self._concerns_group(message.term, message.generation)

    def leave(self, abort_reason: str | None) -> None:
        """Close the transport, if any; with a reason, abort it first so that no peer waits for this rank."""
        group, self.group = self.group, None
        if group is not None:
            if abort_reason is not None:
                group.transport.abort(abort_reason)
            group.transport.close()

    def on_arrival(self, message: object) -> None:
        """In the reader's thread: the end of a generation must reach an engine that waits for a dead peer."""
        if isinstance(message, EndGeneration):
            term, over_generation = message.term, message.generation
        elif isinstance(message, BeginGeneration):
            term, over_generation = message.descriptor.term, message.descriptor.generation - 1
        else:
            return
        if term < self._fence.term:
            return
        self._over_generation = max(self._over_generation, over_generation)
        group = self.group
        if group is not None and self._concerns_group(term, over_generation):
            group.transport.abort(f"the controller ended generation {group.generation}")

    # --- epochs ---------------------------------------------------------------------------------------------------

    @property
    def staged_epoch(self) -> int:
        """The newest this rank could flip to; the current one if there is none."""
        assert self.group is not None
        return max(self._staged, default=self.group.expert_map.epoch)

    def stage(self, expert_map: ExpertMap) -> None:
        """Load the map's experts beside those in use; outside a generation, remember to."""
        group = self.group
        if group is not None:
            if expert_map.epoch <= group.expert_map.epoch or expert_map.num_ranks != group.descriptor.world_size:
                log.warning("rank %d: the map of epoch %d comes too late", self._rank, expert_map.epoch)
                return
            try:
                self._runner.stage(expert_map)
            except ConfigError as error:
                log.error("rank %d: the map of epoch %d cannot be staged: %s", self._rank, expert_map.epoch, error)
                return
        self._staged[expert_map.epoch] = expert_map

    def flip(self, epoch: int) -> None:
        """Compute with a staged map from now on; all ranks flip in the same step."""
        assert self.group is not None
        self._runner.flip(epoch)
        self.group.expert_map = self._staged[epoch]
        self.group.map_digest = _digest(self.group.expert_map)
        self._staged = {later: staged for later, staged in self._staged.items() if later > epoch}

    def _concerns_group(self, term: int, generation: int) -> bool:
        group = self.group
        return group is not None and term >= self._fence.term and group.generation <= generation


def _digest(expert_map: ExpertMap) -> int:
    return zlib.crc32(expert_map.physical_to_logical_LP.tobytes())
