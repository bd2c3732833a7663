"""Which generation this rank is in, and with which expert map and versions of the model it computes: `Membership`.

    begin(BeginGeneration) -> group: transport, step, expert map -> leave    (then wait for the next BeginGeneration)
    stage(StageMap) ... take(StageOutcome) ... all ranks have staged it -> flip(epoch) -> settle   (between two steps)

A generation starts on the map it was given, or on the contiguous one of its world size, and what was staged before it is
forgotten: only its own maps count, so that ranks never disagree on what an epoch means. One thread, but for
`on_arrival`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.errors import ConfigError, RankFailed, StaleTerm
from switchgear_runtime.generation import Fence, GenerationDescriptor
from switchgear_runtime.messages import BeginGeneration, DropMap, EndGeneration, MapRefused, MapStaged, StageMap
from switchgear_runtime.migration.pace import Pace
from switchgear_runtime.migration.peers import ExpertPeers
from switchgear_runtime.migration.stager import StageJob, StageOutcome, Stager
from switchgear_runtime.model.staged_map import StagedMap, digest_of
from switchgear_runtime.model_runner import ModelRunner
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.moe.model_versions import ModelVersions
from switchgear_runtime.system import System

STAGE_JOBS_MAX = 8  # waiting; who sends more does not look at the answers

OpenPeers = Callable[[GenerationDescriptor], ExpertPeers | None]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Group:
    """The generation this rank is in. `step`, `wake_step` and `offered_epoch` are the engine's."""

    descriptor: GenerationDescriptor
    transport: Transport
    expert_map: ExpertMap
    versions: ModelVersions
    map_digest: int  # of both
    step: int = 0
    wake_step: int = -1  # the latest park that a Wake ended
    peers: ExpertPeers | None = None
    last_epoch: int = 0  # of the maps it has heard of
    staged: StagedMap | None = None  # the latest, of an epoch after the current one
    offered_epoch: int = 0  # the staged epoch in the latest header
    dropped: set[int] = field(default_factory=set)  # epochs whose outcome may be on its way
    retired: object = None  # the experts of the epoch before, which another rank may still read

    @property
    def generation(self) -> int:
        return self.descriptor.generation


class Membership:
    """`group` is None between generations. `open_transport` meets the other ranks, within a deadline of its own;
    `start_timeout_s`: for them to have loaded the experts they lack, where ranks then tell each other about theirs."""

    def __init__(
        self,
        runner: ModelRunner,
        *,
        rank: int,
        system: System,
        open_transport: Callable[[GenerationDescriptor], Transport],
        open_peers: OpenPeers | None = None,
        deliver: Callable[[StageOutcome], None],
        at_stager_start: Callable[[], None] | None = None,
        start_timeout_s: float,
    ) -> None:
        self.group: Group | None = None
        self._runner = runner
        self._rank = rank
        self._system = system
        self._open_transport = open_transport
        self._open_peers = open_peers
        self._start_timeout_s = start_timeout_s
        self._fence = Fence()
        self._stager = Stager(runner, rank=rank, system=system, deliver=deliver, at_start=at_stager_start)
        self._over_generation = 0  # the latest that the controller gave up; written by the link's reader thread

    @property
    def generation(self) -> int:
        """The latest this rank has been in, or tried to enter."""
        return self._fence.generation

    def begin(self, message: BeginGeneration) -> None:
        """Enter a generation; a stale one is ignored. Whatever keeps the ranks from meeting is raised."""
        descriptor = message.descriptor
        try:
            self._fence.accept(descriptor)
        except StaleTerm as error:
            log.warning("rank %d: %s", self._rank, error)
            return
        self.leave(f"generation {descriptor.generation} follows")
        if descriptor.generation <= self._over_generation:
            return  # its end has arrived already; to meet the others would only wait for the dead
        expert_map = self._first_map(message)
        versions = ModelVersions() if message.versions is None else ModelVersions.from_json(message.versions)
        self._await_stager()
        transport = self._open_transport(descriptor)
        digest = digest_of(expert_map, versions)
        self.group = Group(descriptor, transport, expert_map, versions, digest, last_epoch=expert_map.epoch)
        self._runner.begin(transport, expert_map, versions, descriptor)
        self._runner.meet(timeout_s=self._start_timeout_s)
        if self._open_peers is not None:
            self.group.peers = self._open_peers(descriptor)
        log.info("rank %d: in generation %d of %d ranks", self._rank, descriptor.generation, descriptor.world_size)

    def _first_map(self, message: BeginGeneration) -> ExpertMap:
        descriptor, spec = message.descriptor, self._runner.spec
        if message.expert_map is None:
            return ExpertMap.contiguous(
                spec.num_moe_layers, spec.num_experts, descriptor.world_size, epoch=descriptor.epoch
            )
        expert_map = ExpertMap.from_json(message.expert_map)
        if (expert_map.epoch, expert_map.num_ranks) != (descriptor.epoch, descriptor.world_size):
            raise ConfigError(
                f"generation {descriptor.generation} has epoch {descriptor.epoch} and {descriptor.world_size} ranks, its "
                f"expert map epoch {expert_map.epoch} and {expert_map.num_ranks} ranks"
            )
        return expert_map

    def _await_stager(self) -> None:
        """The runner loads in one thread at a time. `leave` has cancelled the jobs, so this is the rest of a piece."""
        timeout_s = self._runner.config.step_timeout_s
        if not self._stager.wait_idle(timeout_s):
            text = f"rank {self._rank}: its own stager did not let go of an expert within {timeout_s:g} s"
            raise RankFailed(text)  # its own fault, no peer's: it is replaced

    def ends(self, message: EndGeneration) -> bool:
        """Is it the end of the generation this rank is in?"""
        return self._concerns_group(message.term, message.generation)

    def leave(self, abort_reason: str | None) -> None:
        """Close the transport, if any; with a reason, abort it first so that no peer waits for this rank."""
        group, self.group = self.group, None
        self._stager.cancel()
        if group is not None:
            if group.peers is not None:
                group.peers.close()
            if abort_reason is not None:
                group.transport.abort(abort_reason)
            group.transport.close()
            group.staged = group.retired = None  # whoever still holds the group does not hold weights
            self._runner.leave()

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
            self._runner.abandon()

    # --- epochs ---------------------------------------------------------------------------------------------------

    @property
    def staged_epoch(self) -> int:
        """The newest this rank could flip to; the current one if there is none."""
        assert self.group is not None
        return self.group.expert_map.epoch if self.group.staged is None else self.group.staged.epoch

    @property
    def has_offer(self) -> bool:
        """Whether a map was staged that no header has told the others of."""
        return self.group is not None and self.staged_epoch > self.group.offered_epoch

    def stage(self, message: StageMap) -> MapRefused | None:
        """Start to bring the map's experts here. What follows is `take`, unless this refuses."""
        group, epoch = self.group, message.expert_map.get("epoch")
        if not isinstance(epoch, int) or isinstance(epoch, bool):
            return self._refuse(message.generation, 0, f"expert_map.epoch={epoch!r} is not a number")
        if group is None or message.generation != group.generation:
            now = "between generations" if group is None else f"in generation {group.generation}"
            return self._refuse(message.generation, epoch, f"it is {now}")
        if epoch <= group.last_epoch:
            return self._refuse(
                message.generation, epoch, f"epoch {epoch} is not after {group.last_epoch}, which it has heard of"
            )
        if self._stager.num_jobs >= STAGE_JOBS_MAX:
            return self._refuse(message.generation, epoch, f"{STAGE_JOBS_MAX} maps are waiting already")
        group.last_epoch = epoch
        job = StageJob(
            message=message,
            epoch=epoch,
            current=lambda: group.expert_map,
            versions=lambda: group.versions,
            peers=group.peers,
            pace=Pace(self._system, message.bytes_per_s),
            started_s=self._system.now(),
        )
        self._stager.stage(job)
        return None

    def take(self, outcome: StageOutcome) -> MapStaged | MapRefused | None:
        """What the stager made, in place of an earlier map that waits for its flip; None if it comes too late."""
        group, job, staged = self.group, outcome.job, outcome.staged
        generation = job.message.generation
        if group is None or group.generation != generation or job.pace.cancelled or job.epoch in group.dropped:
            return None
        if staged is None:
            return self._refuse(generation, job.epoch, outcome.reason)
        if job.epoch <= group.expert_map.epoch:
            return self._refuse(generation, job.epoch, f"epoch {group.expert_map.epoch} is in use already")
        if not staged.versions.follows(group.versions):
            return self._refuse(
                generation, job.epoch, "other versions of the model came into force while it was staged"
            )
        group.staged = staged
        return MapStaged(
            rank=self._rank,
            generation=generation,
            epoch=job.epoch,
            num_experts=staged.num_new,
            moved_bytes=staged.new_bytes,
            sources=dict(job.sources),
            seconds=outcome.seconds,
        )

    def drop(self, message: DropMap) -> None:
        group = self.group
        if group is not None and message.generation == group.generation:
            group.dropped.add(message.epoch)  # its outcome may lie behind this message, where cancel finds no job
            self._stager.cancel(message.epoch)
            if group.staged is not None and group.staged.epoch == message.epoch:
                group.staged = None

    def flip(self, epoch: int) -> None:
        """Compute with a staged map from now on; all ranks flip in the same step."""
        group = self.group
        assert group is not None
        staged, group.staged = group.staged, None
        assert staged is not None
        assert staged.epoch == epoch
        group.retired = [layer.placement for layer in self._runner.moe_layers]
        self._runner.flip(staged)
        group.expert_map, group.versions, group.map_digest = staged.expert_map, staged.versions, staged.digest
        group.dropped = {dropped for dropped in group.dropped if dropped > epoch}

    def settle(self) -> None:
        """All headers show a later step on the current epoch: nobody computes with the one before any more."""
        assert self.group is not None
        self.group.retired = None

    @property
    def is_settled(self) -> bool:
        """Whether the memory of the epoch before is free again. The same on all ranks after a step."""
        return self.group is None or self.group.retired is None

    def close(self) -> None:
        """End the stager's thread."""
        self._stager.close()

    def _refuse(self, generation: int, epoch: int, reason: str) -> MapRefused:
        log.warning("rank %d refuses the map of epoch %d: %s", self._rank, epoch, reason)
        return MapRefused(rank=self._rank, generation=generation, epoch=epoch, reason=reason)

    def _concerns_group(self, term: int, generation: int) -> bool:
        group = self.group
        return group is not None and term >= self._fence.term and group.generation <= generation
